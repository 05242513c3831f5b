"""Fine-tune a pretrained ResNet in four stages: from five classes of CIFAR-10 to the other five.

The checkpoint is trained here, by backpropagation on the first five classes, and kept beside the
finished runs; or name one of your own for the same net with --checkpoint. It is then loaded into
the plain class, cut, and trained on a few images of the other classes by sources of every kind and
both controls ("frozen": nothing but the head is trained):

    python experiments/finetune_vision.py --seeds 0 1 2 --jobs 2 [--steps 500] [--images 5000]
    [--methods ...]
"""

from __future__ import annotations

import argparse
import pickle
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data import DataError, Digits
from deep_cifar import CUTS, METHODS, NET, SGD, augmented_batches, normalized, resnet
from experiment import (
    CLASSES,
    SETTINGS,
    Progress,
    Record,
    Settings,
    add_arguments,
    carry_out,
    check_arguments,
    cost_table,
    draw,
    load_data,
    make_run,
    train,
)

BEFORE = 5  # classes of the pretraining; the others are learnt then
RATE = 0.02
SOURCES = ("linear", "conv", "local", "distill", "critic", "sobolev", "delayed", "corrected")
MADE_BY = (
    "blocks",
    "width",
    "batch",
    "pretraining",
    "limit",
)  # the settings that decide a checkpoint made here
USUAL = ("backprop", "frozen", "zero", "stale", *SOURCES)


def part(data: Digits, classes: range, images: int | None = None) -> Digits:
    """The images of some classes, of the training images the first so many."""
    train_in, test_in = (
        (y >= classes.start) & (y < classes.stop) for y in (data.train_y, data.test_y)
    )
    train_x, train_y = (
        data.train_x[train_in][:images].clone(),
        data.train_y[train_in][:images].clone(),
    )
    return Digits(
        data.name, train_x, train_y, data.test_x[test_in].clone(), data.test_y[test_in].clone()
    )


def pretrain(data: Digits, settings: Settings, path: Path) -> None:
    """Train the net by backpropagation on the first classes and save its state."""
    first = part(data, range(BEFORE))
    torch.manual_seed(0)
    model = resnet(settings["blocks"], settings["width"])
    steps = settings["pretraining"]
    settings = {
        **settings,
        "steps": steps,
        "measure_every": steps,
        "gradients": None,
        "optimizer": SGD,
    }
    batches = augmented_batches(first, settings["batch"], steps, 0, "crop+flip")
    with tqdm(total=steps, unit="step", desc="pretraining") as bar:
        found = train(
            model,
            CUTS,
            first,
            batches,
            settings,
            seed=0,
            progress=lambda steps, _: bar.update(steps),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {key: settings[key] for key in MADE_BY}
    torch.save(
        {"state": model.state_dict(), "accuracy": found["test_accuracy"], "made": made}, path
    )


def load_pretrained(path: Path, settings: Settings) -> tuple[nn.Sequential, dict[str, Any]]:
    """The net with a checkpoint's weights and a new head, and what the file holds besides its
    ``state``.

    Raises:
        DataError: the file is not there, no checkpoint of this net, or made here by other settings.
    """
    if not path.exists():
        raise DataError(f"there is no checkpoint {path}")
    model = resnet(settings["blocks"], settings["width"])
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        saved = saved if "state" in saved else {"state": saved}
        model.load_state_dict(saved["state"])
    except (RuntimeError, TypeError, AttributeError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} holds no checkpoint of this net ({reason}): delete it or name another"
        ) from error
    wrong = [
        f"{k} {v}, here {settings[k]}" for k, v in saved.get("made", {}).items() if settings[k] != v
    ]
    if wrong and settings["checkpoint"] is None:
        raise DataError(
            f"{path} was made with {'; '.join(wrong)}: delete it, or name it with --checkpoint"
        )
    head = model.get_submodule("head.2")
    assert isinstance(head, nn.Linear)
    head.reset_parameters()
    return model, saved


def run_one(run: Record, data: tuple[Path, Digits], progress: Progress) -> Record:
    """Fine-tune from the checkpoint."""
    (path, second), settings, seed = data, run["settings"], run["seed"]
    torch.manual_seed(seed)
    model, _ = load_pretrained(path, settings)
    if settings["trained"] == "head":
        model.requires_grad_(False).head.requires_grad_(True)
    size = min(settings["batch"], len(second.train_x))
    batches = augmented_batches(second, size, settings["steps"], seed, "crop+flip")
    return train(model, CUTS, second, batches, settings, seed=seed, progress=progress)


def load(args: argparse.Namespace) -> tuple[Path, Digits]:
    """The checkpoint, and the images to fine-tune on."""
    data = normalized(load_data("cifar10", args.data, args.limit))
    load_pretrained(
        args.checkpoint, make_settings(args, "backprop")
    )  # an error before the first run
    return args.checkpoint, part(data, range(BEFORE, CLASSES), args.images)


def make_settings(args: argparse.Namespace, method: str) -> Settings:
    """Everything that decides a run."""
    frozen = method == "frozen"
    settings = {
        **SETTINGS,
        **NET,
        "optimizer": {**SGD, "lr": RATE},
        **METHODS["backprop" if frozen else method],
    }
    settings["synthesizer_optimizer"] = settings["synthesizer_optimizer"] or SGD
    return settings | {
        "steps": args.steps,
        "batch": args.batch,
        "measure_every": args.measure_every or max(args.steps // 10, 1),
        "trained": "head" if frozen else "all",
        "blocks": args.blocks,
        "width": args.width,
        "images": args.images,
        "pretraining": args.pretraining,
        "limit": args.limit,
        "checkpoint": None if args.own is None else checksum(args.own),
    }


def checksum(path: Path) -> str:
    """Of a file."""
    return f"{zlib.crc32(path.read_bytes()) if path.exists() else 0:08x}"


def report(records: list[Record], args: argparse.Namespace) -> None:
    """What the checkpoint knew, the table, and learning curves."""
    _, saved = load_pretrained(args.checkpoint, records[0]["settings"])
    known = (
        f", {saved['accuracy']:.2f} % right on the first {BEFORE} classes before"
        if "accuracy" in saved
        else ""
    )
    print(f"ResNet-{6 * args.blocks + 2}{known}\n")
    print(
        cost_table(
            records, lambda record: record["processor_seconds"] / record["curve"]["steps"][-1]
        )
    )
    draw(records, args.out.with_suffix(".png"), errors=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint and the runs that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", type=int, default=1, help="in each of the three groups (default: 1, a ResNet-8)"
    )
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the first group (default: 16)"
    )
    parser.add_argument(
        "--images", type=int, default=5000, help="of the other classes (default: 5000 of 25000)"
    )
    parser.add_argument("--steps", type=int, default=500, help="of fine-tuning (default: 500)")
    parser.add_argument(
        "--pretraining",
        type=int,
        default=2000,
        help="steps that make the checkpoint (default: 2000)",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="(default: beside the finished runs, made where it is missing)",
    )
    add_arguments(parser, (*METHODS, "frozen"), USUAL, "out/finetune_vision.json")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "blocks", "width", "images", "steps", "batch", "pretraining")
    args.own, args.checkpoint = args.checkpoint, args.checkpoint or args.out.with_suffix(".pt")
    try:
        if args.own is None and not args.checkpoint.exists():
            torch.set_num_threads(1)
            data = normalized(load_data("cifar10", args.data, args.limit))
            pretrain(data, make_settings(args, "backprop"), args.checkpoint)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    runs = [
        make_run(m, "", seed, make_settings(args, m)) for seed in args.seeds for m in args.methods
    ]
    return carry_out(
        args, runs, run_one, partial(load, args), lambda records: report(records, args)
    )


if __name__ == "__main__":
    sys.exit(main())
