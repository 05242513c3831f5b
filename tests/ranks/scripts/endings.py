"""The ways in which a script with trainers ends, each with the exit codes that its ranks must have.

    python -m tests.ranks.scripts.endings OUT

Whatever the way, no thread of a trainer may be left when the interpreter ends: it would abort.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...helpers.training import batch
from ...models.small import TOWERS
from .. import kit
from ..kit import fails, train, trainer_of
from . import forked, ranks

LIMIT = 150.0  # seconds after which what is left hangs
kept: list[Any] = []  # trainers that are there when the interpreter ends
FOUR = ["dropping", "waiting_while_dropping", "whole_model", "evaluating_between_steps"]


def threads() -> list[str]:
    """Those of trainers that are at work here."""
    return [t.name for t in threading.enumerate() if t.name.startswith("dni_fx")]


def failed() -> Any:
    """A trainer whose first step has failed in every process, and that is not closed."""
    trainer = trainer_of("mix", policy="drop_oldest")
    fails("pass policy='wait'", lambda: train(trainer, 1))
    return trainer


def trained(**options: Any) -> Any:
    """A trainer at work, in every process: one that ended earlier would end the others' work."""
    trainer = train(trainer_of(**options), 3)
    assert len(threads()) == 3, threads()  # the control: to, from, and the pulse
    dist.barrier()
    return trainer


def closed(rank: int) -> None:
    trained().close()
    assert not threads()


def in_with(rank: int) -> None:
    with trainer_of() as trainer:
        train(trainer, 3)
    assert not threads()


def unclosed(rank: int) -> None:
    kept.append(trained())


def unclosed_without_a_group(rank: int) -> None:
    kept.append(trained())
    dist.destroy_process_group()


def dropped(rank: int) -> None:
    """Its threads end by themselves, as soon as they see that nobody holds the trainer."""
    trained(timeout=4.0)
    gc.collect()
    until = time.monotonic() + 30
    while threads() and time.monotonic() < until:
        time.sleep(0.05)
    assert not threads()


def dropped_at_the_end(rank: int) -> None:
    trained()
    gc.collect()


def failed_and_caught(rank: int) -> None:
    """As in ``waiting_while_dropping``, whose pulses once beat on until the interpreter ended."""
    kept.extend(failed() for _ in range(3))
    assert not threads(), threads()
    trained().close()


def raises(rank: int) -> None:
    trained()
    raise ValueError("the loader broke")


def raises_in_a_module(rank: int) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a module broke")

    model = TOWERS.build()
    trainer = trained(model=model)
    for layer in (model.b, model.d):  # one is on each rank
        layer.register_forward_pre_hook(fail)
    train(trainer, 3)


def exits(rank: int) -> None:
    trained()
    sys.exit(3)


def one_leaves(rank: int) -> None:
    """Rank 0 returns, rank 1 goes on and is told."""
    trainer = trainer_of()
    for step in range(3 if rank == 0 else 3000):
        x, y = batch(step)
        trainer.step(x, target=y)


def several(rank: int) -> None:
    """A trainer of each kind in one process."""
    closed(rank)
    failed()
    in_with(rank)
    unclosed(rank)


def four_cases(rank: int) -> None:
    """Those of ``ranks.py`` after which a start in ten aborted."""
    kit.SHORTER = 4
    results = ranks.run(FOUR)
    errors = {name: error for name, (error, _) in results.items() if error}
    assert not errors, errors


def control(rank: int) -> None:
    """What must not be: a thread that waits in torch when the interpreter ends. Aborts."""
    store = dist.distributed_c10d._get_default_store().clone()

    def ask() -> None:
        while True:
            store.add("key", 1)

    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.2)


CASES: dict[Callable[[int], None], tuple[int, int]] = {
    closed: (0, 0), in_with: (0, 0), unclosed: (0, 0), unclosed_without_a_group: (0, 0),
    dropped: (0, 0), dropped_at_the_end: (0, 0), failed_and_caught: (0, 0), raises: (1, 1),
    raises_in_a_module: (1, 1), exits: (3, 3), one_leaves: (0, 1), several: (0, 0),
    four_cases: (0, 0), control: (-6, -6),
}  # fmt: skip
BY_NAME = {case.__name__: case for case in CASES}
SHORT = [name for name in BY_NAME if name not in ("four_cases", "control")]


class Start:
    """Two ranks that end in one way.

    Args:
        name: of the case.
        folder: for what the ranks write.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.began = name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        kit.OUT = folder
        self.ranks = forked.Ranks(BY_NAME[name], group=name != "four_cases")

    def is_over(self) -> bool:
        """Whether both ranks have ended, or hang."""
        return self.ranks.ended() or time.monotonic() - self.began > LIMIT

    def result(self) -> tuple[list[int | None], list[str], int]:
        """Exit codes (None: it hung), outputs, processes left over; ends the ranks."""
        with self.ranks:
            codes, outputs = list(self.ranks.codes), self.ranks.outputs()
        return codes, outputs, self.ranks.orphans()


if __name__ == "__main__":
    found = {}
    for each in (*SHORT, "control"):
        started = Start(each, Path(sys.argv[1], each))
        while not started.is_over():
            time.sleep(0.02)
        found[each] = (*started.result(), CASES[BY_NAME[each]])
        Path(sys.argv[1], "endings.json").write_text(json.dumps(found))
