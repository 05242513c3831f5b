"""Which optimiser sources should have: test error for every kind and rate, beside the controls.

    python benchmarks/rates.py --data digits --steps 1000
    python benchmarks/rates.py --data cifar10 --steps 1000

A net of four hidden layers (linear, batch norm, ReLU; 256 wide, 64 for digits) and a linear head, a
cut after every layer, sources that see the labels; the model by Adam 1e-3, batch 256, one thread.
A tenth of the training set is held out to choose rates by; errors on the test set stand beside.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import dni_fx
from data import cifar10, load

KINDS = ("linear", "mlp", "local", "distill", "critic")
CONTROLS = ("exact", "zero")
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Split(NamedTuple):
    """Images as vectors, with their labels.

    Attributes:
        train, held_out, test: ``(images, pixels)`` and ``(images,)`` of each.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(name: str, directory: str | None) -> Split:
    """The data, a tenth of its training part held out; standardised by the rest."""
    data = cifar10(directory) if name == "cifar10" else load(name, directory)
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    first, rest = order[: len(order) // 10], order[len(order) // 10 :]
    mean, scale = data.train_x[rest].mean(), data.train_x[rest].std()
    train_x, test_x = (((x - mean) / scale).flatten(1) for x in (data.train_x, data.test_x))
    held_out = train_x[first], data.train_y[first]
    return Split((train_x[rest], data.train_y[rest]), held_out, (test_x, data.test_y))


def net(pixels: int, width: int) -> nn.Sequential:
    """Four hidden layers and a head."""
    sizes = [pixels, *[width] * 4]
    hidden = [
        nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
        for a, b in itertools.pairwise(sizes)
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


@torch.no_grad()
def error(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Per cent of the labels that the model does not give."""
    model.eval()
    found = torch.cat([model(x).argmax(1) for x in part[0].split(1000)])
    model.train()
    return 100 * float((found != part[1]).float().mean())


def train(data: Split, kind: str, make: Callable[[Any], Any] | None, steps: int, seed: int) -> Any:
    """Train once; errors on what was held out and on the test set, in per cent."""
    torch.manual_seed(seed)
    x, y = data.train
    model = net(x.shape[1], 64 if x.shape[1] < 100 else 256)
    decoupled = dni_fx.decouple(
        model,
        ["0", "1", "2", "3"],
        example_inputs=(x[:256],),
        gradients=kind,
        context=dni_fx.one_hot(10),
        check=False,
    )
    options = {} if make is None else {"synthesizer_optimizer": make}
    trainer = dni_fx.Trainer(
        decoupled,
        F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        metrics_every=steps + 1,
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator)
        trainer.step(x[rows], target=y[rows])
    return error(model, data.held_out), error(model, data.test)


def rows(
    controls: Sequence[str], kinds: Sequence[str], rates: Sequence[float]
) -> list[tuple[str, str, Any]]:
    """Kind, what its optimiser is called, and what makes it."""
    found: list[tuple[str, str, Any]] = [(kind, "-", None) for kind in controls]
    for kind in kinds:
        found += [(kind, f"Adam {rate:g}", partial(torch.optim.Adam, lr=rate)) for rate in rates]
    return found


def main() -> None:
    """Print a row for every kind and rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "mnist", "cifar10"), default="digits")
    parser.add_argument("--directory", help="where the files of mnist or cifar10 are")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = split(arguments.data, arguments.directory)
    print(f"{arguments.data}, {arguments.steps} steps, {arguments.seeds} seeds\n")
    print("| source | its optimiser | held out, error % | test, error % |")
    print("| --- | --- | ---: | ---: |")
    begun = time.perf_counter()
    for kind, name, make in rows(arguments.controls, arguments.kinds, arguments.rates):
        found = [train(data, kind, make, arguments.steps, seed) for seed in range(arguments.seeds)]
        held_out, test = (sum(values) / len(values) for values in zip(*found, strict=True))
        print(f"| {kind} | {name} | {held_out:.2f} | {test:.2f} |", flush=True)
    print(f"\n{time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
