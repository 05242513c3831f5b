"""Decoupled stages on several processes against one process, pipelines and data parallelism.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --train 600
    python benchmarks/netns.py --delay 50ms -- python benchmarks/parallel.py --micro 4 8 --chunks 3

Same model, batch, optimiser and text for all; see `pipelines.py` for the locked methods. Prints the
capacity probe, steps/s, what the slowest stage would do with nobody beside it, and with ``--train``
the time to equal held-out loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dni_fx
import pipelines
from dni_fx import distributed, sources
from language import VOCABULARY, Work, adam, loss_of
from pipelines import (
    Method,
    Point,
    best_counts,
    capacity,
    leave,
    make,
    make_all,
    measure,
    say,
    start,
    table,
    train,
)
from probe import describe_environment, environment

DNI = "dni_fx"
SOURCES: dict[str, Any] = {
    "linear": "linear",
    "mlp": "mlp",
    "local": "local",
    "distill": "distill",
    "critic": "critic",
    "delayed": functools.partial(sources.Delayed, recompute=False),
    "delayed, recomputed": "delayed",
    "corrected linear": functools.partial(sources.Corrected, source="linear", recompute=False),
    "corrected local": functools.partial(sources.Corrected, source="local", recompute=False),
    "zero": "zero",
    "exact": "exact",
}


class Decoupled(Method):
    """Stages of equal numbers of blocks, one a rank, each trained beside the others.

    Args:
        source: a name of `SOURCES`.
        queue: how far a stage may run ahead.
        first: blocks on the first of two ranks; by default equal numbers everywhere.
    """

    def __init__(self, source: str, work: Work, queue: int = 4, first: int | None = None) -> None:
        super().__init__(f"{DNI}, {source}", work, 1)
        world = dist.get_world_size()
        borders = [first] if first else [work.depth * s // world for s in range(1, world)]
        self.source, self.queue, self.first = source, queue, first
        self.decoupled = dni_fx.decouple(
            self.whole,
            [f"blocks.{border - 1}" for border in borders],
            example_inputs=work.batch_at(0)[:1],
            gradients=SOURCES[source],
            context=dni_fx.one_hot(VOCABULARY, positions=1),
            check=False,
        )
        self.owner = {
            name: min(s.index for s in self.decoupled.stages if name in dict(s.named_parameters()))
            for name in self.owner
        }
        self.trainer = self._fresh()

    def _fresh(self) -> distributed.Trainer:
        return distributed.Trainer(
            self.decoupled,
            loss_of,
            optimizer=lambda named: adam(p for _, p in named),
            synthesizer_optimizer=torch.optim.Adam,
            queue=self.queue,
            metrics_every=10**9,
        )

    def step(self, t: int) -> Tensor | None:
        """See `Method.step`."""
        x, y = self.work.batch_at(t)
        loss = self.trainer.step(x, target=y).loss
        return None if loss.isnan() else loss

    def settle(self) -> None:
        """Answers that are on their way are part of the work."""
        self.trainer.drain()

    def warm_up(self) -> None:
        """See `Method.warm_up`; sources and optimisers are forgotten, too."""
        before = {
            n: t.clone() for n, t in self.decoupled.state_dict().items() if isinstance(t, Tensor)
        }
        self.step(0)
        self.settle()
        self.trainer.close()
        self.decoupled.load_state_dict(before, strict=False)
        for parameter in self.decoupled.parameters():
            parameter.grad = None
        self.trainer = self._fresh()


def alone(method: Decoupled, steps: int) -> list[float]:
    """Steps/s of every stage with the other ranks at rest: forward, sources, backward, regression,
    updates.
    """
    rates = []
    decoupled, (x, y) = method.decoupled, method.work.batch_at(0)
    values: dict[str, Any] = dict(decoupled.bind(x))
    context = decoupled.context(y) if decoupled.context else None
    for stage in decoupled.stages:
        dist.barrier()
        begin, inputs = time.perf_counter(), {n: values[n] for n in stage.inputs}
        if stage.index == dist.get_rank():
            optimizer = adam(stage.parameters())
            learners = [
                p for _, s in decoupled.named_learners([stage.index]) for p in s.parameters()
            ]
            second = torch.optim.Adam(learners) if learners else None
            for count in range(steps + 2):
                begin = time.perf_counter() if count == 2 else begin
                optimizer.zero_grad()
                result = stage.step(inputs, context, loss_of, y)
                targets = {
                    n: torch.ones_like(v) for n, v in result.outputs.items() if n != "output"
                }
                if second is not None:
                    second.zero_grad()
                    stage.fit(result.predictions, targets)
                    second.step()
                optimizer.step()
        rate = torch.tensor(
            steps / (time.perf_counter() - begin) if stage.index == dist.get_rank() else 0.0
        )
        dist.all_reduce(rate)
        rates.append(float(rate))
        with torch.no_grad():
            found = stage.module(*inputs.values())
        values |= dict(
            zip(stage.outputs, found if isinstance(found, tuple) else (found,), strict=True)
        )
    return rates


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sources", nargs="+", choices=SOURCES, default=["linear", "local", "delayed", "exact"]
    )
    parser.add_argument("--methods", nargs="*", choices=pipelines.NAMES, default=pipelines.NAMES)
    parser.add_argument(
        "--micro", type=int, nargs="+", default=pipelines.COUNTS, help="micro-batches to try"
    )
    parser.add_argument("--queue", type=int, default=4, help="how far a stage may run ahead")
    parser.add_argument(
        "--first", type=int, help="blocks on the first of two ranks; by default half"
    )
    for name, value in (("depth", 8), ("width", 128), ("heads", 4), ("length", 32), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=20, help="steps in one turn of a method")
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
    """Measure and print."""
    arguments = parse()
    start()
    sizes = {
        name: getattr(arguments, name) for name in ("depth", "width", "heads", "length", "batch")
    }
    work = Work(**sizes, characters=Work.read(arguments.text))
    count = sum(p.numel() for p in work.model().parameters())
    text = hashlib.sha256(bytes(work.characters.tolist())).hexdigest()[:12]
    say(
        f"{describe_environment()}, {dist.get_world_size()} ranks; {sizes}, {count:,} parameters, "
        f"text {text}"
    )
    ours = [Decoupled(s, work, arguments.queue, arguments.first) for s in arguments.sources]
    locked = make_all(arguments.methods, work, arguments.micro, not arguments.late)
    before = capacity()
    methods = [*locked, *ours]
    timings = measure(methods, arguments.steps, arguments.chunks)
    after = capacity()
    for when, (_, together) in (("before", before), ("after", after)):
        say(f"capacity {when}: all ranks together do {together:.2f} x the work of one alone")
    say("\n" + table(methods, timings) + "\n")
    best = best_counts(methods, timings)
    pipeline = [(n, t) for n, (_, t) in best.items() if n in pipelines.SCHEDULES]
    for method in ours:
        rate = 1 / best[method.name][1].median
        parts = []
        if (
            method.source not in ("exact", "delayed", "delayed, recomputed")
            and "corrected" not in method.source
        ):
            rates = alone(method, arguments.steps)
            parts.append(
                f"{rate / min(rates):.2f} of what its slowest stage does alone ({min(rates):.2f} "
                "steps/s)"
            )
        if pipeline:
            name, timing = min(pipeline, key=lambda pair: pair[1].median)
            parts.append(f"{rate * timing.median:.2f} x the best pipeline schedule ({name})")
        say(f"{method.name}: {rate:.2f} steps/s; {'; '.join(parts)}")
        status = method.trainer.status(everywhere=True)
        say(str(status) + "\n")
    curves = compare_learning(arguments, work, best) if arguments.train else {}
    if arguments.json and dist.get_rank() == 0:
        report = {
            "environment": environment(),
            "ranks": dist.get_world_size(),
            "sizes": sizes | {"parameters": count, "steps": arguments.steps, "text": text},
            "capacity": [before[1], after[1]],
            "timings": [
                {"method": m.name, "micro": m.micro, "seconds a step": t.rounds}
                for m, t in zip(methods, timings, strict=True)
            ],
            "curves": {
                name: [dataclasses.asdict(point) for point in points]
                for name, points in curves.items()
            },
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for method in ours:
        method.trainer.close()
    leave()


def compare_learning(
    arguments: argparse.Namespace, work: Work, best: dict[str, Any]
) -> dict[str, list[Point]]:
    """Train every method for as many steps, and tell when each reached the losses that the worst of
    them ended at.
    """
    curves: dict[str, list[Point]] = {}
    makers: dict[str, Callable[[], Method]] = {}
    for name, (method, _) in best.items():
        if isinstance(method, Decoupled):
            makers[name] = functools.partial(
                Decoupled, method.source, work, arguments.queue, arguments.first
            )
        else:
            makers[name] = functools.partial(make, name, work, method.micro, not arguments.late)
    for name, fresh in makers.items():
        made = fresh()
        curves[name] = list(train(made, arguments.evaluate_every, steps=arguments.train))
        if isinstance(made, Decoupled):
            made.trainer.close()
        end = curves[name][-1]
        say(f"{name}: {end.steps} steps in {end.seconds:.1f} s, held-out loss {end.loss:.4f}")
    finals = sorted(points[-1].loss for points in curves.values())
    levels = [
        math.ceil(100 * finals[len(finals) // 2]) / 100 + extra for extra in (0.4, 0.2, 0.1, 0.0)
    ]
    say("\n| seconds to held-out loss | " + " | ".join(f"{level:.2f}" for level in levels) + " |")
    say("| --- |" + " ---: |" * len(levels))
    for name, points in curves.items():
        found = [pipelines.seconds_to(points, level) for level in levels]
        say(f"| {name} | " + " | ".join("-" if s is None else f"{s:.1f}" for s in found) + " |")
    return curves


if __name__ == "__main__":
    main()
