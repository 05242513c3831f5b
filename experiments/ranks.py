"""What the distributed experiments share: their options, the process group, and what they print and
save.

A script runs on the processes that torchrun starts, or in one process alone; nothing else in it
depends on that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dni_fx import distributed

CONTROLS = (
    "zero",
    "stale",
    "exact",
)  # no gradient crosses a cut; the last batch's; backpropagation, locked


def options(
    text: str, *, steps: int, batch: int, every: int, stages: int, most: int, source: str = "linear"
) -> argparse.ArgumentParser:
    """A parser with the options of every distributed example.

    Args:
        text: what the example does.
        steps, batch, every, stages, source: defaults.
        most: the largest number of stages.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help=f"(default: {steps})")
    parser.add_argument("--batch", type=int, default=batch, help=f"(default: {batch})")
    parser.add_argument(
        "--source", default=source, help=f"of gradients, see the README (default: {source})"
    )
    parser.add_argument(
        "--compare", action="store_true", help=f"train with {', '.join(CONTROLS)} as well"
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    number = f"(2 to {most}; default: {stages}, or as many as processes)"
    parser.add_argument(
        "--stages",
        type=int,
        choices=range(2, most + 1),
        default=max(stages, processes),
        metavar="N",
        help=number,
    )
    parser.add_argument(
        "--staleness", type=int, help="steps until answers are learnt from (default: as they come)"
    )
    parser.add_argument(
        "--policy", choices=("wait", "drop_oldest"), default="wait", help="at a full queue"
    )
    parser.add_argument(
        "--queue", type=int, default=4, help="values under way between two stages (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="save there, and go on from there"
    )
    parser.add_argument(
        "--every", type=int, default=every, help=f"steps between measurements (default: {every})"
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="what every stage did when, for chrome://tracing",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked."""
    args = parser.parse_args()
    if min(args.steps, args.batch, args.every) < 1:
        parser.error("--steps, --batch and --every must be at least 1")
    args.methods = list(dict.fromkeys([args.source, *(CONTROLS if args.compare else ())]))
    return args


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """The process group where torchrun has started this process, else none. Gives the number of
    processes.
    """
    torch.set_num_threads(1)  # as many processes as cores
    distributed.start()
    if not dist.is_initialized():
        yield 1
        return
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def common_store() -> dist.Store:
    """Where processes leave a word for each other without waiting."""
    return dist.distributed_c10d._get_default_store()


def flow(args: argparse.Namespace) -> dict[str, Any]:
    """How far stages may drift apart, as options of the trainer."""
    return {"queue": args.queue, "policy": args.policy, "staleness": args.staleness}


def say(*words: object) -> None:
    """Print in the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


def folder(args: argparse.Namespace, method: str) -> Path | None:
    """Where a method's checkpoints are."""
    return args.checkpoint / method.replace(":", "-") if args.checkpoint else None


def finish(trainer: distributed.Trainer, args: argparse.Namespace, method: str) -> None:
    """Say what the stages did, and write their timeline; in every process."""
    say(trainer.status(everywhere=True))
    if args.timeline:
        path = args.timeline
        if args.compare:
            path = path.with_stem(f"{path.stem}-{method.replace(':', '-')}")
        trainer.save_timeline(path)
        say(f"timeline: {path}")
