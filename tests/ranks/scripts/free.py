"""Ranks that run free end, and drop what they may."""

from __future__ import annotations

import random
import time
from typing import Any

import torch.distributed as dist

from dni_fx.schedules import Calibration, RandomUpdates, WarmUp
from dni_fx.sources import SOURCES

from ...helpers.training import batch
from .. import kit
from ..kit import fails, train, trainer_of, weights


def free(gradients: str, **options: Any) -> None:
    trainer = train(trainer_of(gradients, queue=2, **options), 15)
    for worker in trainer.process.workers.values():
        assert worker.learner.updates >= 15, (
            f"{gradients}: {worker.name} made {worker.learner.updates} updates in 15 steps"
        )
        worker.desk.check()
        assert worker.desk.is_idle
    found = weights(trainer)
    assert all(bool(t.isfinite().all()) for t in found.values())


def free_running() -> None:
    for gradients in SOURCES:
        if gradients != "conv":  # for values with space
            free(gradients)
    for gradients in ("zero", "stale", "joint:linear", "each:linear"):
        free(gradients, placement=[0, 1, 0, 1])


def free_running_on_synthetic_inputs() -> None:
    for gradients in ("linear", "critic", "delayed", "mix", "feedback", "each:linear"):
        free(gradients, inputs="mlp")
        free(gradients, inputs="mlp", placement=[0, 1, 0, 1])


def free_running_with_schedules() -> None:
    for inputs in (None, "mlp"):
        for schedule in (Calibration(every=4), WarmUp(3), RandomUpdates(0.5)):
            trainer = train(trainer_of("linear", queue=1, inputs=inputs, schedule=schedule), 15)
            trainer.close()


def dropping() -> None:
    """A rank that sleeps now and then leaves out what it cannot take; one that stands still holds
    nobody back.
    """
    cases: list[tuple[str | None, int, list[int] | None]]
    cases = [
        ("mlp", 100, None),
        (None, 100, None),
        (None, 100, [0, 1, 0, 1]),
        ("mlp", 60, [1, 0, 0, 1]),
    ]
    store = dist.distributed_c10d._get_default_store()
    for inputs, whole, placement in cases:
        steps = whole // kit.SHORTER
        for gradients in ("linear", "critic") if inputs else ("linear", "delayed", "each:linear"):
            trainer = trainer_of(
                gradients, policy="drop_oldest", queue=2, inputs=inputs, placement=placement
            )
            asleep, key = random.Random(1), f"{gradients} {inputs} {placement}"
            for step in range(steps):
                x, y = batch(step)
                trainer.step(x, target=y)
                if dist.get_rank() == 1 and asleep.random() < 0.2:
                    time.sleep(0.01)
                if dist.get_rank() == 1 and step == steps * 2 // 5 and placement is None:
                    store.wait([key])
            workers = trainer.process.workers.values()
            if dist.get_rank() == 0 and placement is None:
                assert gradients == "delayed" or all(w.learner.updates == steps for w in workers)
                store.set(key, "made all steps")
            if gradients != "delayed":
                assert all(w.learner.updates + w.missed == steps for w in workers)
            trainer.drain()
            for worker in workers:
                worker.desk.check()
                assert worker.desk.is_idle
            trainer.close()


def waiting_while_dropping() -> None:
    for gradients, schedule in (
        ("mix", "sequential"),
        ("feedback", "sequential"),
        ("linear", Calibration(every=1)),
    ):
        trainer = trainer_of(gradients, policy="drop_oldest", schedule=schedule)
        fails("pass policy='wait'", lambda trainer=trainer: train(trainer, 1))  # type: ignore[misc]


def four_ranks_run_free() -> None:
    free("linear", inputs=None)
    free("delayed", placement=[3, 1, 0, 2])
    free("feedback", inputs="mlp")


TWO = [
    free_running,
    free_running_on_synthetic_inputs,
    free_running_with_schedules,
    dropping,
    waiting_while_dropping,
]


FOUR = [four_ranks_run_free]
