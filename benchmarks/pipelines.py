"""Locked training on several processes: what a decoupled run is compared with.

    torchrun --standalone --nproc-per-node 2 benchmarks/pipelines.py --check
    torchrun --standalone --nproc-per-node 2 benchmarks/pipelines.py --json out/pipelines.json

A causal transformer on characters of real text, trained with Adam by one process alone, by the
schedules of `torch.distributed.pipelining` and by data parallelism: equal seed, equal data, equal
mathematics, so equal losses and gradients, which ``--check`` verifies. Gloo, one thread a process.
Every method is measured with several numbers of micro-batches, in turns, by the same processes;
each is then judged by the number that suits it best.

One process and data parallelism accumulate gradients over micro-batches: small ones may be kinder
to a cache, and that must not look like a gain of pipelines.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

from early import EarlyStage
from language import LanguageModel, Work, adam, loss_of, part
from probe import Timing, describe_environment, environment

TOLERANCE, CHECKED_STEPS = 1e-4, 5
COUNTS = (1, 2, 4, 8, 16)

ONE, DATA = "one process", "DDP"
SCHEDULES: dict[str, tuple[type, str]] = {  # by name: its class and how stages lie on ranks
    "GPipe": (ScheduleGPipe, "one"),
    "1F1B": (Schedule1F1B, "one"),
    "interleaved 1F1B": (ScheduleInterleaved1F1B, "loop"),
    "interleaved zero bubble": (ScheduleInterleavedZeroBubble, "loop"),
    "ZBV": (ScheduleZBVZeroBubble, "V"),
}
NAMES = (ONE, *SCHEDULES, DATA)


# ---- methods -------------------------------------------------------------------------------------


class Method(ABC):
    """One way to train the model on all ranks; every rank makes it and calls its methods in the
    same order.

    Attributes:
        name: for tables.
        micro: number of micro-batches in a step.
        whole: this rank's copy of the model, trained in place where this rank owns it.
        owner: for every parameter of ``whole``, by name, the rank that trains it.
        optimizer: of this rank's parameters, where it has one.
    """

    def __init__(self, name: str, work: Work, micro: int) -> None:
        if work.batch % micro:
            raise ValueError(f"{work.batch} sequences do not make {micro} equal micro-batches")
        self.name, self.work, self.micro = name, work, micro
        self.whole = work.model()
        self.owner = dict.fromkeys((name for name, _ in self.whole.named_parameters()), 0)
        self.optimizer: torch.optim.Optimizer | None = None

    @abstractmethod
    def step(self, t: int) -> Tensor | None:
        """Train on batch ``t``: forward, backward, update. Returns the mean loss on ranks that know
        (a part of) it.
        """

    def settle(self) -> None:  # noqa: B027  (nothing is on its way after a locked step)
        """Wait for work of this rank that goes on after `step`, before a clock is stopped."""

    def gather(self) -> LanguageModel:
        """Bring every rank's weights into ``whole`` on all ranks, and return it."""
        parameters = dict(self.whole.named_parameters())
        with torch.no_grad():
            for rank in range(dist.get_world_size()):
                owned = [parameters[name] for name, owner in self.owner.items() if owner == rank]
                if not owned:
                    continue
                flat = torch.cat([parameter.flatten() for parameter in owned])
                dist.broadcast(flat, rank)
                if rank != dist.get_rank():
                    for parameter, piece in zip(
                        owned, flat.split([p.numel() for p in owned]), strict=True
                    ):
                        parameter.copy_(piece.view_as(parameter))
        return self.whole

    def warm_up(self) -> None:
        """Do once what only a first step does (connections, buffers), and forget what it learnt."""
        before = copy.deepcopy(self.whole.state_dict())
        self.step(0)
        self.settle()
        self.whole.load_state_dict(before)
        if self.optimizer is not None:
            self.optimizer.state.clear()


class Alone(Method):
    """Rank 0 does all of it, the others nothing."""

    def __init__(self, work: Work, micro: int = 1) -> None:
        super().__init__(ONE, work, micro)
        self.optimizer = adam(self.whole.parameters()) if dist.get_rank() == 0 else None

    def step(self, t: int) -> Tensor | None:
        """See `Method.step`; the loss is rank 0's."""
        if self.optimizer is None:
            return None
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in chunks_of(self.work.batch_at(t), self.micro):
            loss = loss_of(self.whole(x), y) / self.micro
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total


class DataParallel(Method):
    """`DistributedDataParallel`: an equal share of the batch for every rank, gradients averaged."""

    def __init__(self, work: Work, micro: int = 1) -> None:
        super().__init__(DATA, work, micro)
        if work.batch % (dist.get_world_size() * micro):
            raise ValueError(
                f"{work.batch} sequences cannot be shared out in {micro} equal micro-batches a rank"
            )
        self.optimizer = adam(self.whole.parameters())
        self.wrapped = DistributedDataParallel(self.whole)

    def step(self, t: int) -> Tensor | None:
        """See `Method.step`; each rank returns the loss of its share."""
        assert self.optimizer is not None
        share = chunks_of(self.work.batch_at(t), dist.get_world_size())[dist.get_rank()]
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for index, (x, y) in enumerate(chunks_of(share, self.micro)):
            with nullcontext() if index == self.micro - 1 else self.wrapped.no_sync():
                loss = loss_of(self.wrapped(x), y) / self.micro
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total


class Pipelined(Method):
    """A schedule of `torch.distributed.pipelining`, its stages made by hand from equal numbers of
    blocks.

    ``early``: receives as in `EarlyStage`; else the library's own stages as they are.
    """

    def __init__(self, name: str, work: Work, micro: int, early: bool = True) -> None:
        super().__init__(name, work, micro)
        schedule, placement = SCHEDULES[name]
        rank, world = dist.get_rank(), dist.get_world_size()
        count = world if placement == "one" else 2 * world
        if micro < 2 or work.depth < count:
            raise ValueError(f"{name} wants 2 micro-batches and {count} blocks at least")
        places = {
            "one": [*range(world)],
            "loop": [*range(world)] * 2,
            "V": [*range(world), *reversed(range(world))],
        }
        borders = [work.depth * s // count for s in range(count + 1)]
        parts = [part(self.whole, *borders[s : s + 2]) for s in range(count)]
        names = {id(parameter): name for name, parameter in self.whole.named_parameters()}
        self.owner = {
            names[id(p)]: places[placement][s] for s in range(count) for p in parts[s].parameters()
        }
        self.mine = [s for s in range(count) if places[placement][s] == rank]
        self.last = count - 1
        kind = EarlyStage if early else PipelineStage
        stages = [kind(parts[s], s, count, torch.device("cpu")) for s in self.mine]
        self.schedule = schedule(
            stages[0] if placement == "one" else stages, micro, loss_fn=loss_of
        )
        self.optimizer = adam(p for s in self.mine for p in parts[s].parameters())

    def step(self, t: int) -> Tensor | None:
        """See `Method.step`; the loss is known where the last stage is."""
        assert self.optimizer is not None
        losses: list[Tensor] = []
        x, y = self.work.batch_at(t)
        self.optimizer.zero_grad()
        self.schedule.step(
            *([x] if 0 in self.mine else []),
            target=y if self.last in self.mine else None,
            losses=losses,
            return_outputs=False,
        )
        self.optimizer.step()
        return torch.stack(losses).mean().detach() if losses else None


def chunks_of(batch: tuple[Tensor, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    """A batch in equal pieces."""
    return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))


def make(name: str, work: Work, micro: int, early: bool = True) -> Method:
    """A fresh method; ``early`` is for `Pipelined`.

    Raises:
        ValueError: it does not allow this number of micro-batches; on all ranks alike.
    """
    if name == ONE:
        return Alone(work, micro)
    return DataParallel(work, micro) if name == DATA else Pipelined(name, work, micro, early)


def make_all(
    names: Sequence[str], work: Work, counts: Sequence[int], early: bool = True
) -> list[Method]:
    """Every method with every number of micro-batches that it allows."""
    made = []
    for name in names:
        for micro in counts:
            try:
                made.append(make(name, work, micro, early))
            except ValueError:
                continue
    return made


# ---- measuring -----------------------------------------------------------------------------------


def start() -> None:
    """Join the other ranks, with one thread each."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def leave(code: int = 0) -> NoReturn:
    """End this rank, when all have come here.

    Without destructors: that of a gloo group, which `DistributedDataParallel` keeps alive, waits
    for the group's threads while it holds the interpreter's lock, for which such a thread may wait
    to free its last tensor.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(text: str) -> None:
    """Print, once for all ranks."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def capacity(seconds: float = 0.5) -> tuple[float, float]:
    """Matrix products per second of a rank that runs alone, and how many times as much all do
    together.

    The second number is what a perfect method could gain on this machine at this moment.
    """

    def rate() -> float:
        matrix, count, begin = torch.full((256, 256), 1e-3), 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            matrix @ matrix
            count += 1
        return count / (time.perf_counter() - begin)

    alone = 0.0
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            alone = rate()
    dist.barrier()
    sums = torch.tensor([alone, rate()], dtype=torch.float64)
    dist.all_reduce(sums)
    one = float(sums[0]) / dist.get_world_size()
    return one, float(sums[1]) / one


def shared(loss: Tensor | None) -> float:
    """The mean over the ranks that know a loss, on all ranks."""
    both = torch.tensor([0.0, 0.0] if loss is None else [float(loss), 1.0], dtype=torch.float64)
    dist.all_reduce(both)
    return float(both[0] / both[1])


def seconds_of(method: Method, first: int, steps: int) -> float:
    """Seconds until the slowest rank has done steps ``first`` to ``first + steps - 1``, all
    starting together.
    """
    dist.barrier()
    begin = time.perf_counter()
    for t in range(first, first + steps):
        method.step(t)
    method.settle()
    slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def measure(methods: Sequence[Method], steps: int, chunks: int, warmup: int = 2) -> list[Timing]:
    """Seconds a step, ``chunks`` times over ``steps`` steps, of all methods in turns: slow moments
    hit them alike.
    """
    for method in methods:
        seconds_of(method, 0, warmup)
    rounds: list[list[float]] = [[] for _ in methods]
    for chunk in range(chunks):
        order = range(len(methods))
        for index in reversed(order) if chunk % 2 else order:
            rounds[index].append(seconds_of(methods[index], warmup + chunk * steps, steps) / steps)
    return [Timing(tuple(times)) for times in rounds]


def best_counts(
    methods: Sequence[Method], timings: Sequence[Timing]
) -> dict[str, tuple[Method, Timing]]:
    """Of each name, the method with the smallest median."""
    best: dict[str, tuple[Method, Timing]] = {}
    for method, timing in zip(methods, timings, strict=True):
        if method.name not in best or timing.median < best[method.name][1].median:
            best[method.name] = method, timing
    return best


def evaluate(method: Method) -> float:
    """Held-out loss of the current weights, computed by rank 0, on all ranks."""
    whole = method.gather()
    if dist.get_rank() != 0:
        return shared(None)
    with torch.no_grad():
        losses = [float(loss_of(whole(x), y)) for x, y in method.work.held_out()]
    return shared(torch.tensor(statistics.fmean(losses)))


@dataclass(frozen=True)
class Point:
    """Of a curve: seconds and steps of training so far (evaluation not counted), and the held-out
    loss.
    """

    seconds: float
    steps: int
    loss: float


def train(
    method: Method, evaluate_every: int, *, seconds: float = math.inf, steps: float = math.inf
) -> Iterator[Point]:
    """Train a fresh method until it has had so many seconds or steps; every rank iterates and gets
    the same points.
    """
    method.warm_up()
    point = Point(0.0, 0, evaluate(method))
    yield point
    while point.seconds < seconds and point.steps < steps:
        spent = seconds_of(method, point.steps, evaluate_every)
        point = Point(point.seconds + spent, point.steps + evaluate_every, evaluate(method))
        yield point


def seconds_to(points: Iterable[Point], loss: float) -> float | None:
    """Seconds of training until the first point whose held-out loss is this low."""
    return next((point.seconds for point in points if point.loss <= loss), None)


# ---- command -------------------------------------------------------------------------------------


def gradient_norm(method: Method) -> float:
    """Of the last step, over the parameters of all ranks."""
    owned = [
        p for name, p in method.whole.named_parameters() if method.owner[name] == dist.get_rank()
    ]
    squares = torch.tensor(
        sum(float(p.grad.square().sum()) for p in owned if p.grad is not None), dtype=torch.float64
    )
    dist.all_reduce(squares)
    return math.sqrt(float(squares))


def check(methods: Sequence[Method], steps: int = CHECKED_STEPS) -> bool:
    """Whether every method has the losses of one process, in training and after it on held-out
    text; prints them.

    Adam hides the scale of gradients from losses, so their norm is compared too.
    """

    def run(method: Method) -> list[float]:
        return [
            *(shared(method.step(t)) for t in range(steps)),
            evaluate(method),
            gradient_norm(method),
        ]

    wanted = run(Alone(methods[0].work))
    *losses, held_out, norm = (f"{number:.6f}" for number in wanted)
    say(f"one process: losses {', '.join(losses)}, then held out {held_out}, gradient norm {norm}")
    right = True
    for method in methods:
        found = run(method)
        off = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
        right &= all(difference <= TOLERANCE for difference in off)  # a NaN is not
        say(f"{method.name}, m = {method.micro}: largest difference {max(off):.1e}")
    say(f"all within {TOLERANCE}" if right else f"NOT all within {TOLERANCE}")
    return right


def table(methods: Sequence[Method], timings: Sequence[Timing]) -> str:
    """Median steps/s by number of micro-batches, and the best of each method next to one
    process.
    """
    counts = sorted({method.micro for method in methods})
    medians = {
        (m.name, m.micro): f"{1 / t.median:.2f}" for m, t in zip(methods, timings, strict=True)
    }
    best = best_counts(methods, timings)
    one = best[ONE][1].median if ONE in best else math.nan
    heads = " | ".join(f"median, m = {m}" for m in counts)
    lines = [f"| steps/s | {heads} | best m | its median | its best | x one process |"]
    lines.append("| --- |" + " ---: |" * (len(counts) + 4))
    for name, (method, timing) in best.items():
        cells = " | ".join(medians.get((name, m), "-") for m in counts)
        rates = f"{1 / timing.median:.2f} | {1 / timing.best:.2f} | {one / timing.median:.2f}"
        lines.append(f"| {name} | {cells} | {method.micro} | {rates} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare losses with one process, and time nothing"
    )
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--micro", type=int, nargs="+", default=COUNTS, help="numbers of micro-batches to try"
    )
    for name, value in (("depth", 8), ("width", 128), ("heads", 4), ("length", 64), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=10, help="steps in one turn of a method")
    parser.add_argument("--chunks", type=int, default=5, help="turns of every method")
    parser.add_argument(
        "--train", type=int, default=0, help="then train each, at its best, for so many steps"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=50, help="steps between held-out losses"
    )
    parser.add_argument(
        "--late", action="store_true", help="pipelines post receives as late as the library does"
    )
    parser.add_argument("--text", type=Path, help="a file to learn instead of Python's own sources")
    parser.add_argument("--json", type=Path, help="write all timings and curves here")
    return parser.parse_args()


def main() -> None:
    """Check, or measure and print."""
    arguments = parse()
    start()
    sizes = {
        name: getattr(arguments, name) for name in ("depth", "width", "heads", "length", "batch")
    }
    work = Work(**sizes, characters=Work.read(arguments.text))
    text = hashlib.sha256(bytes(work.characters.tolist())).hexdigest()[:12]
    count = sum(p.numel() for p in work.model().parameters())
    say(f"{describe_environment()}, {dist.get_world_size()} ranks; {sizes}, {count:,} parameters")
    say(f"{len(work.characters):,} characters of text, sha256 {text}")
    methods = make_all(arguments.methods, work, arguments.micro, not arguments.late)
    if arguments.check:
        leave(0 if check(methods) else 1)

    found = [capacity()]
    timings = measure(methods, arguments.steps, arguments.chunks)
    found.append(capacity())
    for when, (alone, together) in zip(("before", "after"), found, strict=True):
        say(
            f"{when}: all ranks together do {together:.2f} x the work of one alone ({alone:.0f} "
            "products/s)"
        )
    say("\n" + table(methods, timings) + "\n")
    curves: dict[str, list[Point]] = {}
    for name, (method, _) in best_counts(methods, timings).items() if arguments.train else ():
        fresh = make(name, work, method.micro, not arguments.late)
        curves[name] = list(train(fresh, arguments.evaluate_every, steps=arguments.train))
        end = curves[name][-1]
        say(
            f"{name}, m = {method.micro}: {end.steps} steps in {end.seconds:.1f} s, held-out loss "
            f"{end.loss:.4f}"
        )
    if arguments.json and dist.get_rank() == 0:
        rows = [
            {"method": method.name, "micro": method.micro, "seconds a step": timing.rounds}
            for method, timing in zip(methods, timings, strict=True)
        ]
        report = {
            "environment": environment(),
            "ranks": dist.get_world_size(),
            "sizes": sizes | {"parameters": count, "steps": arguments.steps, "text": text},
            "capacity": [{"alone": alone, "together": together} for alone, together in found],
            "timings": rows,
            "curves": {
                name: [dataclasses.asdict(point) for point in points]
                for name, points in curves.items()
            },
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
