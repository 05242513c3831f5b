"""The protocol of letters in every order in which stages can act: a search through all states.

A chain of stages exchanges letters by real desks. A state's successors are what each stage may do
next: begin a batch or leave it out, open its letters, answer, or end. Whoever waits is a stage that
can do nothing. In every state the books keep their promises; in the last, every value is answered.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dni_fx.parallel.desk import Desk
from dni_fx.parallel.mailbox import ANSWER, VALUE, Address, Letter
from dni_fx.schedules import Flow

BATCHES = 3


class Boxes:
    """A mail without a lock, which can be copied."""

    def __init__(self) -> None:
        self.boxes: dict[Address, deque[Letter]] = {}
        self.values: list[tuple[Address, int]] = []  # sent, and not answered

    def send(self, address: Address, step: int, payload: Any) -> None:
        kind, sender, taker = address
        if kind == VALUE and payload is not None:
            assert (address, step) not in self.values, f"{address}, {step} is sent twice"
            self.values.append((address, step))
        if kind == ANSWER:
            answered = Address(VALUE, taker, sender), step
            assert answered in self.values, f"{answered} was not sent, or is answered twice"
            self.values.remove(answered)
        self.boxes.setdefault(address, deque()).append(Letter(step, payload))

    def peek(self, address: Address) -> Letter | None:
        box = self.boxes.get(address)
        return box[0] if box else None

    def take(self, address: Address) -> Letter | None:
        box = self.boxes.get(address)
        return box.popleft() if box else None


class Chain:
    """So many stages, and how far each has come."""

    def __init__(self, stages: int, flow: Flow) -> None:
        self.mail, self.flow, self.last = Boxes(), flow, stages - 1
        mail: Any = self.mail
        self.desks = [Desk(k, mail, flow, None, 0) for k in range(stages)]

    def job(self, k: int) -> Any:
        before, after = [k - 1] * (k > 0), [k + 1] * (k < self.last)
        routes = SimpleNamespace(
            producers=before, awaited=set(before), consumers=after, answering=set(after),
            answered=set(before), error_to=[],
        )  # fmt: skip
        inputs = [SimpleNamespace(inputs=[f"v{i - 1}"]) for i in range(self.last + 1)]
        heard = Heard(after)
        setting = SimpleNamespace(stages=inputs)
        step = self.desks[k].steps
        return SimpleNamespace(step=step, routes=routes, setting=setting, answers=heard)

    def key(self) -> Any:
        """What tells a state from another."""
        boxes = {a: [(m.step, m.payload is None) for m in b] for a, b in self.mail.boxes.items()}
        books = [
            (d.steps, d.draining, d.outbox.under_way, d.outbox._backlog, d.inbox.ended,
             d.ledger.owed, {s: sorted(j.answers.missing) for s, j in d.ledger.pending.items()})
            for d in self.desks
        ]  # fmt: skip
        return repr((sorted((a, b) for a, b in boxes.items() if b), books))

    def check(self) -> None:
        for desk in self.desks:
            desk.check()
        for address, box in self.mail.boxes.items():
            if address.kind == VALUE:
                under_way = sum(m.payload is not None for m in box)
                assert under_way <= self.flow.queue, f"{under_way} values in {address}"

    @property
    def is_over(self) -> bool:
        ended = all(d.inbox.ended.get(p, 0) >= BATCHES for d in self.desks for p in d.producers)
        return ended and all(d.draining and d.outbox.is_empty for d in self.desks)

    # ---- what a stage may do -----------------------------------------------------------------

    def actions(self) -> Iterator[tuple[Callable[[Chain, int], None], int]]:
        for k, desk in enumerate(self.desks):
            if desk.has_letters():
                yield Chain.collect, k
            if any(desk.ledger.due(step) for step in desk.ledger.pending):
                yield Chain.answer, k
            if desk.steps < BATCHES and self.may_begin(k):
                yield Chain.begin, k
            if desk.steps < BATCHES and self.flow.policy == "drop_oldest":
                yield Chain.skip, k
            if desk.steps == BATCHES and not desk.draining:
                yield Chain.end, k

    def may_begin(self, k: int) -> bool:
        desk = self.desks[k]
        if self.flow.policy == "wait" and k < self.last and not desk.outbox.has_room(k + 1):
            return False
        return k == 0 or desk.inbox.value(k - 1) is not None

    def begin(self, k: int) -> None:
        desk, job = self.desks[k], self.job(k)
        desk.meet(job)
        if k > 0:
            letter = desk.inbox.value(k - 1)
            assert letter is not None
            if letter.step <= job.step:
                letter = desk.inbox.take_value(k - 1)
                if letter.payload is not None and letter.step < job.step:
                    desk.outbox.answer(k - 1, letter.step, None)  # of a batch that was left out
                if letter.payload is None or letter.step < job.step:
                    return
            else:
                desk.steps += 1
                desk.leave_out(job)
                return
        desk.steps += 1
        desk.open(job)
        desk.send_values(job, {f"v{k}": 0})
        self.close(k)

    def skip(self, k: int) -> None:
        desk, job = self.desks[k], self.job(k)
        desk.meet(job)
        desk.steps += 1
        desk.pass_by(job)
        desk.leave_out(job)

    def answer(self, k: int) -> None:
        desk = self.desks[k]
        step = next(step for step in desk.ledger.pending if desk.ledger.due(step))
        for stage in desk.ledger.due(step):
            del desk.ledger.owed[step][stage]
            desk.outbox.answer(stage, step, None)
        self.close(k)

    def collect(self, k: int) -> None:
        self.desks[k].collect()
        self.close(k)

    def end(self, k: int) -> None:
        desk = self.desks[k]
        desk.draining = True
        for consumer in sorted(desk.consumers):
            for step in desk.outbox.close(consumer, desk.steps):
                desk.hear(step, consumer, None)
        self.close(k)

    def close(self, k: int) -> None:
        ledger = self.desks[k].ledger
        for step, job in list(ledger.pending.items()):
            if not ledger.owed[step] and not job.answers.missing:
                ledger.close(step)


class Heard:
    """Who has not answered about a batch yet."""

    def __init__(self, consumers: list[int]) -> None:
        self.missing = set(consumers)

    def hear(self, stage: int, _: Any) -> None:
        self.missing.discard(stage)


def explore(start: Chain) -> tuple[int, int]:
    """All states that can be reached. Returns their number, and that of the last ones."""
    seen, waiting, ends = {start.key()}, [start], 0
    while waiting:
        state = waiting.pop()
        actions = list(state.actions())
        if not actions:
            assert state.is_over, f"nobody can go on: {state.key()}"
            assert not state.mail.values, f"not answered: {state.mail.values}"
            assert not any(desk.ledger.pending for desk in state.desks), "batches not finished"
            ends += 1
        for act, k in actions:
            following = copy.deepcopy(state)
            act(following, k)
            following.check()
            if (key := following.key()) not in seen:
                seen.add(key)
                waiting.append(following)
    return len(seen), ends


@pytest.mark.parametrize("policy", ["wait", "drop_oldest"])
@pytest.mark.parametrize("queue", [1, 2])
def test_two_stages_in_every_order(queue: int, policy: str) -> None:
    states, ends = explore(Chain(2, Flow(queue=queue, policy=policy)))
    print(f"{states} states, {ends} ends")
    assert states > 20
    assert ends >= 1


@pytest.mark.parametrize("queue", [1, 2])
def test_three_stages_in_every_order(queue: int) -> None:
    states, ends = explore(Chain(3, Flow(queue=queue)))
    print(f"{states} states, {ends} ends")
    assert states > 100
    assert ends >= 1


@pytest.mark.parametrize("queue", [1, 2])
def test_three_stages_that_drop_in_random_orders(queue: int) -> None:
    for seed in range(300):
        chooser = random.Random(seed)
        state = Chain(3, Flow(queue=queue, policy="drop_oldest"))
        while actions := list(state.actions()):
            act, k = chooser.choice(actions)
            act(state, k)
            state.check()
        assert state.is_over, f"seed {seed}: nobody can go on"
        assert not state.mail.values, f"seed {seed}"


def test_a_value_that_is_not_answered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what is passed by is taken, and its producer waits for ever."""

    def forgets(self: Desk, job: Any) -> None:
        for producer in job.routes.awaited:
            while (letter := self.inbox.value(producer)) is not None and letter.step <= job.step:
                self.inbox.take_value(producer)

    monkeypatch.setattr(Desk, "pass_by", forgets)
    with pytest.raises(AssertionError, match=r"nobody can go on|not answered"):
        explore(Chain(2, Flow(queue=1, policy="drop_oldest")))


def test_an_outbox_that_sends_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    monkeypatch.setattr("dni_fx.parallel.desk.Outbox.has_room", lambda *_: True)
    with pytest.raises((AssertionError, KeyError)):
        explore(Chain(2, Flow(queue=1)))
