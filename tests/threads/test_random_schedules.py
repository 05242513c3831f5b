"""Real threads under schedules drawn at random: what is equal stays equal, what holds always holds.

Each seed puts sleeps at every hand-over, and lets threads take the interpreter from each other a
million times a second. ``make schedules`` tries 1,000.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dni_fx.errors import NonFiniteError
from dni_fx.parallel.desk import Outbox
from dni_fx.parallel.mailbox import ANSWER, VALUE, Address, Letter, Mail
from dni_fx.parallel.worker import StageWorker
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch
from ..models.small import CHAIN, SKIPS
from .kit import MADE, stage_threads, trainer_of

SEEDS = int(os.environ.get("DNI_FX_RANDOM_SCHEDULES", "15"))
STEPS = 5
CASES = {"skips": SKIPS, "chain": CHAIN}  # the latter with buffers
AT_ONCE = ("linear", "each:linear", "critic")
KINDS = (*AT_ONCE, "local", "joint:linear", "mix", "feedback")


class Shaken:
    """Sleeps at hand-overs, and what is seen there.

    Attributes:
        values, answers: how often each letter was sent.
        wrong: what did not hold.
    """

    def __init__(self, seed: int, room: int) -> None:
        self.seed, self.room, self.own = seed, room, threading.local()
        self.values, self.answers = Counter[tuple[Address, int]](), Counter[tuple[Address, int]]()
        self.wrong: list[str] = []

    def pause(self) -> None:
        """Each thread sleeps by a stream of its own."""
        if not hasattr(self.own, "draw"):
            self.own.draw = random.Random(f"{self.seed}, {threading.current_thread().name}")
        if self.own.draw.random() < 0.4:
            time.sleep(self.own.draw.choice((0.0, 0.0, 1e-5, 1e-4, 1e-3)))

    def note(self, mail: Mail, address: Address, letter: Letter) -> None:
        """A letter is put into its box."""
        place = address, letter.step
        if address.kind == ANSWER:
            self.answers[place] += 1
        elif address.kind == VALUE and letter.payload is not None:
            self.values[place] += 1
            waiting = sum(other.payload is not None for other in mail.boxes.get(address, ()))
            if waiting >= self.room:
                self.wrong.append(f"{waiting + 1} values in the box of {address}")

    def check(self) -> None:
        """After everything has come to rest: every value was sent and answered once."""
        assert not self.wrong, self.wrong[:3]
        again = [p for p, count in (self.values + self.answers).items() if count > 1]
        assert not again, f"sent twice: {again[:3]}"
        sent = {(Address(ANSWER, a.taker, a.sender), step) for a, step in self.values}
        missing = sent - self.answers.keys()
        assert not missing, f"never answered: {sorted(missing)[:3]}"


@pytest.fixture
def shake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Shaken]]:
    before = sys.getswitchinterval()

    def start(seed: int, room: int) -> Shaken:
        shaken = Shaken(seed, room)
        deliver, take, wait = Mail.deliver, Mail.take, Mail.wait
        finish, put_back = StageWorker.finish, StageWorker.put_back

        def delivered(self: Mail, address: Address, letter: Letter) -> None:
            shaken.pause()
            with self.changed:
                shaken.note(self, address, letter)
                deliver(self, address, letter)
            shaken.pause()

        def taken(self: Mail, address: Address) -> Letter | None:
            shaken.pause()
            return take(self, address)

        def waited(self: Mail, *args: Any, **options: Any) -> None:
            shaken.pause()
            wait(self, *args, **options)

        def finished(self: StageWorker, job: Any) -> None:
            updates = self.learner.updates
            finish(self, job)
            self.desk.check()
            vars(self)["updates_of_the_batch"] = self.learner.updates - updates

        def undone(self: StageWorker) -> None:
            if job_is_updated(self):
                shaken.wrong.append(f"{self.name} puts back a batch that it has learnt from")
            put_back(self)

        for name, value in (("deliver", delivered), ("take", taken), ("wait", waited)):
            monkeypatch.setattr(Mail, name, value)
        monkeypatch.setattr(StageWorker, "finish", finished)
        monkeypatch.setattr(StageWorker, "put_back", undone)
        sys.setswitchinterval(1e-6)
        return shaken

    yield start
    sys.setswitchinterval(before)


def job_is_updated(worker: StageWorker) -> bool:
    """Whether something would be put back that an update has come after."""
    undo, weights = worker._undo, worker.learner.owned
    kept = undo is not None and bool(undo._contents)
    return kept and any(p._version != v for p, v in weights._versions.items())


@functools.cache
def made(case: str, gradients: str, inputs: str | None) -> tuple[Any, Any, list[Any]]:
    """A trainer, its state at the beginning, and what the sequential one is after each step; and at
    last, after what was under way.
    """
    trainer = trainer_of("sequential", gradients, inputs=inputs, case=CASES[case])
    x, y = batch(0)
    trainer.prepare(x, target=y)
    start, after = copy.deepcopy(trainer.state_dict()), []
    for step in range(STEPS):
        after.append(copy.deepcopy(trainer.decoupled.state_dict()))
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.drain()
    after.append(copy.deepcopy(trainer.decoupled.state_dict()))
    return trainer, start, after


def begun(draw: random.Random, gradients: tuple[str, ...], flow: Threads) -> tuple[Any, list[Any]]:
    """A trainer at its beginning, on threads."""
    case = draw.choice(list(CASES))
    trainer, start, after = made(case, draw.choice(gradients), draw.choice((None, None, "mlp")))
    MADE.append(trainer)
    trainer.load_state_dict(start)
    trainer.schedule = flow
    return trainer, after


def go(trainer: Any, shaken: Shaken, steps: int, bad: int = -1) -> None:
    """Steps, one of which may be on what is no number, and what is under way then."""
    for step in range(steps):
        x, y = batch(step)
        trainer.step(x * float("nan") if step == bad else x, target=y)
        shaken.pause()
    trainer.drain()


def equal(draw: random.Random, shake: Callable[[int, int], Shaken], seed: int) -> None:
    """Without staleness: the sequential trainer."""
    queue = draw.randint(1, 4)
    trainer, after = begun(draw, KINDS, Threads(queue=queue, staleness=0))
    shaken = shake(seed, queue)
    go(trainer, shaken, STEPS)
    assert_bits_equal(trainer.decoupled.state_dict(), after[-1], f"seed {seed}")
    shaken.check()


def free(draw: random.Random, shake: Callable[[int, int], Shaken], seed: int) -> None:
    """Nothing is lost, also where values are dropped."""
    queue, policy = draw.randint(1, 4), draw.choice(("wait", "drop_oldest"))
    trainer, _ = begun(draw, ("linear", "each:linear", "delayed"), Threads(queue, policy))
    shaken = shake(seed, queue)
    for step in range(2 * STEPS):
        x, y = batch(step)
        trainer.step(x, target=y)
        shaken.pause()
        if draw.random() < 0.1:
            trainer.drain()
    trainer.drain()
    for worker in trainer.threads.workers.values():
        assert worker.desk.is_idle, f"seed {seed}"
        assert worker.desk.steps == 2 * STEPS
        assert policy == "drop_oldest" or worker.missed == 0
    assert all(bool(p.isfinite().all()) for p in trainer.decoupled.parameters())
    shaken.check()


def refused(draw: random.Random, shake: Callable[[int, int], Shaken], seed: int) -> None:
    """Each stage is where the sequential trainer was after some batch: updated, or not at all."""
    queue, bad = draw.randint(1, 4), draw.randrange(STEPS)
    trainer, after = begun(draw, AT_ONCE, Threads(queue=queue, staleness=0))
    shaken = shake(seed, queue)
    with pytest.raises(NonFiniteError):
        go(trainer, shaken, STEPS + 1, bad)
    assert stage_threads() == []
    assert not shaken.wrong, shaken.wrong
    state = trainer.decoupled.model.state_dict()
    for stage in trainer.decoupled.stages:
        module = stage.module
        names = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        names = [n for n in names if n in state]
        found = [
            all(torch.equal(state[n], known[f"model.{n}"]) for n in names)
            for known in after[: bad + 1]
        ]
        assert any(found), f"seed {seed}: {stage.name} is as after no batch"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_schedule(seed: int, shake: Callable[[int, int], Shaken]) -> None:
    draw = random.Random(seed)
    draw.choice((equal, equal, equal, free, refused))(draw, shake, seed)


def test_an_answer_that_comes_late_is_found(shake: Callable[[int, int], Shaken]) -> None:
    """Control."""
    trainer, after = begun(random.Random(0), ("linear",), Threads(staleness=1))
    go(trainer, shake(0, 4), STEPS)
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(trainer.decoupled.state_dict(), after[-1], "late")


def test_an_answer_that_is_sent_twice_is_found(
    shake: Callable[[int, int], Shaken], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    answer = Outbox.answer

    def twice(self: Outbox, stage: int, step: int, what: Any) -> None:
        for _ in range(1 + (step == 2)):
            answer(self, stage, step, what)

    monkeypatch.setattr(Outbox, "answer", twice)
    trainer, _ = begun(random.Random(0), ("linear",), Threads(staleness=0))
    shaken = shake(0, 4)
    go(trainer, shaken, STEPS)
    with pytest.raises(AssertionError, match="sent twice"):
        shaken.check()
