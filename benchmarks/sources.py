"""What a decoupled step costs with every gradient source, next to hand-written loops and to
backprop.

    python benchmarks/sources.py
    python benchmarks/sources.py --networks conv --sources linear local

Two networks with three cuts each: an MLP (784 inputs, four hidden layers of 256, 10 classes; batch
256) and a small convolutional one (four blocks of convolution, batch norm and ReLU on images of 32
x 32; batch 32). Sources see the labels; Adam everywhere, one thread. The loops for "linear" and
"local" are what a careful person would write for these networks; they must end in the same weights,
and every source must run once a cut and step: both is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.sources import SOURCES
from probe import capacity, describe_environment, interleave
from step import (
    CHECKED_STEPS,
    CLASSES,
    LEARNING_RATE,
    WINDOW,
    Backprop,
    Network,
    Step,
    batches,
    largest_difference,
)

COUNTED_STEPS = 4
BATCH, CHANNELS, SIZE = 32, 16, 32
Batches = Sequence[tuple[Tensor, Tensor]]


class ConvNetwork(nn.Module):
    """Four blocks and a head; the third block halves the maps and doubles the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = _block(3, CHANNELS)
        self.block2 = _block(CHANNELS, CHANNELS)
        self.block3 = _block(CHANNELS, 2 * CHANNELS, stride=2)
        self.block4 = _block(2 * CHANNELS, 2 * CHANNELS)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * CHANNELS, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, 32, 32)`` to ``(batch, 10)`` logits."""
        return self.head(self.block4(self.block3(self.block2(self.block1(x)))))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@dataclass(frozen=True)
class Case:
    """A network, its cuts and its data."""

    make: Callable[[], nn.Module]
    cuts: tuple[str, ...]
    batches: Callable[[int], Batches]

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """The modules between the cuts, for loops that are written by hand."""
        children = list(model.children())
        return [*children[: len(self.cuts)], nn.Sequential(*children[len(self.cuts) :])]


def images(count: int) -> Batches:
    """Random images and labels of one seed."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


CASES = {
    "mlp": Case(Network, ("hidden1", "hidden2", "hidden3"), batches),
    "conv": Case(ConvNetwork, ("block1", "block2", "block3"), images),
}


class LinearByHand:
    """Linear synthesizers, as in ``step.py``, for vectors and for maps: at every pixel the same
    matrix.
    """

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.stages = case.stages(model)
        self.features = [_width(stage) for stage in self.stages[:-1]]
        self.synthesizers = nn.ModuleList(nn.Linear(n + CLASSES, n) for n in self.features)
        for parameter in self.synthesizers.parameters():
            nn.init.zeros_(parameter)
        self.scale, self.count = torch.zeros(2, len(case.cuts))
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.synthesizer_optimizer = torch.optim.Adam(self.synthesizers.parameters(), LEARNING_RATE)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step; returns the loss, detached."""
        self.optimizer.zero_grad()
        self.synthesizer_optimizer.zero_grad()
        context = F.one_hot(labels, CLASSES).to(x.dtype)
        scales = self.scale.unbind()
        predictions, targets = [], []
        received = x
        for index, stage in enumerate(self.stages[:-1]):
            sent = stage(received)
            prediction = self._predict(index, sent.detach(), context)
            sent.backward(prediction.detach() * scales[index])
            if index:
                targets.append(_gradient(received))
            predictions.append(prediction)
            received = sent.detach().requires_grad_()
        loss = F.cross_entropy(self.stages[-1](received), labels)
        loss.backward()
        targets.append(_gradient(received))

        self._update_scale(targets)
        inverse = (
            self.scale.reciprocal().nan_to_num(posinf=0.0).unbind()
        )  # a zero scale means zero targets
        for prediction, target, factor in zip(predictions, targets, inverse, strict=True):
            F.mse_loss(prediction, target * factor).backward()
        self.optimizer.step()
        self.synthesizer_optimizer.step()
        return loss.detach()

    def _predict(self, index: int, value: Tensor, context: Tensor) -> Tensor:
        layer: nn.Linear = self.synthesizers[index]  # type: ignore[assignment]
        if value.dim() == 2:
            return layer(torch.cat((value, context), 1))
        weight, shift = layer.weight.split((self.features[index], CLASSES), 1)
        return (
            F.conv2d(value, weight[..., None, None], layer.bias)
            + F.linear(context, shift)[..., None, None]
        )

    @torch.no_grad()
    def _update_scale(self, targets: list[Tensor]) -> None:
        square = torch.stack(
            [torch.linalg.vector_norm(target).square() / target.numel() for target in targets]
        )
        known = (square > 0) & square.isfinite()
        self.count.add_(known).clamp_(max=WINDOW)
        updated = self.scale.square().lerp(square, self.count.reciprocal()).sqrt()
        self.scale.copy_(torch.where(known, updated, self.scale))


class LocalByHand:
    """Local losses: every stage is trained through a head of its own, in one backward pass for
    both.

    The heads are copies of the library's layers.
    """

    def __init__(self, case: Case, model: nn.Module, library: Library) -> None:
        self.stages = case.stages(model)
        self.heads = nn.ModuleList(map(_head, library.decoupled.sources.values()))
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.head_optimizer = torch.optim.Adam(self.heads.parameters(), LEARNING_RATE)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step; returns the last stage's loss, detached."""
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        received = x
        for stage, head in zip(self.stages[:-1], self.heads, strict=True):
            sent = stage(received)
            F.cross_entropy(head(sent), labels).backward()
            received = sent.detach()
        loss = F.cross_entropy(self.stages[-1](received), labels)
        loss.backward()
        self.optimizer.step()
        self.head_optimizer.step()
        return loss.detach()


def _width(stage: nn.Module) -> int:
    return next(len(p) for p in reversed(list(stage.parameters())))


def _head(source: nn.Module) -> nn.Module:
    (encoder,), output = source.encoders, source.output  # type: ignore[misc]
    maps = any(isinstance(layer, nn.Conv2d) for layer in encoder.blocks)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if maps else []
    return copy.deepcopy(nn.Sequential(*encoder.blocks, *pool, output))  # type: ignore[arg-type]


def _gradient(received: Tensor) -> Tensor:
    assert received.grad is not None
    return received.grad


class Library:
    """The same through dni_fx, with any source."""

    def __init__(self, case: Case, model: nn.Module, source: str) -> None:
        self.decoupled = dni_fx.decouple(
            model,
            cuts=list(case.cuts),
            example_inputs=(case.batches(1)[0][0],),
            gradients=source,
            context=dni_fx.one_hot(CLASSES),
            check=False,
        )

        def adam(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, LEARNING_RATE)

        self.trainer = dni_fx.Trainer(
            self.decoupled, loss=F.cross_entropy, optimizer=adam, synthesizer_optimizer=adam
        )

    def __call__(self, x: Tensor, labels: Tensor) -> object:
        """One step."""
        return self.trainer.step(x, target=labels)

    def learnt(self) -> list[Tensor]:
        """The sources' parameters, cut after cut."""
        return [
            p.detach() for source in self.decoupled.sources.values() for p in source.parameters()
        ]


def compare_weights(case: Case, start: nn.Module, source: str) -> str:
    """Train by hand and by library from one start for ``CHECKED_STEPS`` and compare all weights,
    the sources' too.

    Raises:
        AssertionError: they differ by more than float32 rounding explains.
    """
    by_hand, by_library = copy.deepcopy(start), copy.deepcopy(start)
    library = Library(case, by_library, source)
    hand = make_by_hand(case, by_hand, source, library)
    for x, labels in case.batches(CHECKED_STEPS):
        hand(x, labels)
        library(x, labels)
    learnt = hand.synthesizers if isinstance(hand, LinearByHand) else hand.heads
    model = largest_difference(list(by_library.parameters()), list(by_hand.parameters()))
    own = largest_difference(library.learnt(), list(learnt.parameters()))
    moved = largest_difference(list(by_hand.parameters()), list(start.parameters()))
    if model == own == 0.0:
        return (
            f"After {CHECKED_STEPS} steps with {source!r} both have the same weights, bit for bit."
        )
    text = f"After {CHECKED_STEPS} steps with {source!r} weights differ by up to {model:.1e}"
    text += f", the sources' by {own:.1e}"
    assert model < 0.02 * moved, (
        f"{text}; training moved them by up to {moved:.1e}: this is not the same mathematics"
    )
    return f"{text}; training moved them by up to {moved:.1e}."


def make_by_hand(
    case: Case, model: nn.Module, source: str, library: Library
) -> LinearByHand | LocalByHand:
    """The loop for ``"linear"`` or ``"local"``, its sources with the library's initial weights."""
    return LinearByHand(case, model) if source == "linear" else LocalByHand(case, model, library)


def count_forwards(library: Library, data: Batches, exact: bool) -> int:
    """How often a source runs per cut and step, counted by hooks.

    Raises:
        AssertionError: not once (not at all in exact mode), or a part of it more than once.
    """
    counts: Counter[str] = Counter()
    handles = []
    for cut, source in library.decoupled.sources.items():
        for name, module in source.named_modules(prefix=cut):
            handles.append(
                module.register_forward_hook(lambda *_, name=name: counts.update([name]))
            )
    for x, labels in data:
        library(x, labels)
    for handle in handles:
        handle.remove()
    expected = 0 if exact else 1
    for cut in library.decoupled.sources:
        assert counts[cut] == expected * len(data), (
            f"the source at {cut!r} ran {counts[cut]} x in {len(data)} steps"
        )
    assert max(counts.values(), default=0) <= len(data), (
        f"parts of sources ran more than once a step: {counts}"
    )
    return expected


def measure(name: str, wanted: Sequence[str], rounds: int, calls: int) -> None:
    """Check, time and print the table of one network."""
    case = CASES[name]
    torch.manual_seed(0)
    start = case.make()
    by_hand = [source for source in ("linear", "local") if source in wanted]
    print(f"## {name}: {capacity()}\n")
    for source in by_hand:
        print(compare_weights(case, start, source))
    steps: dict[str, Step] = {"backprop": Backprop(copy.deepcopy(start))}  # type: ignore[arg-type]
    forwards: dict[str, int] = {}
    for source in wanted:
        try:
            library = Library(case, copy.deepcopy(start), source)
        except DecouplingError as error:
            print(f"{source!r} does not fit: {str(error).split('. ')[0]}.")
            continue
        if source in by_hand:
            steps[f"{source}, by hand"] = make_by_hand(case, copy.deepcopy(start), source, library)
        forwards[source] = count_forwards(library, case.batches(COUNTED_STEPS), source == "exact")
        steps[source] = library

    def turn(step: Step) -> Callable[[], object]:
        data = itertools.cycle(case.batches(8))  # one batch alone would soon be learnt by heart
        return lambda: step(*next(data))

    timings = interleave(
        {n: turn(s) for n, s in steps.items()}, rounds=rounds, calls=calls, warmup=5
    )
    backprop = timings["backprop"]
    titles = [
        "step",
        "min, ms",
        "median, ms",
        "x by hand (min)",
        "x by hand (median)",
        "x backprop (min)",
    ]
    titles += ["x backprop (median)", "forwards"]
    print(f"\n| {' | '.join(titles)} |\n| --- {'| ---: ' * (len(titles) - 1)}|")
    for step, timing in timings.items():
        hand = timings.get(f"{step}, by hand")
        ratios = (
            ["", ""]
            if hand is None
            else [f"{timing.best / hand.best:.2f}", f"{timing.median / hand.median:.2f}"]
        )
        ratios += [f"{timing.best / backprop.best:.2f}", f"{timing.median / backprop.median:.2f}"]
        cells = [
            step,
            f"{timing.best * 1e3:.2f}",
            f"{timing.median * 1e3:.2f}",
            *ratios,
            str(forwards.get(step, "")),
        ]
        print(f"| {' | '.join(cells)} |")
    print()


def main() -> None:
    """Print a table for every network."""
    known = [name for name in SOURCES if name != "auto"]  # which is one of the others
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sources", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=30, help="turns that each variant gets")
    parser.add_argument("--calls", type=int, default=5, help="steps in one turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_environment()}\n")
    for name in arguments.networks:
        measure(name, arguments.sources, arguments.rounds, arguments.calls)
    print(
        "forwards: how often a source ran per cut and step, counted by hooks on it and on every "
        "part of it."
    )


if __name__ == "__main__":
    main()
