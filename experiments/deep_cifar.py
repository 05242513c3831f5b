"""A small ResNet in four stages on CIFAR-10: what decoupled gradients are worth where regressing
them fails.

Stem, and three groups of residual blocks with 16, 32 and 64 channels; a cut after the stem and
after each group but the last. Every method trains the same weights on the same augmented batches,
with SGD and a cosine decay. Finished runs are kept in a JSON file beside the figure, so the same
command goes on where it was:

    python experiments/deep_cifar.py --seeds 0 1 --jobs 2 [--steps 3000] [--images 50000]
    [--blocks 1] [--methods ...]
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Digits
from experiment import (
    CLASSES,
    HEAD,
    LARGE_HEAD,
    SETTINGS,
    Progress,
    Record,
    Settings,
    add_arguments,
    carry_out,
    check_arguments,
    draw,
    load_data,
    make_run,
    table,
    train,
)

CUTS = ("stem", "layer1", "layer2")
MEAN, DEVIATION = (
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)  # of the training images, by colour
PADDING = 4

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
NET: Settings = {
    "optimizer": SGD,
    "synthesizer_optimizer": None,  # None: that of the stages
    "decay": "cosine",
    "rate_warm_up": 100,
    "channels_last": True,
}

# What each method changes in the above. Heads are two convolutions of stride 2, pooling and a
# linear layer.
ADAM = {"name": "adam", "lr": 1e-3}
LOCAL: Settings = {"gradients": {"source": "local", **HEAD}, "labels": True}
DISTILL: Settings = {"gradients": {"source": "distill", **HEAD}, "labels": True}
CRITIC: Settings = {"gradients": {"source": "critic", **HEAD}, "labels": True}
DELAYED: Settings = {"gradients": {"source": "delayed", "steps": 1}}
CORRECTED: Settings = {
    "gradients": {"source": "corrected", "weight": 1.0, "by": {"source": "local", **HEAD}},
    "labels": True,
}

METHODS: dict[str, Settings] = {
    "backprop": {"gradients": None},
    "linear": {"gradients": "linear", "labels": True, "synthesizer_optimizer": ADAM},
    "conv": {"gradients": "conv", "labels": True, "synthesizer_optimizer": ADAM},
    "local": LOCAL,
    "local, wide head": {"gradients": {"source": "local", **HEAD, "width": 64}, "labels": True},
    "local, deep head": {"gradients": {"source": "local", **HEAD, "hidden": 3}, "labels": True},
    "local, large head": {"gradients": {"source": "local", **LARGE_HEAD}, "labels": True},
    "distill": DISTILL,
    "critic": CRITIC,
    "sobolev": {"gradients": {"source": "sobolev", **HEAD}, "labels": True},
    "delayed": DELAYED,  # Features Replay: the stage is run again with the weights of now
    "stash": {
        "gradients": {"source": "delayed", "steps": 1, "recompute": False}
    },  # DDG: its graph is kept
    "delayed, no momentum": {**DELAYED, "optimizer": {**SGD, "lr": 0.2, "momentum": 0.0}},
    "shrink": {"gradients": {"source": "delayed", "steps": 1, "shrink": 0.7}},  # FDG's factor
    "corrected": CORRECTED,
    "mix": {
        "gradients": {"source": "mix", "by": {"source": "local", **HEAD}, "share": 0.5},
        "labels": True,
    },
    # the same with a share of the true gradient that grows from 0 to 1
    "growing mix": {
        "gradients": {"source": "mix", "by": {"source": "local", **HEAD}},
        "labels": True,
        "share_ramp": [0.0, 1.0],
    },
    # and not waiting for it
    "late mix": {
        "gradients": {"source": "mix", "by": {"source": "local", **HEAD}, "steps": 1},
        "labels": True,
        "share_ramp": [0.0, 1.0],
    },
    "late mix, one backward": {
        "gradients": {
            "source": "mix",
            "by": {"source": "local", **HEAD},
            "steps": 1,
            "at_once": False,
        },
        "labels": True,
        "share_ramp": [0.0, 1.0],
    },
    "feedback": {"gradients": "feedback", "labels": True},
    "zero": {"gradients": "zero"},
    "stale": {"gradients": "stale"},
    # true gradients first, then faded into the source's
    "local + warm-up": {**LOCAL, "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0.1}},
    "distill + warm-up": {**DISTILL, "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0.1}},
    "critic + warm-up": {**CRITIC, "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0.1}},
    "corrected + warm-up": {
        **CORRECTED,
        "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0},
    },
    "corrected, large head + warm-up": {
        "gradients": {
            "source": "corrected",
            "weight": 1.0,
            "by": {"source": "local", **LARGE_HEAD},
        },
        "labels": True,
        "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0},
    },
    "corrected + long tail": {
        **CORRECTED,
        "schedule": {"schedule": "Calibration", "every": None, "exact_from": 0.7},
    },
    "delayed + warm-up": {**DELAYED, "schedule": {"schedule": "WarmUp", "steps": 0.1, "fade": 0}},
    # every tenth step exact
    "local + calibration": {**LOCAL, "schedule": {"schedule": "Calibration", "every": 10}},
    "distill + calibration": {**DISTILL, "schedule": {"schedule": "Calibration", "every": 10}},
    # the last tenth of the steps exact
    "local + exact tail": {
        **LOCAL,
        "schedule": {"schedule": "Calibration", "every": None, "exact_from": 0.9},
    },
    "distill + exact tail": {
        **DISTILL,
        "schedule": {"schedule": "Calibration", "every": None, "exact_from": 0.9},
    },
    "corrected + exact tail": {
        **CORRECTED,
        "schedule": {"schedule": "Calibration", "every": None, "exact_from": 0.9},
    },
    "delayed + exact tail": {
        **DELAYED,
        "schedule": {"schedule": "Calibration", "every": None, "exact_from": 0.9},
    },
}
USUAL = [name for name in METHODS if " + " not in name]


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet(blocks: int, width: int = 16, stem_stride: int = 1) -> nn.Sequential:
    """ResNet of 6 x blocks + 2 layers (He et al. 2015, arXiv:1512.03385, section 4.2), with
    projections.
    """
    stem = nn.Sequential(
        nn.Conv2d(3, width, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )
    parts: list[tuple[str, nn.Module]] = [("stem", stem)]
    channels = width
    for group in range(3):
        outputs = width * 2**group
        made = [
            Block(channels if i == 0 else outputs, outputs, 2 if i == 0 and group > 0 else 1)
            for i in range(blocks)
        ]
        parts.append((f"layer{group + 1}", nn.Sequential(*made)))
        channels = outputs
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(OrderedDict([*parts, ("head", head)]))


def normalized(data: Digits) -> Digits:
    """Images of mean 0 and deviation 1 in each colour."""
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return data._replace(
        train_x=(data.train_x - mean) / deviation, test_x=(data.test_x - mean) / deviation
    )


def augmented_batches(
    data: Digits, size: int, steps: int, seed: int, augmentation: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that depend on the seed alone; each image once an epoch, rests left out.

    Crops and flips are drawn, but not used, where the augmentation does not ask for them.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    side = data.train_x.shape[-1]
    across = torch.arange(side)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(data.train_x), generator=generator)
        chosen, order = order[:size], order[size:]
        corners = torch.randint(0, 2 * PADDING + 1, (2, size, 1), generator=generator)
        down, right = corners if "crop" in augmentation else torch.full_like(corners, PADDING)
        flipped = (torch.rand(size, 1, generator=generator) < 0.5) & ("flip" in augmentation)
        rows = down + across
        columns = right + torch.where(flipped, across.flip(0), across)
        padded = F.pad(data.train_x[chosen], (PADDING,) * 4).permute(0, 2, 3, 1)
        images = padded[torch.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
        yield images.permute(0, 3, 1, 2), data.train_y[chosen]  # channels last in memory


def make_settings(args: argparse.Namespace, method: str) -> Settings:
    """Everything that decides a run."""
    settings = {**SETTINGS, **NET, **METHODS[method]}
    if args.lr is not None:
        settings["optimizer"] = {**settings["optimizer"], "lr": args.lr}
    settings["synthesizer_optimizer"] = settings["synthesizer_optimizer"] or settings["optimizer"]
    settings["rate_warm_up"] = (
        settings["rate_warm_up"] if args.rate_warm_up is None else args.rate_warm_up
    )
    if args.synthesizer_lr is not None:
        settings["synthesizer_optimizer"] = {
            **settings["synthesizer_optimizer"],
            "lr": args.synthesizer_lr,
        }
    return settings | {
        "steps": args.steps,
        "batch": args.batch,
        "measure_every": args.measure_every or max(args.steps // 10, 1),
        "blocks": args.blocks,
        "width": args.width,
        "stem_stride": args.stem_stride,
        "augmentation": args.augmentation,
        "cuts": args.cuts,
        "images": args.images,
        "limit": args.limit,
    }


def make_runs(args: argparse.Namespace) -> list[Record]:
    """All runs asked for, seed by seed, so that an early look at the table compares all methods."""
    setting = f"ResNet-{6 * args.blocks + 2}" + (
        f", stem stride {args.stem_stride}" if args.stem_stride > 1 else ""
    )
    return [
        make_run(method, setting, seed, make_settings(args, method))
        for seed in args.seeds
        for method in args.methods
    ]


def run_one(run: Record, data: Digits, progress: Progress) -> Record:
    """Train a fresh net."""
    settings, seed = run["settings"], run["seed"]
    torch.manual_seed(seed)
    model = resnet(settings["blocks"], settings["width"], settings["stem_stride"])
    size = min(settings["batch"], len(data.train_x))
    drawn = augmented_batches(data, size, settings["steps"], seed, settings["augmentation"])
    return train(model, settings["cuts"], data, drawn, settings, seed=seed, progress=progress)


def load(args: argparse.Namespace) -> Digits:
    """CIFAR-10, normalised."""
    return normalized(load_data("cifar10", args.data, args.limit, args.images))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--blocks", type=int, default=1, help="in each of the three groups (default: 1, a ResNet-8)"
    )
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the first group (default: 16)"
    )
    parser.add_argument(
        "--stem-stride", type=int, default=2, help="1 for four times the work (default: 2)"
    )
    parser.add_argument(
        "--cuts", nargs="+", default=list(CUTS), help="modules to cut after (stem layer1 layer2)"
    )
    parser.add_argument(
        "--images", type=int, default=50_000, help="of the training part (default: all 50000)"
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="(default: 3000, nearly four epochs)"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--lr", type=float, help="of the stages (default: as in the table at the top)"
    )
    parser.add_argument(
        "--synthesizer-lr", type=float, help="of the sources (default: as in the table at the top)"
    )
    parser.add_argument(
        "--rate-warm-up",
        type=int,
        help="steps in which rates rise from 0 (default: as in the table)",
    )
    parser.add_argument("--augmentation", choices=("crop+flip", "flip", "none"), default="flip")
    add_arguments(parser, METHODS, USUAL, "out/deep_cifar.json")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, "blocks", "width", "stem_stride", "images", "steps", "batch")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, then print the table and draw the curves."""
    args = parse_arguments(arguments)

    def report(records: list[Record]) -> None:
        print(table(records, errors=False))
        picture = args.out.with_suffix(".png")
        draw(records, picture, errors=False)
        print(f"\nlearning curves: {picture}")

    return carry_out(args, make_runs(args), run_one, partial(load, args), report)


if __name__ == "__main__":
    sys.exit(main())
