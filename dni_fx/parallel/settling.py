"""What a stage does with its batches when answers come: pull back, answer, learn, finish."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime.objective import Metrics
from .desk import Desk
from .job import Job
from .learning import StageLearner


class OwnRandom:
    """A stream of random numbers of a stage's own; it follows from the seed and the stage alone.

    Args:
        index: of the stage.

    Attributes:
        state: of the generator, between two regions.
    """

    def __init__(self, index: int) -> None:
        seed = (torch.initial_seed() + 7919 * (index + 1)) % 2**63
        self.state: Tensor = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw from it."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)


class Settling:
    """Settles the batches of one stage.

    Args:
        desk: its correspondence.
        learner: its updates.
        metrics: what was found of the predictions.
        random: its own random numbers; None where it draws from the process's.
    """

    def __init__(
        self, desk: Desk, learner: StageLearner, metrics: Metrics, random: OwnRandom | None
    ) -> None:
        self.desk, self.learner, self.metrics, self.random = desk, learner, metrics, random

    @contextlib.contextmanager
    def running(self, what: str, step: int) -> Iterator[None]:
        """The stage's own random numbers, where it has them, and the time that it takes."""
        draws = contextlib.nullcontext() if self.random is None else self.random.drawn()
        with self.learner.watch.spending(what, step), draws:
            yield

    def settle(self, limit: int, loss: Tensor | None) -> None:
        """Pull back what was late, train the sources, and answer, for the batches up to one.

        Args:
            limit: the step of the last of them.
            loss: of the newest batch, where the model's output is.
        """
        ledger = self.desk.ledger
        for step, job in [(s, j) for s, j in ledger.pending.items() if s <= limit]:
            complete = job.answers.is_complete
            if job.setting.share > 0 and not complete:
                continue
            with self.running("backward", step):
                self._settle(job, loss)
            if complete and not job.waits and ledger.is_paid(step):
                ledger.close(step)
            elif ledger.is_paid(step):
                job.forget()

    def _settle(self, job: Job, loss: Tensor | None) -> None:
        learner, desk = self.learner, self.desk
        at_once = learner.objective.accumulate == 1
        late = job.waits and job.answers.is_complete and not job.is_locked
        if late and learner.late and at_once:
            learner.update(desk.steps, loss, desk.ledger.pending.values())  # a step of its own
            learner.drop_gradients()
        learner.late |= late
        job.advance(desk.steps - 1)
        desk.answer(job)
        if learner.losses and at_once:
            learner.update_sources()  # every answer makes a step of its own
        learner.learn(job, desk.steps - 1 - job.step)
        if job.measure:
            self.metrics.found.update(job.compare())

    def give_up(self, most: int) -> None:
        """Batches whose values come so late that as many newer ones wait: their answers are not
        sent.

        Args:
            most: how many batches may wait for values.
        """
        ledger = self.desk.ledger
        unseen = [j for s, j in ledger.pending.items() if ledger.is_unseen(s)]
        for job in unseen[: max(0, len(unseen) - most)]:
            job.answers.lose()
            for stage in ledger.close(job.step):
                self.desk.outbox.answer(stage, job.step, None)
