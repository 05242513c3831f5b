"""MNIST with the stages of one model on several processes, none of which waits for another's
gradients.

    torchrun --standalone --nproc-per-node 2 experiments/distributed_mnist.py [--compare]
    python experiments/distributed_mnist.py                           # the same in one process

Where MNIST is not at hand, the digits that come with scikit-learn are used. With --checkpoint DIR a
run that was ended goes on where it was, and ``torchrun --max-restarts 3`` starts it again by
itself.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
import ranks
from data import DataError, Digits, find_mnist, load
from dni_fx import distributed

LAYERS = 4


def classifier(pixels: int, width: int) -> nn.Sequential:
    """Four hidden layers and a linear head."""
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(LAYERS):
        linear = nn.Linear(width if i else pixels, width)
        layers.append((f"layer{i + 1}", nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU())))
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(width, 10))]))


def cut_names(stages: int) -> list[str]:
    """Cuts that share the layers out."""
    return [f"layer{i * (LAYERS + 1) // stages}" for i in range(1, stages)]


def batch_at(data: Digits, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: the same in every process, and after a restart."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    chosen = torch.randint(len(data.train_x), (size,), generator=generator)
    return data.train_x[chosen], data.train_y[chosen]


def accuracy(trainer: distributed.Trainer, model: nn.Module, data: Digits) -> float:
    """Share of right answers on the test set; each process evaluates its own stages."""
    model.eval()
    right = 0.0
    for images, labels in zip(data.test_x.split(2000), data.test_y.split(2000), strict=True):
        output = trainer.forward(images)  # None where the last stage is not
        right = (
            float("nan") if output is None else right + float((output.argmax(1) == labels).sum())
        )
    model.train()
    return trainer.mean(right / len(data.test_y))  # known to all


def train(method: str, data: Digits, args: argparse.Namespace) -> float:
    """Train with one source of gradients. Returns the test accuracy."""
    torch.manual_seed(args.seed)
    model = classifier(data.pixels, args.width)
    decoupled = distributed.decouple(
        model,
        cut_names(args.stages),
        example_inputs=(data.train_x[: args.batch],),
        gradients=method,
        context=dni_fx.one_hot(10),
    )
    directory, reached = ranks.folder(args, method), float("nan")
    with distributed.Trainer(
        decoupled,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        synthesizer_optimizer=partial(torch.optim.Adam, lr=3e-2),
        **ranks.flow(args),
    ) as trainer:
        if directory:
            reached = trainer.resume(directory) or reached
            if trainer.steps:
                ranks.say(f"{method}: goes on after step {trainer.steps}")
        for step in range(trainer.steps, args.steps):
            x, y = batch_at(data, args.batch, args.seed, step)
            report = trainer.step(x, target=y)
            if (step + 1) % args.every and step + 1 < args.steps:
                continue
            if step + 1 == args.steps:
                trainer.drain()  # what is under way belongs to the run
            own = float(report.loss) if report.outputs is not None else float("nan")
            loss, reached = trainer.mean(own), accuracy(trainer, model, data)
            ranks.say(
                f"{method:>8}  step {step + 1:5}  loss {loss:.3f}  test accuracy {reached:.2%}"
            )
            if directory:
                trainer.save(directory, extra=reached)
        ranks.finish(trainer, args, method)
    return reached


def main() -> None:
    """Train by the source asked for, and by the controls."""
    parser = ranks.options(__doc__, steps=2000, batch=128, every=500, stages=4, most=LAYERS + 1)
    parser.add_argument(
        "--data", choices=("digits", "mnist"), help="data set (default: mnist where it is at hand)"
    )
    parser.add_argument("--width", type=int, default=256, help="of hidden layers (default: 256)")
    args = ranks.parse(parser)
    try:
        data = load(args.data or ("mnist" if find_mnist() else "digits"))
    except DataError as error:
        parser.exit(1, f"{error}\n")
    with ranks.processes() as count:
        ranks.say(f"{data.name}: {args.stages} stages, {count} process{'es' if count > 1 else ''}")
        found = {method: train(method, data, args) for method in args.methods}
        for method, reached in found.items():
            ranks.say(f"{method:>8}: test accuracy {reached:.2%}")


if __name__ == "__main__":
    main()
