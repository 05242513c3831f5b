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
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..schedules import Flow
from .job import Job, Values
from .learning import StageLearner
from .undo import ForwardState


class StageWorker:
    """A stage's side of decoupled training.

    Attributes:
        lag: steps after which answers are learnt from; None: whenever they come.
        team: all workers in the same thread.
        begun, missed: number of batches begun, and of those left out.
        output: of the newest batch, where the model's output is.
    """

    def __init__(self, learner: StageLearner, flow: Flow, lag: int | None) -> None:
        self.learner, self.flow, self.lag = learner, flow, lag
        self.desk, self.index, self.name = learner.desk, learner.desk.index, learner.name
        self.team: Sequence[StageWorker] = [self]
        self.begun = self.missed = 0
        self.output: Any = None
        self._kept: list[tuple[nn.Parameter, Tensor | None]] = []  # that a step must not change
        self._held: list[tuple[nn.Parameter, Tensor | None]] = []  # of an unfinished update
        self._undo: ForwardState | None = None

    def clear(self) -> None:
        """Drop the gradients of a finished update; a late one that came since makes its own."""
        if self.learner.late:
            self.learner.update()
        if self.desk.steps % self.learner.objective.accumulate == 0:
            self.learner.drop_gradients()

    def begin(self, job: Job) -> None:
        """Take what the batch needs, run forward and pull back what is known at once; or leave it
        out, where that was dropped.
        """
        desk = self.desk
        desk.meet(job)
        desk.steps = job.step
        self.begun += 1
        if self.flow.policy == "wait":
            for consumer in job.routes.consumers:
                room = partial(desk.outbox.has_room, consumer)
                self.until(room, f"an answer of stage_{consumer}")
        received = self._receive(job)
        desk.steps += 1
        if received is None:
            self.missed += 1
            desk.leave_out(job)
            return
        desk.open(job)
        if job.setting.share > 0 and not job.batch.is_active:
            # All have to run for the true gradient.
            grads = [(p, p.grad) for p in self.learner.parameters()]
            self._kept = [(p, None if g is None else g.clone()) for p, g in grads]
        self.learner.clip_norm = job.clip_norm
        self._keep(job)
        self._check_modes(job)
        with self.learner.running("forward", job.step):
            job.start(received, partial(desk.send_values, job))
        self._check_modes(job)
        desk.catch_up(job)
        if job.batch.is_last:
            self.learner.loss, self.output = job.state.loss, job.state.output
        desk.answer(job)

    def skip(self, job: Job) -> None:
        """Leave out a batch that there is no time for, and say so to everybody who waits."""
        self.desk.meet(job)
        self.desk.steps = job.step + 1
        self.desk.pass_by(job)
        self.missed += 1
        self.desk.leave_out(job)
        self.desk.collect()

    def finish(self, job: Job) -> None:
        """Learn from the answers that are there, or due, and update."""
        desk = self.desk
        if job.step in desk.ledger.pending and job.is_locked:
            self.until(lambda: job.answers.is_complete, f"the answers to batch {job.step}")
        if self.lag is not None:
            self._settle_until(job.step - (0 if job.is_locked else self.lag))
        else:
            if self.flow.policy == "drop_oldest":
                desk.collect()
                self.learner.give_up(self.flow.queue)
            else:
                self.until(
                    lambda: len(desk.ledger.unseen()) <= desk.outbox.room,
                    "the values that were predicted",
                )
            self.learner.settle(job.step)
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []
        if self._undo is not None:
            self.learner.check(self._undo.watched)
        self._check_modes(job)
        self.learner.update()
        if self._undo is not None:
            self._undo.accept()
        self._held = []

    def _keep(self, job: Job) -> None:
        """What is put back where the batch is refused."""
        setting, module = job.setting, job.batch.stage.module
        if self._undo is None or self._undo.module is not module:
            self._undo = ForwardState(module, setting.changes)
        self._undo.keep()
        self._held = self.learner.held_gradients(job.step)

    def _check_modes(self, job: Job) -> None:
        """Whether they are those that the batch was posted with."""
        self.learner.owned.check_modes(job.setting, self.index, job.modes)

    def put_back(self) -> None:
        """After an error: what a batch that is not finished has written, and the gradients of an
        unfinished update.
        """
        if self._undo is not None:
            self._undo.put_back()
        for parameter, gradient in self._held:
            parameter.grad = gradient
        self._kept = self._held = []

    def drain(self, step: int) -> None:
        """Settle one of the batches that are pending."""
        if step in self.desk.ledger.pending:
            self._settle_until(step)
            self.learner.update()

    def end(self) -> None:
        """No batch comes for now: what was not sent will not be, and nobody need wait for it."""
        self.desk.draining = True
        for consumer in sorted(self.desk.consumers):
            for step in self.desk.outbox.close(consumer, self.desk.steps):
                self.desk.hear(step, consumer, None)

    def rest(self) -> None:
        """Wait, all being settled, until nobody has anything to say to this stage, or to hear."""
        desk = self.desk
        self.until(
            lambda: (
                desk.outbox.is_empty
                and all(desk.inbox.ended.get(p, 0) >= desk.steps for p in desk.producers)
            ),
            "the end of what is under way",
        )
        desk.draining = False
        self.clear()

    def _receive(self, job: Job) -> Values | None:
        """What the producers sent; None where some of it was dropped."""
        desk, found = self.desk, dict[int, Values]()
        for producer in sorted(job.routes.awaited):
            ahead = desk.inbox.ahead.pop((producer, job.step), None)
            values = ahead or self._next(producer, job.step)
            if values is not None:
                found[producer] = values
        if len(found) == len(job.routes.awaited):
            return {name: value for values in found.values() for name, value in values.items()}
        for producer in found:
            desk.outbox.answer(producer, job.step, None)
        return None

    def _next(self, producer: int, step: int) -> Values | None:
        """A producer's values of a batch; None where a later letter shows that they are lost."""
        desk, what = self.desk, f"the values of stage_{producer} for batch {step}"
        while True:
            self.until(lambda: desk.inbox.value(producer) is not None, what)
            letter = desk.inbox.value(producer)
            assert letter is not None
            if letter.step > step:
                return None
            values: Values | None = desk.inbox.take_value(producer).payload
            if values is not None and letter.step == step:
                return values
            if values is not None:
                # Of a batch that was left out since another stage's values were missing.
                desk.outbox.answer(producer, letter.step, None)

    def _settle_until(self, step: int) -> None:
        """Wait for everything that is due for the batches up to one, and learn from it."""
        ledger = self.desk.ledger
        self.until(
            lambda: (
                all(job.answers.is_complete for job in ledger.up_to(step))
                and not any(job.step <= step for job in ledger.unseen())
            ),
            f"what comes back for batch {step}",
        )
        self.learner.settle(step)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Open letters, and learn from them where no staleness is fixed, until something is so.

        Those of all stages in this thread: what is waited for may wait for an answer that another
        of them owes. As ``Mail.wait`` besides.
        """
        desk, team = self.desk, self.team
        desk.collect()
        while not ready():
            for worker in reversed(team):
                worker.attend()
            with self.learner.watch.spending("wait", desk.steps):
                desk.mail.wait(
                    lambda: ready() or any(w.desk.has_letters() for w in team),
                    f"{self.name}: {what}",
                )
            desk.collect()

    def attend(self) -> None:
        """Open what has come while there is no batch: others may wait for what is owed for it."""
        self.desk.collect()
        if self.lag is None:
            self.learner.settle(self.desk.steps)
