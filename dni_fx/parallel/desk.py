"""One stage's correspondence: letters opened, sorted into three books, and answered.

Every value is answered, so the answer is also the receipt: :class:`Outbox` bounds the values under
way to each consumer, :class:`Inbox` keeps what came before its batch, :class:`Ledger` the batches
that are not finished and whom each of them still has to answer.
"""

from __future__ import annotations

from collections import deque

from ..schedules import Flow
from .job import Answer, Job, Values
from .mailbox import ANSWER, VALUE, Address, Letter, Mail


class Outbox:
    """Values on their way to the stages that take them, and those that there is no room for.

    Args:
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
        """Assert what always holds."""
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
        """Send values, or keep them until there is room. Returns the step that this drops."""
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
        """Nothing comes any more of the batches before one."""
        self.mail.send(Address(VALUE, self.index, consumer), steps, None)

    def close(self, consumer: int, steps: int) -> list[int]:
        """What waits is not sent any more, and nobody need wait for it. Returns its steps."""
        dropped = [step for step, _ in self._backlog.pop(consumer, ())]
        self.pass_over(consumer, steps)
        return dropped

    def answer(self, stage: int, step: int, answer: Answer | None) -> None:
        """Answer a stage; None where there is nothing to say."""
        self.mail.send(Address(ANSWER, self.index, stage), step, answer)


class Inbox:
    """Messages to one stage, and what came before its batch did.

    Attributes:
        ended: producers that will send nothing of the batches before one.
        ahead: values of batches to come, by producer and step.
        early: answers about batches to come, by step: of stages that did not wait for values.
    """

    def __init__(self, mail: Mail, index: int) -> None:
        self.mail, self.index = mail, index
        self.ended: dict[int, int] = {}
        self.ahead: dict[tuple[int, int], Values] = {}
        self.early: dict[int, list[tuple[int, Answer | None]]] = {}

    def check(self, steps: int) -> None:
        """Assert what always holds after so many batches."""
        assert all(step >= steps for _, step in self.ahead), "values of batches that are begun"
        assert all(step >= steps for step in self.early), "answers about batches that are begun"

    def value(self, producer: int) -> Letter | None:
        """The oldest letter with values, left where it is."""
        return self.mail.peek(Address(VALUE, producer, self.index))

    def take_value(self, producer: int) -> Letter:
        """The same, taken out. Nothing of the batches before it comes after it."""
        letter = self.mail.take(Address(VALUE, producer, self.index))
        assert letter is not None
        self.ended[producer] = letter.step
        return letter


class Ledger:
    """The batches that are not finished, and whom each of them still has to answer.

    Attributes:
        pending: the batches, by step, oldest first.
        owed: by step, the stages to answer, and whether the value to be answered has come.
    """

    def __init__(self) -> None:
        self.pending: dict[int, Job] = {}
        self.owed: dict[int, dict[int, bool]] = {}

    def check(self) -> None:
        """Assert what always holds."""
        assert list(self.pending) == sorted(self.pending), "batches out of order"
        assert self.owed.keys() == self.pending.keys(), "answers owed for batches that are finished"

    def open(self, job: Job, owed: dict[int, bool]) -> None:
        """A batch begins."""
        self.pending[job.step], self.owed[job.step] = job, owed

    def up_to(self, step: int) -> list[Job]:
        """The batches that are not finished, up to one."""
        return [job for s, job in self.pending.items() if s <= step]

    def due(self, step: int) -> list[int]:
        """Stages that can be answered, as soon as the answer is known."""
        return [stage for stage, came in self.owed[step].items() if came]

    def unseen(self) -> list[Job]:
        """Batches for which a value that was predicted is still to come."""
        return [job for s, job in self.pending.items() if not all(self.owed[s].values())]

    def close(self, step: int) -> list[int]:
        """A batch is finished, or given up. Returns whom it did not answer, though values came."""
        unanswered = self.due(step)
        del self.pending[step], self.owed[step]
        return unanswered


class Desk:
    """Opens what comes to a stage, without waiting for anything, and answers what it can.

    Attributes:
        producers, consumers, answering: stages that it has exchanged letters with.
        predicted: producers whose values are not waited for.
        steps: batches that the stage has begun.
        draining: whether no batch comes for now.
    """

    def __init__(self, index: int, mail: Mail, flow: Flow, lag: int | None, steps: int) -> None:
        self.index, self.mail, self.steps = index, mail, steps
        room = max(flow.queue, 0 if lag is None else lag + 1)
        self.outbox = Outbox(mail, index, room, flow.queue)
        self.inbox, self.ledger = Inbox(mail, index), Ledger()
        self.producers: set[int] = set()
        self.consumers: set[int] = set()
        self.answering: set[int] = set()
        self.predicted: set[int] = set()
        self.draining = False

    @property
    def is_idle(self) -> bool:
        """Whether every batch is finished, and everything that was sent is answered."""
        early = self.inbox.ahead or self.inbox.early
        return self.outbox.is_empty and not early and not self.ledger.pending

    def check(self) -> None:
        """Assert what always holds of the three books."""
        self.inbox.check(self.steps)
        self.outbox.check()
        self.ledger.check()

    def meet(self, job: Job) -> None:
        """Remember who takes part."""
        self.producers.update(job.routes.producers)
        self.consumers.update(job.routes.consumers)
        self.answering |= job.routes.answering
        self.predicted = set(job.routes.producers) - job.routes.awaited

    def open(self, job: Job) -> None:
        """A batch begins to be run, whose values have come; the others are predicted."""
        self.ledger.open(job, {k: k not in self.predicted for k in job.routes.answered})

    def catch_up(self, job: Job) -> None:
        """Open what came for a batch before it began."""
        for producer in self.predicted:
            values = self.inbox.ahead.pop((producer, job.step), None)
            if values is not None:
                self.see(job, producer, values)
            elif self.inbox.ended.get(producer, 0) > job.step:
                self._miss(job, producer)
        for stage, answer in self.inbox.early.pop(job.step, ()):
            job.answers.hear(stage, answer)

    def send_values(self, job: Job, values: Values) -> None:
        """Send a batch's values to all who take them, or keep the newest where there is no room."""
        for consumer in job.routes.consumers:
            names = job.setting.stages[consumer].inputs
            payload = {n: values[n] for n in names if n in values}
            dropped = self.outbox.send(consumer, job.step, payload)
            if dropped is not None:
                self.hear(dropped, consumer, None)

    def leave_out(self, job: Job) -> None:
        """A batch is not run: answer what came for it with nothing, and send nothing."""
        self.inbox.early.pop(job.step, None)
        came = [p for p in self.producers if self.inbox.ahead.pop((p, job.step), None) is not None]
        for stage in (*came, *job.routes.error_to):
            self.outbox.answer(stage, job.step, None)
        for consumer in job.routes.consumers:  # which may be the next one in this thread
            self.outbox.pass_over(consumer, self.steps)

    def pass_by(self, job: Job) -> None:
        """Answer with nothing what was sent for a batch that is not run, or before that."""
        for producer in job.routes.awaited:
            while (letter := self.inbox.value(producer)) is not None and letter.step <= job.step:
                if self.inbox.take_value(producer).payload is not None:
                    self.outbox.answer(producer, letter.step, None)

    def collect(self) -> None:
        """Open the letters that have come."""
        for stage in sorted(self.answering):
            while (letter := self.mail.take(Address(ANSWER, stage, self.index))) is not None:
                self.hear(letter.step, stage, letter.payload)
                self.outbox.answered(stage, letter.step)
        for producer in sorted(self.producers):
            while self._is_due(producer):
                self._open(producer, self.inbox.take_value(producer))

    def has_letters(self) -> bool:
        """Whether something has come that was not opened."""
        answers = (self.mail.peek(Address(ANSWER, k, self.index)) for k in self.answering)
        return any(a is not None for a in answers) or any(map(self._is_due, self.producers))

    def _is_due(self, producer: int) -> bool:
        """Whether values have come that nobody waits for: predicted, or of an earlier step."""
        letter = self.inbox.value(producer)
        opens = self.draining or producer in self.predicted
        return letter is not None and (opens or letter.step < self.steps)

    def _open(self, producer: int, letter: Letter) -> None:
        step, values = letter
        for older in self.ledger.up_to(step - 1):
            self._miss(older, producer)  # its values were dropped
        if values is None:
            return
        if producer in self.ledger.owed.get(step, ()):
            self.see(self.ledger.pending[step], producer, values)
        elif step >= self.steps:
            self.inbox.ahead[producer, step] = values
        else:
            self.outbox.answer(producer, step, None)

    def hear(self, step: int, stage: int, answer: Answer | None) -> None:
        """A stage has answered about a batch."""
        job = self.ledger.pending.get(step)
        if job is not None:
            job.answers.hear(stage, answer)
        elif step >= self.steps:
            self.inbox.early.setdefault(step, []).append((stage, answer))

    def see(self, job: Job, producer: int, values: Values) -> None:
        """Values that were predicted have come: their producer waits for the answer."""
        job.see(values)
        self.ledger.owed[job.step][producer] = True
        self.answer(job)

    def _miss(self, job: Job, producer: int) -> None:
        """Values that were predicted will not come."""
        if self.ledger.owed[job.step].get(producer) is False:
            del self.ledger.owed[job.step][producer]
            job.miss(producer)

    def answer(self, job: Job) -> None:
        """Send what is known and not sent yet."""
        for stage in self.ledger.due(job.step):
            known, answer = job.answers.answer(stage)
            if known:
                del self.ledger.owed[job.step][stage]
                self.outbox.answer(stage, job.step, answer)
