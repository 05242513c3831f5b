"""Backprop, exact mode, DNI, cDNI and both controls side by side, on real handwritten digits.

One model, four hidden layers, a cut after each, so five stages. Prints a table and writes a picture
of test accuracy and gradient cosine per step:

    python experiments/digits.py [--data digits|mnist] [--steps N] [--seed N] [--out DIR]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dni_fx
from data import DataError, Digits, load

HIDDEN_LAYERS = 4
CUTS = [f"layer{i + 1}" for i in range(HIDDEN_LAYERS)]

METHODS: dict[str, dict[str, Any] | None] = {  # name: options of dni_fx.decouple
    "backprop": None,  # a plain PyTorch loop, without dni_fx
    "exact": {"gradients": "exact"},  # five stages, true gradients
    "dni": {"gradients": "mlp"},  # synthesizers see the value only
    "cdni": {"gradients": "linear", "context": dni_fx.one_hot(10)},  # and the label
    "zero": {"gradients": "zero"},  # control: hidden layers do not learn
    "stale": {"gradients": "stale"},  # control: the last batch's gradients
}


@dataclass
class Run:
    """What one method did on one seed."""

    method: str
    steps: list[int] = field(default_factory=list)  # those measured, counted from 1
    accuracy: list[float] = field(default_factory=list)  # on the test set, after each of them
    cosine: list[float] = field(
        default_factory=list
    )  # predicted against backprop's gradient at the first cut
    train_accuracy: float = math.nan
    seconds: float = 0.0  # of training steps, without measurements
    synthesizer_parameters: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean_cosine(self) -> float:
        """Mean over the measured steps that predicted anything."""
        known = [c for c in self.cosine if not math.isnan(c)]
        return sum(known) / len(known) if known else math.nan


def mlp(pixels: int, width: int, norm: bool = True) -> nn.Sequential:
    """Four hidden layers, each Linear, BatchNorm (unless told otherwise) and ReLU, and a linear
    head.
    """

    def layer(inputs: int) -> nn.Sequential:
        normed = [nn.BatchNorm1d(width)] if norm else []
        return nn.Sequential(nn.Linear(inputs, width), *normed, nn.ReLU())

    hidden = [(name, layer(pixels if i == 0 else width)) for i, name in enumerate(CUTS)]
    return nn.Sequential(
        OrderedDict([("flatten", nn.Flatten()), *hidden, ("head", nn.Linear(width, 10))])
    )


def batches(data: Digits, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in an order that depends on the seed alone; each sample once an epoch, short rests
    left out.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(data.train_x), generator=generator)
        chosen, order = order[:size], order[size:]
        yield data.train_x[chosen], data.train_y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in eval mode; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    predicted = torch.cat([model(part).argmax(1) for part in images.split(2000)])
    model.train(training)
    return (predicted == labels).double().mean().item()


def train(
    method: str,
    data: Digits,
    *,
    steps: int,
    seed: int,
    batch: int,
    width: int,
    lr: float,
    synthesizer_lr: float,
    norm: bool = True,
    measure_every: int = 10,
) -> Run:
    """Train a fresh model by one method, with a progress bar. Every method starts from the same
    weights and batches.
    """
    torch.manual_seed(seed)
    model = mlp(data.pixels, width, norm)
    optimizer = partial(torch.optim.Adam, lr=lr)
    run = Run(method)
    predicted: list[Tensor] = []  # at the first cut, by the step under way

    options = METHODS[method]
    if options is None:
        adam = optimizer(model.named_parameters())

        def step(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(model(x), y).backward()
            adam.step()
            adam.zero_grad()
    else:
        decoupled = dni_fx.decouple(
            model, cuts=CUTS, example_inputs=(data.train_x[:batch],), **options
        )
        trainer = dni_fx.Trainer(
            decoupled,
            F.cross_entropy,
            optimizer=optimizer,
            synthesizer_optimizer=partial(torch.optim.Adam, lr=synthesizer_lr),
        )
        run.synthesizer_parameters = sum(p.numel() for p in decoupled.synthesizers.parameters())
        if method != "exact":
            source = decoupled.synthesizers[CUTS[0]]
            source.register_forward_hook(
                lambda _module, _args, prediction: predicted.append(prediction.gradients[0])
            )

        def step(x: Tensor, y: Tensor) -> None:
            trainer.step(x, target=y)

    bar = tqdm(
        batches(data, batch, steps, seed),
        total=steps,
        desc=f"{method:>8}",
        unit="step",
        dynamic_ncols=True,
    )
    for count, (x, y) in enumerate(bar, start=1):
        measured = count % measure_every == 0 or count == steps
        predicts = measured and options is not None and method != "exact"
        true = trainer.true_gradients(x, target=y)[CUTS[0]] if predicts else None
        predicted.clear()
        start = time.perf_counter()
        step(x, y)
        run.seconds += time.perf_counter() - start
        if measured:
            run.steps.append(count)
            run.accuracy.append(accuracy(model, data.test_x, data.test_y))
            run.cosine.append(math.nan if true is None else cosine(predicted[-1], true))
            agreement = {} if math.isnan(run.cosine[-1]) else {"cosine": f"{run.cosine[-1]:.2f}"}
            bar.set_postfix(test=f"{run.accuracy[-1]:.1%}", **agreement)
    run.train_accuracy = accuracy(model, data.train_x, data.train_y)
    run.state = {name: value.clone() for name, value in model.state_dict().items()}
    return run


def cosine(predicted: Tensor, true: Tensor) -> float:
    """Cosine of two gradients seen as vectors; nan where one is zero."""
    norms = predicted.norm() * true.norm()
    return float((predicted * true).sum() / norms) if norms > 0 else math.nan


def print_table(runs: list[Run]) -> None:
    """One row per method, as markdown."""
    print(
        "\n| method | test accuracy | train accuracy | cosine at first cut | seconds | synthesizer "
        "parameters |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for run in runs:
        if run.method in ("backprop", "exact"):
            agreement = "true gradient"
        else:
            agreement = "no gradient" if math.isnan(run.mean_cosine) else f"{run.mean_cosine:.3f}"
        print(
            f"| {run.method} | {run.accuracy[-1]:.1%} | {run.train_accuracy:.1%} | {agreement} "
            f"| {run.seconds:.1f} | {run.synthesizer_parameters:,} |"
        )


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Test accuracy and gradient cosine per step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for index, run in enumerate(runs):
        # Exact mode lies on backprop's curve: dashes let both be seen.
        style: dict[str, Any] = {"color": f"C{index}", "label": run.method}
        left.plot(
            run.steps, run.accuracy, linestyle="--" if run.method == "exact" else "-", **style
        )
        if not math.isnan(run.mean_cosine):
            right.plot(run.steps, run.cosine, **style)
    left.set(xlabel="step", ylabel="test accuracy", title=title)
    right.set(xlabel="step", ylabel="cosine", title="predicted against true gradient, first cut")
    right.axhline(0.0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare_exact(runs: list[Run]) -> bool:
    """Say whether exact mode ended in backprop's weights and buffers, bit for bit."""
    states = {run.method: run.state for run in runs}
    backprop, exact = states["backprop"], states["exact"]
    different = [name for name in backprop if not torch.equal(backprop[name], exact[name])]
    count = f"{len(backprop)} tensors after {runs[0].steps[-1]} steps"
    if different:
        print(
            f"\nexact mode DIFFERS from backprop in {len(different)} of {count}: "
            f"{', '.join(different)}"
        )
    else:
        print(f"\nexact mode equals backprop bit for bit: {count}")
    return not different


def main() -> int:
    """Run the demo; 1 where exact mode is not backprop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", choices=("digits", "mnist"), default="digits", help="data set (default: digits)"
    )
    parser.add_argument(
        "--steps", type=int, default=500, help="training steps of each method (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="where the picture goes (default: out)"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        data = load(args.data)
    except DataError as error:
        parser.exit(1, f"{error}\n")

    torch.set_num_threads(1)  # layers are small, and eager sums in one order only with one thread
    batch, width = {"digits": (64, 128), "mnist": (256, 256)}[args.data]
    common = {"steps": args.steps, "seed": args.seed, "batch": batch, "width": width}
    runs = [train(method, data, lr=1e-3, synthesizer_lr=3e-2, **common) for method in METHODS]
    print_table(runs)
    same = compare_exact(runs)
    picture = args.out / f"{args.data}.png"
    draw(runs, f"{args.data}: {HIDDEN_LAYERS} hidden layers of {width}, a cut after each", picture)
    print(f"accuracy and cosine per step: {picture}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
