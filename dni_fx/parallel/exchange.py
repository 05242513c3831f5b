"""What one stage has sent, what it has received, and what it owes: three books with invariants.

Every value is answered, so the answer is also the receipt: :class:`Outbox` bounds the values under
way to each consumer, :class:`Inbox` keeps what came before its batch, :class:`Ledger` the batches
that are not finished and whom each of them still has to answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .arrived import Answer
from .job import Job, Values
from .mailbox import ANSWER, VALUE, Address, Letter, Mail


class Outbox:
    """Values on their way to the stages that take them, and those that there is no room for.

    Args:
        mail: the messages of the process.
        index: of the stage.
        room: how many values may be under way to one consumer, not answered yet.
        keep: how many newer ones wait where there is no room; older ones are dropped.

    Attributes:
        under_way: by consumer, the steps of values that were sent and not answered.
    """

    def __init__(self, mail: Mail, index: int, room: int, keep: int) -> None:
        self.mail, self.index, self.room, self.keep = mail, index, room, keep
        self.under_way: dict[int, set[int]] = {}
        self._backlog: dict[int, deque[tuple[int, Values]]] = {}

    def check(self) -> None:
        """What always holds.

        Raises:
            AssertionError: it does not.
        """
        for consumer, steps in self.under_way.items():
            waiting = [s for s, _ in self._backlog.get(consumer, ())]
            assert len(steps) <= self.room, f"{len(steps)} values under way to stage {consumer}"
            assert len(waiting) <= self.keep, f"{len(waiting)} values wait for stage {consumer}"
            assert waiting == sorted(waiting), f"values for stage {consumer} out of order"
            assert not waiting or len(steps) == self.room, f"room for stage {consumer} unused"

    def has_room(self, consumer: int) -> bool:
        """Whether a value may be sent at once."""
        return len(self.under_way.setdefault(consumer, set())) < self.room

    @property
    def is_empty(self) -> bool:
        """Whether everything that was sent is answered, and nothing waits for room."""
        return not any(self.under_way.values()) and not any(self._backlog.values())

    def count(self) -> dict[int, int]:
        """By consumer, how many values are under way or wait for room."""
        waiting = self._backlog
        return {c: len(steps) + len(waiting.get(c, ())) for c, steps in self.under_way.items()}

    def send(self, consumer: int, step: int, values: Values) -> int | None:
        """Send values, or keep them until there is room.

        Returns:
            The step of a batch whose values are dropped for that.
        """
        if self.has_room(consumer):
            self.under_way[consumer].add(step)
            self.mail.send(Address(VALUE, self.index, consumer), step, values)
            return None
        waiting = self._backlog.setdefault(consumer, deque())
        waiting.append((step, values))
        return waiting.popleft()[0] if len(waiting) > self.keep else None

    def answered(self, consumer: int, step: int) -> None:
        """A value has its answer: there is room for another one."""
        self.under_way.get(consumer, set()).discard(step)
        waiting = self._backlog.get(consumer)
        while waiting and self.has_room(consumer):
            self.send(consumer, *waiting.popleft())

    def pass_over(self, consumer: int, steps: int) -> None:
        """Say that nothing comes any more of the batches before one."""
        self.mail.send(Address(VALUE, self.index, consumer), steps, None)

    def close(self, consumer: int, steps: int) -> list[int]:
        """What was not sent is not sent any more, and nobody need wait for it.

        Returns:
            The steps of the batches whose values are dropped.
        """
        dropped = [step for step, _ in self._backlog.pop(consumer, ())]
        self.pass_over(consumer, steps)
        return dropped

    def answer(self, stage: int, step: int, answer: Answer | None) -> None:
        """Answer a stage; None where there is nothing to say."""
        self.mail.send(Address(ANSWER, self.index, stage), step, answer)


class Inbox:
    """Messages to one stage, and what came before its batch did.

    Args:
        mail: the messages of the process.
        index: of the stage.

    Attributes:
        ended: producers that will send nothing of the batches before one.
    """

    def __init__(self, mail: Mail, index: int) -> None:
        self.mail, self.index = mail, index
        self.ended: dict[int, int] = {}
        self._ahead: dict[tuple[int, int], Values] = {}  # by producer and step
        self._early: dict[int, list[tuple[int, Answer | None]]] = {}  # by step

    def check(self, steps: int) -> None:
        """What always holds.

        Args:
            steps: batches that the stage has begun.

        Raises:
            AssertionError: it does not.
        """
        assert all(step >= steps for _, step in self._ahead), "values of batches that are begun"
        assert all(step >= steps for step in self._early), "answers about batches that are begun"

    @property
    def is_empty(self) -> bool:
        """Whether nothing came before its batch."""
        return not self._ahead and not self._early

    def value(self, producer: int) -> Letter | None:
        """The oldest message with values, left where it is."""
        return self.mail.peek(Address(VALUE, producer, self.index))

    def take_value(self, producer: int) -> Letter:
        """The same, taken out. Nothing of the batches before it comes after it."""
        letter = self.mail.take(Address(VALUE, producer, self.index))
        assert letter is not None
        self.ended[producer] = letter.step
        return letter

    def take_answer(self, stage: int) -> Letter | None:
        """The oldest answer, if there is one."""
        return self.mail.take(Address(ANSWER, stage, self.index))

    def has_answers(self, stages: Iterable[int]) -> bool:
        """Whether some stage has answered."""
        return any(self.mail.peek(Address(ANSWER, s, self.index)) is not None for s in stages)

    def keep(self, producer: int, step: int, values: Values) -> None:
        """Values of a batch to come."""
        self._ahead[producer, step] = values

    def kept(self, producer: int, step: int) -> Values | None:
        """Values of a batch that has come now."""
        return self._ahead.pop((producer, step), None)

    def keep_answer(self, step: int, stage: int, answer: Answer | None) -> None:
        """An answer about a batch to come, of a stage that did not wait for this one's values."""
        self._early.setdefault(step, []).append((stage, answer))

    def kept_answers(self, step: int) -> list[tuple[int, Answer | None]]:
        """Answers about a batch that has come now."""
        return self._early.pop(step, [])


class Ledger:
    """The batches that are not finished, and whom each of them still has to answer.

    Attributes:
        pending: the batches, by step, oldest first.
    """

    def __init__(self) -> None:
        self.pending: dict[int, Job] = {}
        self._owed: dict[int, dict[int, bool]] = {}  # whom to answer, and whether its value came

    def check(self) -> None:
        """What always holds.

        Raises:
            AssertionError: it does not.
        """
        assert list(self.pending) == sorted(self.pending), "batches out of order"
        assert set(self._owed) <= set(self.pending), "answers owed for batches that are finished"

    def open(self, job: Job, owed: dict[int, bool]) -> None:
        """A batch begins.

        Args:
            job: the batch.
            owed: whom it has to answer, and whether the value to be answered has come.
        """
        self.pending[job.step] = job
        self._owed[job.step] = owed

    def due(self, step: int) -> list[int]:
        """Stages that can be answered, as soon as the answer is known."""
        return [stage for stage, came in self._owed.get(step, {}).items() if came]

    def is_owed(self, step: int, stage: int) -> bool:
        """Whether a stage still has to be answered."""
        return stage in self._owed.get(step, {})

    def came(self, step: int, producer: int) -> None:
        """A value that was predicted has come."""
        if step in self._owed:
            self._owed[step][producer] = True

    def settled(self, step: int, stage: int) -> None:
        """A stage was answered, or need not be: its value will not come."""
        del self._owed[step][stage]

    def is_unseen(self, step: int) -> bool:
        """Whether a value that was predicted is still to come."""
        return not all(self._owed.get(step, {}).values())

    def misses(self, step: int, producer: int) -> bool:
        """Whether a value is still to come from a producer."""
        return self._owed.get(step, {}).get(producer) is False

    def is_paid(self, step: int) -> bool:
        """Whether everybody was answered."""
        return not self._owed.get(step)

    def close(self, step: int) -> list[int]:
        """A batch is finished, or given up.

        Returns:
            Stages whose values came, but which were not answered.
        """
        unanswered = self.due(step)
        self.pending.pop(step, None)
        self._owed.pop(step, None)
        return unanswered
