"""Training through time: memory against the length of the sequence and of the window, and the cost
of a window.

    python benchmarks/windows.py
    python benchmarks/windows.py --lengths 100 1000 --windows 10

Memory: the peak of a fresh process beyond what it held after its first window, with one sequence of
so many steps from start to end; ``exact`` is full backpropagation through time by the same code,
which keeps every window. An embedding of 64, LSTM 128 and head, batch 32, float32, one thread.

Cost: a window of T steps of the same model, next to hand-written truncated backpropagation through
time and a hand-written loop with a linear synthesizer. Both must give the same weights as the
library: checked first.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.recurrent import ThroughTime, decouple_through_time
from probe import capacity, describe_environment, interleave

SYMBOLS, EMBEDDING, WIDTH, BATCH = 50, 64, 128, 32
CHECKED, LEARNING_RATE, FACTOR = 12, 1e-3, 0.1
LONGEST_EXACT = 3000  # steps that full backpropagation through time is asked for
MAKE = partial(torch.optim.Adam, lr=LEARNING_RATE)


class Network(nn.Module):
    """Characters to logits; the state stays inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        self.core = nn.LSTM(EMBEDDING, WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """``(time, batch)`` to ``(time, batch, symbols)``."""
        return self.head(self.core(self.embedding(x))[0])


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def draw(steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random characters and targets."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(SYMBOLS, (2, steps, BATCH), generator=generator)
    return both[0], both[1]


def library(model: nn.Module, window: int, gradients: str) -> ThroughTime:
    """The model through time; comparisons are left out, as by hand."""
    return decouple_through_time(
        model,
        window,
        loss=loss,
        optimizer=MAKE,
        synthesizer_optimizer=MAKE,
        gradients=gradients,
        factor=FACTOR,
        metrics_every=10**9,
    )


# ---- memory --------------------------------------------------------------------------------------


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(window: int, length: int, gradients: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = library(Network(), window, gradients)
    x, y = draw(window)
    for done in (False, True, False, True):  # every graph, optimizer and buffer there is
        made.step(x, done=done, target=y)
    before = peak()
    for k in range(length // window):
        x, y = draw(window, k)
        made.step(x, done=k == length // window - 1, target=y)
    pipe.send(peak() - before)


def memory(window: int, length: int, gradients: str) -> float:
    """MB by which a fresh process grows."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_measure, args=(window, length, gradients, sender))
    worker.start()
    sender.close()
    found: float = receiver.recv()
    worker.join()
    return found


def kept(window: int, gradients: str) -> float:
    """MB that autograd keeps for the backward passes of one window, parameters aside; every storage
    counts once.
    """
    model = Network()
    made = library(model, window, gradients)
    x, y = draw(window)
    made.step(x, target=y)
    known = {p.untyped_storage().data_ptr() for p in made.decoupled.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            found[place] = tensor.detach()
        return tensor.detach()  # an output itself would hold its node

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.step(x, target=y)
    return sum(t.untyped_storage().nbytes() for t in found.values()) / 1e6


# ---- cost ----------------------------------------------------------------------------------------


class ByHand:
    """Truncated backpropagation through time as a careful person writes it; ``linear``: with a
    synthesizer.

    The synthesizer is the library's linear one written out: targets in units of their running size,
    start at zero.
    """

    def __init__(self, model: Network, linear: bool) -> None:
        self.model, self.optimizer = model, MAKE(model.parameters())
        self.state: Any = None
        self.linear = nn.Linear(2 * WIDTH, 2 * WIDTH) if linear else None
        self.scale, self.count = torch.zeros(()), 0
        self.guess: Tensor | None = None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            self.learner = MAKE(self.linear.parameters())

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """One window."""
        self.optimizer.zero_grad()
        state = self.state
        if state is not None:
            state = tuple(s.detach().requires_grad_(self.linear is not None) for s in state)
        hidden, self.state = self.model.core(self.model.embedding(x), state)
        value = loss(self.model.head(hidden), y)
        if self.linear is None:
            value.backward()
            self.optimizer.step()
            return
        joined = torch.cat([s.detach()[0] for s in self.state], 1)
        guess = self.linear(joined)
        used = (guess.detach() * self.scale * FACTOR).split(WIDTH, 1)
        torch.autograd.backward(
            [*self.state, value], [*(g[None] for g in used), torch.ones_like(value)]
        )
        if self.guess is not None:
            target = torch.cat([s.grad[0] for s in state], 1)
            self.learn(target)
        self.optimizer.step()
        if self.guess is not None:
            self.learner.step()
            self.learner.zero_grad()
        # Its weights move before its target comes, but an affine map needs only its input to be
        # learnt from.
        self.guess = guess

    def learn(self, target: Tensor) -> None:
        """Regress the last guess to what arrived."""
        square = target.square().mean()
        if square > 0:
            self.count = min(self.count + 1, 100)
            self.scale = (self.scale.square() + (square - self.scale.square()) / self.count).sqrt()
        wanted = target / self.scale if self.scale > 0 else target
        assert self.guess is not None
        F.mse_loss(self.guess, wanted).backward()


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    """Between the weights, over their largest."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return max(float((p - q).detach().abs().max() / q.detach().abs().max()) for p, q in pairs)


def check(start: Network, window: int) -> str:
    """Train by hand and by the library.

    Raises:
        SystemExit: the weights differ.
    """
    lines = []
    for gradients, allowed in (("zero", 0.0), ("linear", 1e-4)):
        by_hand = ByHand(copy.deepcopy(start), linear=gradients == "linear")
        made = library(copy.deepcopy(start), window, gradients)
        for k in range(CHECKED):
            x, y = draw(window, k)
            by_hand(x, y)
            made.step(x, target=y)
        difference = largest_difference(made.model, by_hand.model)
        if difference > allowed:
            raise SystemExit(
                f"{gradients}: weights differ by {difference:.2g} after {CHECKED} windows"
            )
        lines.append(
            f"{gradients} by hand and by dni_fx differ by {difference:.2g} after {CHECKED} windows"
        )
    return "; ".join(lines)


def cost(window: int, rounds: int, calls: int) -> list[str]:
    """Rows of the second table."""
    torch.manual_seed(0)
    start = Network()
    print(f"T = {window}: {check(start, window)}")
    x, y = draw(window)
    steps: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "truncated BPTT by hand": ByHand(copy.deepcopy(start), linear=False),
        "linear synthesizer by hand": ByHand(copy.deepcopy(start), linear=True),
    }
    for gradients in ("zero", "linear", "auto"):
        made = library(copy.deepcopy(start), window, gradients)
        steps[f"dni_fx, {gradients}"] = lambda x, y, made=made: made.step(x, target=y)
    timings = interleave(
        {n: partial(s, x, y) for n, s in steps.items()}, rounds=rounds, calls=calls, warmup=5
    )
    bptt, linear = (
        timings["truncated BPTT by hand"].best,
        timings["linear synthesizer by hand"].best,
    )
    return [
        f"| {window} | {name} | {t.best * 1e3:.2f} | {t.best / bptt:.2f} | {t.best / linear:.2f} |"
        for name, t in timings.items()
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="steps in all"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[5, 20, 80], help="T")
    parser.add_argument("--rounds", type=int, default=30, help="turns that each variant gets")
    parser.add_argument("--calls", type=int, default=3, help="windows in one turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_environment()}; {capacity()}\n")
    window = arguments.windows[len(arguments.windows) // 2]
    print(
        f"| steps in the sequence, T = {window} | DNI: peak grows by, MB | full BPTT: peak grows "
        "by, MB |"
    )
    print("| ---: | ---: | ---: |")
    for length in arguments.lengths:
        full = f"{memory(window, length, 'exact'):.1f}" if length <= LONGEST_EXACT else "-"
        print(f"| {length:,} | {memory(window, length, 'auto'):.1f} | {full} |", flush=True)
    print("\n| T | DNI: kept for backward, MB | truncated BPTT: the same |\n| ---: | ---: | ---: |")
    for window in arguments.windows:
        print(f"| {window} | {kept(window, 'auto'):.2f} | {kept(window, 'zero'):.2f} |")
    print()
    rows = [
        row
        for window in arguments.windows
        for row in cost(window, arguments.rounds, arguments.calls)
    ]
    print("\n| T | window | min, ms | x truncated BPTT by hand | x linear by hand |")
    print("| ---: | --- | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
