"""One stage's correspondence: messages opened, sorted into its books, and answered."""

from __future__ import annotations

from .arrived import Answer
from .exchange import Inbox, Ledger, Outbox
from .job import Job, Values
from .limits import Flow
from .mailbox import Letter, Mail


class Desk:
    """Opens what comes to a stage, without waiting for anything, and answers what it can.

    Args:
        index: of the stage.
        mail: the messages of the process.
        flow: how far the stage may run ahead.
        lag: steps after which answers are learnt from; None: whenever they come.
        steps: batches that are done already.

    Attributes:
        inbox, outbox, ledger: what came, what was sent, what is owed.
        producers, consumers, answering: stages that it has exchanged messages with.
        predicted: producers whose values are not waited for.
        steps: batches that the stage has begun.
        draining: whether no batch comes for now.
    """

    def __init__(self, index: int, mail: Mail, flow: Flow, lag: int | None, steps: int) -> None:
        room = max(flow.queue, 0 if lag is None else lag + 1)
        self.inbox, self.ledger = Inbox(mail, index), Ledger()
        self.outbox = Outbox(mail, index, room, flow.queue)
        self.producers: set[int] = set()
        self.consumers: set[int] = set()
        self.answering: set[int] = set()
        self.predicted: set[int] = set()
        self.steps = steps
        self.draining = False

    @property
    def is_idle(self) -> bool:
        """Whether every batch is finished, and everything that was sent is answered."""
        return self.inbox.is_empty and self.outbox.is_empty and not self.ledger.pending

    def check(self) -> None:
        """What always holds of the three books.

        Raises:
            AssertionError: it does not.
        """
        self.inbox.check(self.steps)
        self.outbox.check()
        self.ledger.check()

    def meet(self, job: Job) -> None:
        """Remember who takes part."""
        routes = job.routes
        self.producers |= set(routes.producers)
        self.consumers |= set(routes.consumers)
        self.answering |= routes.answering
        self.predicted = set(routes.producers) - routes.awaited

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
        self.inbox.kept_answers(job.step)
        for producer in self.producers:
            if self.inbox.kept(producer, job.step) is not None:
                self.outbox.answer(producer, job.step, None)
        for stage in job.routes.error_to:
            self.outbox.answer(stage, job.step, None)
        for consumer in job.routes.consumers:  # which may be the next one in this thread
            self.outbox.pass_over(consumer, self.steps)

    def pass_by(self, job: Job) -> None:
        """What was sent for a batch that is not run, and for those before it, is answered with
        nothing.
        """
        for producer in job.routes.awaited:
            while (letter := self.inbox.value(producer)) is not None and letter.step <= job.step:
                if self.inbox.take_value(producer).payload is not None:
                    self.outbox.answer(producer, letter.step, None)

    def collect(self) -> None:
        """Open the messages that have come."""
        for stage in sorted(self.answering):
            while (letter := self.inbox.take_answer(stage)) is not None:
                self.hear(letter.step, stage, letter.payload)
                self.outbox.answered(stage, letter.step)
        for producer in sorted(self.producers):
            while (letter := self.inbox.value(producer)) is not None:
                if not self.is_due(producer, letter):
                    break
                self.open(producer, self.inbox.take_value(producer))

    def has_messages(self) -> bool:
        """Whether something has come that was not opened."""
        if self.inbox.has_answers(self.answering):
            return True
        newest = [(p, self.inbox.value(p)) for p in self.producers]
        return any(letter is not None and self.is_due(p, letter) for p, letter in newest)

    def open(self, producer: int, letter: Letter) -> None:
        """Values that nobody waits for."""
        pending = self.ledger.pending
        for older in [j for s, j in pending.items() if s < letter.step]:
            self.miss(older, producer)  # its values were dropped
        if letter.payload is None:
            return
        job = pending.get(letter.step)
        if job is not None and self.ledger.is_owed(letter.step, producer):
            self.see(job, producer, letter.payload)
        elif letter.step >= self.steps:
            self.inbox.keep(producer, letter.step, letter.payload)
        else:
            self.outbox.answer(producer, letter.step, None)

    def is_due(self, producer: int, letter: Letter) -> bool:
        """Whether a value was predicted, or belongs to an earlier step: whoever waits, it is
        opened.
        """
        return self.draining or producer in self.predicted or letter.step < self.steps

    def hear(self, step: int, stage: int, answer: Answer | None) -> None:
        """A stage has answered about a batch."""
        job = self.ledger.pending.get(step)
        if job is not None:
            job.answers.hear(stage, answer)
        elif step >= self.steps:  # of a stage that did not wait for this one's values
            self.inbox.keep_answer(step, stage, answer)

    def see(self, job: Job, producer: int, values: Values) -> None:
        """Values that were predicted have come: their producer waits for the answer."""
        job.see(values)
        self.ledger.came(job.step, producer)
        self.answer(job)

    def miss(self, job: Job, producer: int) -> None:
        """Values that were predicted will not come."""
        if self.ledger.misses(job.step, producer):
            self.ledger.settled(job.step, producer)
            job.miss(producer)

    def answer(self, job: Job) -> None:
        """Send what is known and not sent yet."""
        for stage in self.ledger.due(job.step):
            known, answer = job.answers.answer(stage)
            if known:
                self.ledger.settled(job.step, stage)
                self.outbox.answer(stage, job.step, answer)
