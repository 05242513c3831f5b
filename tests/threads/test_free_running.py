"""Threads that run free end, keep their bounds, and drop what they may."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from dni_fx.schedules import Calibration, RandomUpdates, Schedule, Threads, WarmUp
from dni_fx.sources import SOURCES

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, largest_difference, record
from ..models.small import SKIPS
from .kit import SECONDS, counts, fails_once, slow, stage_threads, train, trainer_of

FREE = [n for n in SOURCES if n != "conv"] + ["joint:linear", "each:linear"]


@pytest.mark.matrix
@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("gradients", FREE)
def test_free_running_ends(gradients: str, inputs: str | None) -> None:
    if gradients == "exact" and inputs:
        pytest.skip("exact gradients need real values")
    for where in ("a", "d"):
        trainer = trainer_of(Threads(queue=2), gradients, slow(where, 0.003), inputs)
        train(trainer, 12)
        updates = counts(trainer)
        assert min(updates) >= 12 if gradients == "corrected" else updates == [12] * 4
        assert trainer.threads is not None
        for worker in trainer.threads.workers.values():
            worker.desk.check()
            assert worker.desk.is_idle
        assert all(bool(p.isfinite().all()) for p in trainer.decoupled.parameters())
        trainer.close()


@pytest.mark.parametrize("then", [Calibration(every=4), WarmUp(3), RandomUpdates(0.5)], ids=str)
@pytest.mark.parametrize("inputs", [None, "mlp"])
def test_free_running_ends_with_any_schedule(inputs: str | None, then: Schedule) -> None:
    for where in ("a", "c"):
        train(trainer_of(Threads(queue=1, then=then), "linear", slow(where, 0.004), inputs), 12)


@pytest.mark.matrix
@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("gradients", [n for n in FREE if n not in ("exact", "mix", "feedback")])
def test_dropping_ends(gradients: str, inputs: str | None) -> None:
    """Whatever a slow stage leaves out, nobody waits for it for ever, and nothing stays under
    way.
    """
    for where in ("a", "d"):
        trainer = trainer_of(
            Threads(queue=2, policy="drop_oldest"), gradients, slow(where, 0.006), inputs
        )
        train(trainer, 15, pause=0.002)
        train(trainer, 3, 15)
        assert trainer.threads is not None
        for worker in trainer.threads.workers.values():
            worker.desk.check()
            assert worker.desk.is_idle
        trainer.close()


@pytest.mark.parametrize("inputs", [None, "mlp"])
def test_dropping_ends_where_stages_are_left_out(inputs: str | None) -> None:
    for where in ("a", "c"):
        schedule = Threads(queue=2, policy="drop_oldest", then=RandomUpdates(0.5))
        train(trainer_of(schedule, "linear", slow(where, 0.006), inputs), 20, pause=0.002)


@pytest.mark.parametrize(
    ("gradients", "then"),
    [
        ("mix", "sequential"),
        ("feedback", "sequential"),
        ("exact", "sequential"),
        ("linear", Calibration(every=2)),
        ("linear", WarmUp(3)),
        ("linear", WarmUp(0, fade=2)),
    ],
    ids=str,
)
def test_who_waits_within_a_step_cannot_be_left_out(gradients: str, then: str | Schedule) -> None:
    error = fails_once(trainer_of(Threads(policy="drop_oldest", then=then), gradients))
    assert "pass policy='wait'" in str(error)


@pytest.mark.parametrize("queue", [1, 3])
@pytest.mark.parametrize("where", ["b", "d"])
def test_the_queue_is_a_bound(queue: int, where: str) -> None:
    """What is under way is looked at from outside all the time."""
    trainer = trainer_of(Threads(queue=queue), model=slow(where, 0.004))
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            crew = trainer.threads
            for worker in crew.workers.values() if crew else ():
                desk = worker.desk
                under_way = [len(s) for s in list(desk.outbox.under_way.values())]
                seen.append(max([len(desk.ledger.pending), *under_way]))
                seen.append(len(crew.mail.boxes.get(("job", -1, worker.index), ())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(trainer, 20)
    over.set()
    watcher.join()
    assert len(seen) > 50
    assert 1 <= max(seen) <= queue + 1


def gated(name: str) -> tuple[nn.Module, threading.Event]:
    """A model one of whose modules, in training, waits for a word."""
    model, word = SKIPS.build(), threading.Event()

    def wait(*_: Any) -> None:
        if stage_threads():
            word.wait(SECONDS)

    model.get_submodule(name).register_forward_pre_hook(wait)
    return model, word


def until(ready: Callable[[], bool]) -> bool:
    """Whether something becomes so within a while."""
    end = time.monotonic() + 5
    while not ready() and time.monotonic() < end:
        time.sleep(0.002)
    return ready()


def test_a_stage_that_waits_holds_the_others_back() -> None:
    model, word = gated("d")
    trainer = trainer_of(Threads(queue=2), model=model)
    feeding = threading.Thread(target=train, args=(trainer, 20))
    feeding.start()
    assert until(lambda: trainer.threads is not None and counts(trainer)[0] >= 2)
    time.sleep(0.2)
    held = counts(trainer)
    assert feeding.is_alive()
    assert held[0] <= 2 + 1  # the queue, and what is in work
    assert held[3] == 0
    word.set()
    feeding.join()
    assert counts(trainer) == [20] * 4


def test_a_stage_that_drops_holds_nobody_back() -> None:
    model, word = gated("d")
    trainer = trainer_of(Threads(queue=2, policy="drop_oldest"), model=model)
    for step in range(20):
        x, y = batch(step)
        trainer.step(x, target=y)
        assert until(lambda step=step: counts(trainer)[:3] == [step + 1] * 3)  # type: ignore[misc]
    assert counts(trainer)[3] == 0
    word.set()
    trainer.drain()
    assert 1 <= counts(trainer)[3] <= 2 + 1
    assert trainer.threads is not None
    assert trainer.threads.workers[3].missed == 20 - counts(trainer)[3]


def test_synthetic_inputs_free_a_stage_from_one_before_it() -> None:
    model, word = gated("a")
    trainer = trainer_of(Threads(queue=2, policy="drop_oldest"), "linear", model, "mlp")
    for step in range(20):
        x, y = batch(step)
        trainer.step(x, target=y)
        assert until(lambda step=step: counts(trainer)[1:] == [step + 1] * 3)  # type: ignore[misc]
    assert counts(trainer)[0] == 0
    word.set()
    trainer.drain()
    assert 1 <= counts(trainer)[0] <= 2 + 1


def test_late_answers_can_be_discounted() -> None:
    full, less, none = (
        train(trainer_of(Threads(staleness=s, discount=d)), 10)
        for s, d in ((2, 1.0), (2, 0.5), (0, 0.5))
    )
    assert largest_difference(record(full), record(less)) > 0
    assert_bits_equal(record(none), record(train(trainer_of("sequential"), 10)), "nothing is late")
