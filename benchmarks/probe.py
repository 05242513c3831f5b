"""What this machine can do while a benchmark runs, and timing that survives a noisy one.

A shared or throttled machine makes any single number meaningless, so every benchmark here prints
the result of `capacity` beside its own, takes its variants in turn (`interleave`) and reports the
least disturbed round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

SECONDS = 1.0
"""How long one probe runs."""


@dataclass(frozen=True)
class Capacity:
    """How much work one process does alone, and two at once.

    Attributes:
        alone: matrix products per second of one process.
        together: the sum over two processes running at the same time.
    """

    alone: float
    together: float

    @property
    def cores(self) -> float:
        """Work of two processes at once over work of one alone: 2 means two free cores, 1 means
        one.
        """
        return self.together / self.alone

    def __str__(self) -> str:
        one = f"the work of one alone ({self.alone:.0f} products/s)"
        return f"two processes at once do {self.cores:.2f} x {one}"


def _work(start: float, seconds: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    matrix = torch.full((256, 256), 1e-3)
    matrix @ matrix
    time.sleep(max(0.0, start - time.monotonic()))
    begin, count = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        matrix @ matrix
        count += 1
    pipe.send(count / (time.monotonic() - begin))


def _throughput(processes: int, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    start = time.monotonic() + 6.0  # importing torch takes a few seconds; all begin together
    pipes, workers = [], []
    for _ in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(start, seconds, sender))
        worker.start()
        sender.close()
        pipes.append(receiver)
        workers.append(worker)
    rates = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    return sum(rates)


def capacity(seconds: float = SECONDS) -> Capacity:
    """Measure the machine: single-threaded matrix products in one process, then in two at once.

    Args:
        seconds: length of each of the two measurements, in seconds.
    """
    return Capacity(alone=_throughput(1, seconds), together=_throughput(2, seconds))


def environment() -> dict[str, str]:
    """Versions and processor counts that a reader needs to repeat a measurement; names no path and
    no host.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def describe_environment() -> str:
    """`environment` as one line."""
    return ", ".join(f"{key} {value}" for key, value in environment().items())


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry a round."""

    rounds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least disturbed round, in seconds."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.rounds)


def interleave(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Time several variants in turn, so that a slow moment of the machine hits all of them alike.

    Every second round takes them in reverse order.

    Args:
        variants: what to time, by name; each is called with no argument.
        rounds: how often each variant gets its turn.
        calls: calls in one turn; the turn's time is divided by it.
        warmup: calls of each variant before the first round.

    Returns:
        A `Timing` per variant, in seconds per call.
    """
    for call in variants.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        order = list(variants.items())
        for name, call in reversed(order) if index % 2 else order:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - begin) / calls)
    return {name: Timing(tuple(values)) for name, values in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print what this machine can do.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each measurement")
    print(describe_environment())
    print(capacity(parser.parse_args().seconds))
