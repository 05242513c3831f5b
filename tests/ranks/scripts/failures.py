"""What becomes of the others when a process fails; started without torchrun, which would end them
itself.

    python -m tests.ranks.scripts.failures OUT CASE...

Each case has two processes of its own, forked from this one, and a time limit. OUT gets, for each,
exit codes and output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...helpers.training import batch
from ...models.small import TOWERS
from ..kit import train, trainer_of
from . import forked

LIMIT = 40.0  # seconds after which what is left hangs
TIMEOUT = 3.0


def paced(**options: Any) -> None:
    """Many steps; the parent is told when they are under way."""
    trainer = trainer_of(timeout=TIMEOUT, **options)
    for step in range(3000):
        if step == 30:
            os.write(forked.told, b"1")
        x, y = batch(step)
        trainer.step(x, target=y)
        time.sleep(0.01)
    trainer.close()


def raising_outside(rank: int, who: int) -> None:
    trainer = trainer_of(timeout=TIMEOUT)
    for step in range(40):
        if rank == who and step == 10:
            raise ValueError("the loader broke")
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.close()


def raising_in_with(rank: int, who: int) -> None:
    with trainer_of(timeout=TIMEOUT) as trainer:
        for step in range(40):
            if rank == who and step == 10:
                raise ValueError("the loader broke")
            x, y = batch(step)
            trainer.step(x, target=y)


def raising_inside(rank: int, who: int) -> None:
    model, calls = TOWERS.build(), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12 and rank == who:
            raise RuntimeError("a module broke")

    model.get_submodule("b" if who == 0 else "d").register_forward_pre_hook(fail)
    train(trainer_of(model=model, timeout=TIMEOUT), 40).close()


def not_finite(rank: int, who: int) -> None:
    trainer = trainer_of(timeout=TIMEOUT)
    for step in range(40):
        x, y = batch(step)
        trainer.step(x * float("nan") if step == 10 and rank == who else x, target=y)
    trainer.close()


def fewer_steps(rank: int, who: int) -> None:
    train(trainer_of(timeout=TIMEOUT), 20 if rank == who else 30).close()


CASES: dict[str, tuple[Callable[[int, int], None], signal.Signals | None]] = {
    "raising_outside": (raising_outside, None),
    "raising_in_with": (raising_in_with, None),
    "raising_inside": (raising_inside, None),
    "not_finite": (not_finite, None),
    "fewer_steps": (fewer_steps, None),
    "killed": (lambda rank, who: paced(), signal.SIGKILL),
    "killed_sharing": (
        lambda rank, who: paced(placement=[0, [0, 1], 1, 1], staleness=0),
        signal.SIGKILL,
    ),
    "stopped": (lambda rank, who: paced(), signal.SIGSTOP),
    "stopped_of_three": (lambda rank, who: paced(), signal.SIGSTOP),
    "stopped_free": (lambda rank, who: paced(policy="drop_oldest", inputs="mlp"), signal.SIGSTOP),
    "stopped_sharing": (
        lambda rank, who: paced(placement=[0, [0, 1], 1, 1], staleness=0),
        signal.SIGSTOP,
    ),
}


def run(name: str, who: int) -> dict[str, Any]:
    """Ranks, one of which fails: exit codes (None: it hung, or was stopped) and outputs."""
    case, how = CASES[name]
    world = 3 if name.endswith("three") else 2
    with forked.Ranks(lambda rank: case(rank, who), world) as started:
        if how is not None:
            started.wait_ready(LIMIT)
            os.kill(started.pids[who], how)
        started.wait(LIMIT, [r for r in range(world) if how != signal.SIGSTOP or r != who])
        return {"codes": list(started.codes), "outputs": started.outputs()}


if __name__ == "__main__":
    results = {}
    for each in sys.argv[2:]:
        case, number = each.rsplit("-", 1)
        results[each] = run(case, int(number))
        Path(sys.argv[1], "failures.json").write_text(json.dumps(results))
