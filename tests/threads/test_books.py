"""The three books of a stage's correspondence: what they promise, and that a broken one is told."""

from __future__ import annotations

import pytest

from dni_fx.parallel.desk import Desk, Inbox, Ledger, Outbox
from dni_fx.parallel.mailbox import ANSWER, VALUE, Address, Mail
from dni_fx.schedules import Flow

ROOM, KEEP = 2, 3


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def outbox(mail: Mail) -> Outbox:
    return Outbox(mail, 0, ROOM, KEEP)


def sent(mail: Mail, consumer: int = 1) -> list[int]:
    """Steps of the values that are on their way."""
    return [m.step for m in mail.boxes.get(Address(VALUE, 0, consumer), ())]


def test_values_wait_for_room_and_the_oldest_is_dropped(mail: Mail, outbox: Outbox) -> None:
    dropped = [outbox.send(1, step, {"v": step}) for step in range(7)]
    assert sent(mail) == [0, 1]
    assert dropped == [None, None, None, None, None, 2, 3]
    assert outbox.count() == {1: ROOM + KEEP}
    outbox.check()


def test_an_answer_makes_room_for_the_oldest_that_waits(mail: Mail, outbox: Outbox) -> None:
    for step in range(4):
        outbox.send(1, step, {})
    outbox.answered(1, 0)
    assert sent(mail) == [0, 1, 2]
    outbox.check()
    for step in (1, 2, 3):
        outbox.answered(1, step)
    assert outbox.is_empty


def test_what_waits_is_dropped_at_the_end(mail: Mail, outbox: Outbox) -> None:
    for step in range(4):
        outbox.send(1, step, {})
    assert outbox.close(1, 4) == [2, 3]
    last = mail.boxes[Address(VALUE, 0, 1)][-1]
    assert (last.step, last.payload) == (4, None)


@pytest.mark.parametrize("steps", [{0, 1, 2}, {0}])
def test_an_outbox_that_breaks_its_bound_is_told(outbox: Outbox, steps: set[int]) -> None:
    """Control: too many under way; or room that is not used while values wait."""
    for step in range(3):
        outbox.send(1, step, {})
    outbox.under_way[1] = steps
    with pytest.raises(AssertionError, match="stage 1"):
        outbox.check()


def test_what_comes_before_its_batch_is_kept_for_it(mail: Mail) -> None:
    desk = Desk(1, mail, Flow(), None, 5)
    desk.producers, desk.predicted, desk.answering = {0}, {0}, {2}
    mail.send(Address(VALUE, 0, 1), 5, {"v": 1})
    mail.send(Address(ANSWER, 2, 1), 5, None)
    assert desk.has_letters()
    desk.collect()
    desk.check()
    assert not desk.has_letters()
    assert not desk.is_idle
    assert desk.inbox.ahead == {(0, 5): {"v": 1}}
    assert desk.inbox.early == {5: [(2, None)]}


def test_what_is_kept_for_a_batch_that_has_begun_is_told(mail: Mail) -> None:
    """Control."""
    inbox = Inbox(mail, 1)
    inbox.ahead[0, 5] = {}
    with pytest.raises(AssertionError, match="begun"):
        inbox.check(6)


def test_nothing_comes_before_what_has_been_taken(mail: Mail) -> None:
    inbox = Inbox(mail, 1)
    mail.send(Address(VALUE, 0, 1), 3, None)
    assert inbox.take_value(0).step == 3
    assert inbox.ended == {0: 3}


def test_a_ledger_knows_whom_it_owes() -> None:
    ledger = Ledger()
    ledger.open(_job(4), {0: True, 1: False})
    assert ledger.due(4) == [0]
    assert [job.step for job in ledger.unseen()] == [4]
    ledger.owed[4][1] = True
    assert ledger.due(4) == [0, 1]
    assert not ledger.unseen()
    del ledger.owed[4][0]
    ledger.check()
    assert ledger.close(4) == [1]
    assert not ledger.pending
    ledger.check()


def test_answers_owed_for_a_batch_that_is_finished_are_told() -> None:
    """Control."""
    ledger = Ledger()
    ledger.open(_job(4), {0: True})
    del ledger.pending[4]
    with pytest.raises(AssertionError, match="finished"):
        ledger.check()


def test_batches_out_of_order_are_told() -> None:
    """Control."""
    ledger = Ledger()
    ledger.open(_job(4), {})
    ledger.open(_job(3), {})
    with pytest.raises(AssertionError, match="out of order"):
        ledger.check()


class _Job:
    """As much of a batch as a ledger looks at."""

    def __init__(self, step: int) -> None:
        self.step = step


def _job(step: int) -> _Job:  # type: ignore[misc]
    return _Job(step)
