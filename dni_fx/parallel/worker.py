"""One stage at work beside the others: waits for what it needs, runs its batches, and learns from
the answers.

What one batch goes through in a stage::

                 values of a producer dropped
    [submitted] ------------------------------> [left out]      empty answers to the others
        | begin: all awaited values are here
        v
    [run] ---- values to the consumers (Outbox), answers that are known to the producers
        |
        v           an answer, or a value that was predicted, comes (Inbox)
    [pending] <--------------------------------------------------.
        | settle: due, or as soon as it comes                     |
        |   1. a late gradient makes an update of its own         |
        |   2. advance: pull back what waited                     |
        |   3. answer the producers that are owed one (Ledger)    |
        |   4. the sources learn                                  |
        v                                                         |
    all answers here, nothing held, nobody owed? --- no ----------'
        | yes
        v
    [finished]

A stage waits in one place only, :meth:`StageWorker.until`. While it waits it settles for all stages
in its thread, since what it waits for may wait for an answer that one of those owes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..runtime.objective import Metrics
from .desk import Desk
from .job import Job, Values
from .learning import StageLearner
from .limits import Flow
from .mailbox import Mail
from .settling import OwnRandom, Settling


class StageWorker:
    """A stage's side of decoupled training.

    Args:
        index: of the stage.
        mail: the messages of the process.
        flow: how far it may run ahead.
        lag: steps after which answers are learnt from; None: whenever they come.
        learner: the stage's updates.
        metrics: what was found of the predictions.
        steps: batches that are done already.
        own_random: whether the stage has a stream of random numbers of its own.

    Attributes:
        team: all workers in the same thread.
        desk: its correspondence.
        begun, missed: number of batches begun, and of those left out.
        loss, output: of the newest batch, where the model's output is.
        settling: what is done with its batches when answers come.
    """

    def __init__(
        self,
        index: int,
        mail: Mail,
        flow: Flow,
        lag: int | None,
        learner: StageLearner,
        metrics: Metrics,
        steps: int,
        own_random: bool = False,
    ) -> None:
        self.index, self.mail, self.flow, self.lag = index, mail, flow, lag
        self.learner = learner
        self.desk = Desk(index, mail, flow, lag, steps)
        self.team: Sequence[StageWorker] = [self]
        self.begun = self.missed = 0
        self.loss: Tensor | None = None
        self.output: Any = None
        random = OwnRandom(index) if own_random else None
        self.settling = Settling(self.desk, learner, metrics, random)
        self._kept: list[tuple[nn.Parameter, Tensor | None]] = []  # that a step must not change

    @property
    def steps(self) -> int:
        """Batches that the stage has begun."""
        return self.desk.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.desk.steps = steps

    @property
    def name(self) -> str:
        """``stage_0``, ``stage_1``, ..."""
        return self.learner.name

    # ---- one batch -------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop the gradients of a finished update; a late one that came since makes its own."""
        if self.learner.late:
            self.update()
        if self.steps % self.learner.objective.accumulate == 0:
            self.learner.drop_gradients()

    def begin(self, job: Job) -> bool:
        """Take what the batch needs, run forward and pull back what is known at once.

        Returns:
            Whether the batch was run; not if what it needs was dropped.
        """
        self.desk.meet(job)
        self.steps = job.step
        self.begun += 1
        if self.flow.policy == "wait":
            for consumer in job.routes.consumers:
                room = _bound(self.desk.outbox.has_room, consumer)
                self.until(room, f"an answer of stage_{consumer}")
        received = self._receive(job)
        self.steps += 1
        if received is None:
            self.missed += 1
            self.desk.leave_out(job)
            return False
        awaited, producers = job.routes.awaited, job.routes.producers
        owed = {p: p in awaited or p not in producers for p in job.routes.answered}
        self.desk.ledger.open(job, owed)
        if job.setting.share > 0 and not job.batch.is_active:
            # All have to run for the true gradient.
            grads = [(p, p.grad) for p in self.learner.parameters()]
            self._kept = [(p, None if g is None else g.clone()) for p, g in grads]
        with self.settling.running("forward", job.step):
            job.start(received, lambda values: self.desk.send_values(job, values))
        for producer in self.desk.predicted:
            known = self.desk.inbox.kept(producer, job.step)
            if known is not None:
                self.desk.see(job, producer, known)
            elif self.desk.inbox.ended.get(producer, 0) > job.step:
                self.desk.miss(job, producer)
        for stage, answer in self.desk.inbox.kept_answers(job.step):
            job.answers.hear(stage, answer)
        if job.batch.is_last:
            self.loss, self.output = job.state.loss, job.state.output
        self.desk.answer(job)
        return True

    def skip(self, job: Job) -> None:
        """Leave out a batch that there is no time for, and say so to everybody who waits."""
        self.desk.meet(job)
        self.steps = job.step + 1
        self.desk.pass_by(job)
        self.missed += 1
        self.desk.leave_out(job)
        self.desk.collect()

    def finish(self, job: Job) -> None:
        """Learn from the answers that are there, or due, and update."""
        pending = self.desk.ledger.pending
        if job.step in pending and job.is_locked:
            self.until(lambda: job.answers.is_complete, f"the answers to batch {job.step}")
        if self.lag is None:
            self.desk.collect()
            if self.flow.policy == "drop_oldest":
                self.settling.give_up(self.flow.queue)
            else:
                unseen = [s for s in pending if self.desk.ledger.is_unseen(s)][
                    : -self.desk.outbox.room
                ]
                seen = lambda: not any(map(self.desk.ledger.is_unseen, unseen))  # noqa: E731
                if unseen:
                    self.until(seen, "the values that were predicted")
            self.settling.settle(job.step, self.loss)
        else:
            self._settle_until(job.step - (0 if job.is_locked else self.lag))
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []
        self.update()

    def update(self) -> None:
        """Step the optimisers where an update is due."""
        self.learner.update(self.steps, self.loss, self.desk.ledger.pending.values())

    def drain(self, step: int) -> None:
        """Settle one of the batches that are pending."""
        if step in self.desk.ledger.pending:
            self._settle_until(step)
            self.update()

    def end(self) -> None:
        """No batch comes for now: what was not sent is not sent any more, and nobody need wait for
        it.
        """
        self.desk.draining = True
        for consumer in sorted(self.desk.consumers):
            for step in self.desk.outbox.close(consumer, self.steps):
                self.desk.hear(step, consumer, None)

    def rest(self) -> None:
        """After the last batch is settled: until nobody has anything to say to this stage, or to
        hear from it.
        """
        ended = self.desk.inbox.ended
        self.until(
            lambda: (
                self.desk.outbox.is_empty
                and all(ended.get(p, 0) >= self.steps for p in self.desk.producers)
            ),
            "the end of what is under way",
        )
        self.desk.draining = False
        self.clear()

    # ---- values ----------------------------------------------------------------------------------

    def _receive(self, job: Job) -> Values | None:
        """What the producers sent; None where some of it was dropped."""
        received: Values = {}
        taken = []
        for producer in sorted(job.routes.awaited):
            found = self.desk.inbox.kept(producer, job.step) or self._next(producer, job.step)
            if found is not None:
                taken.append(producer)
                received.update(found)
        if len(taken) == len(job.routes.awaited):
            return received
        for producer in taken:
            self.desk.outbox.answer(producer, job.step, None)
        return None

    def _next(self, producer: int, step: int) -> Values | None:
        """A producer's values of a batch; None where a later message shows that they are lost."""
        while True:
            what = f"the values of stage_{producer} for batch {step}"
            self.until(lambda: self.desk.inbox.value(producer) is not None, what)
            letter = self.desk.inbox.value(producer)
            assert letter is not None
            if letter.step > step:
                return None
            self.desk.inbox.take_value(producer)
            if letter.payload is not None and letter.step == step:
                return dict(letter.payload)
            if letter.payload is not None:
                # Of a batch that was left out since another stage's values were missing.
                self.desk.outbox.answer(producer, letter.step, None)

    def _settle_until(self, step: int) -> None:
        """Wait for everything that is due for the batches up to one, and learn from it."""
        ledger = self.desk.ledger
        due = [j for s, j in ledger.pending.items() if s <= step]
        self.until(
            lambda: all(j.answers.is_complete and not ledger.is_unseen(j.step) for j in due),
            f"what comes back for batch {step}",
        )
        self.settling.settle(step, self.loss)

    # ---- waiting and measuring -------------------------------------------------------------------

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Open messages, and learn from them where no staleness is fixed, until something is so.

        Those of all stages in this thread: what is waited for may wait for an answer that another
        of them owes.

        Args:
            ready: asked after each message that comes.
            what: is waited for, for messages.

        Raises:
            ParallelError: some stage has failed, or nothing comes.
        """
        self.desk.collect()
        while not ready():
            for worker in reversed(self.team):
                worker.attend()
            with self.learner.watch.spending("wait", self.steps):
                self.mail.wait(
                    lambda: ready() or any(w.desk.has_messages() for w in self.team),
                    f"{self.name}: {what}",
                )
            self.desk.collect()

    def attend(self) -> None:
        """Open what has come while there is no batch: others may wait for what is owed for it."""
        self.desk.collect()
        if self.lag is None:
            self.settling.settle(self.steps, self.loss)


def _bound(ask: Callable[[int], bool], stage: int) -> Callable[[], bool]:
    return lambda: ask(stage)
