"""Executor: each stage in one visit for several batches, in the caller's thread.

A stage takes its batches one after the other, each with an update of its own, before the next
stage takes them. So nothing of it is needed in memory between two visits: not its weights, not what
its optimisers keep, and no gradient. What comes back to its sources waits for the next visit, where
they learn from it before they are asked again; with one batch a visit that is what
:class:`dni_fx.Trainer` does otherwise, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..residency.residency import Residency
from ..residency.store import FolderStore, HostStore, Store
from ..runtime.emitted import keep_modes
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Flow
from .executors import Team, named, run_posted, shared_state
from .job import Job
from .mailbox import Mail
from .owning import PostedModes
from .worker import StageWorker


@dataclass(frozen=True)
class Visiting:
    """How stages are visited.

    Attributes:
        sweep: batches of a visit.
        most: how many stages may be in memory; None for all.
        store: where the others are: ``"host"``, or a folder.
    """

    sweep: int
    most: int | None
    store: str | os.PathLike[str]

    @classmethod
    def checked(
        cls,
        update: str,
        resident: int | None,
        store: str | os.PathLike[str],
        sweep: int,
        *,
        capped: bool = False,
    ) -> Visiting | None:
        """Of a trainer's arguments; None where stages are updated together, which they are not
        under a cap.

        Raises:
            DecouplingError: arguments out of range.
        """
        if update not in ("together", "at_once"):
            raise DecouplingError(f"update= is 'together' or 'at_once', not {update!r}")
        for name, number in (("sweep", sweep), ("resident", 1 if resident is None else resident)):
            if type(number) is not int or number < 1:
                raise DecouplingError(f"{name}= is a whole number, at least 1, not {number!r}")
        if not isinstance(store, str | os.PathLike):
            raise DecouplingError(f"store= is 'host' or a folder, not {store!r}")
        if update == "together" and resident is None and sweep == 1 and not capped:
            return None
        return cls(sweep, resident, store)

    def make_store(self) -> Store:
        """The store, empty."""
        return HostStore() if self.store == "host" else FolderStore(self.store)


class Visits(Team):
    """Executor: each stage in one visit for several batches.

    Args:
        decoupled, objective, optimizers, metrics, steps: as for :class:`Team`.
        visiting: how stages are visited.

    Attributes:
        residency: which stages are in memory.
        waiting: batches of the visits to come, each as the stages see it.

    Raises:
        DecouplingError: a parameter or buffer that several stages use, a source that waits,
            or synthetic inputs.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        steps: int,
        visiting: Visiting,
    ) -> None:
        _check(decoupled)
        stages, mail = range(len(decoupled.stages)), Mail()
        flow = Flow(queue=visiting.sweep)
        super().__init__(decoupled, objective, optimizers, metrics, flow, stages, mail, steps)
        self.sweep, self.waiting = visiting.sweep, list[list[Job]]()
        self.post_rates(optimizers)
        self._modes = PostedModes(decoupled.model)
        tensors = [functools.partial(_tensors_of, decoupled, optimizers, k) for k in stages]
        count = len(stages) if visiting.most is None else visiting.most
        waiting = [functools.partial(_learners_of, decoupled, k) for k in stages]
        self.residency = Residency(tensors, waiting, count, visiting.make_store())

    def _in_turn_with(self, worker: StageWorker) -> list[StageWorker]:
        return [worker]  # the others may not be in memory

    def submit(self, jobs: list[Job]) -> None:
        """Take a batch; the stages are visited once there are enough.

        Raises:
            DecouplingError: a stage waits for others within the step.
        """
        for job in jobs:
            if job.is_locked:
                raise DecouplingError(
                    f"stage_{job.index} waits within the step for what later stages send (exact "
                    "steps, the true gradient's share, feedback), so its work is not done in one "
                    "visit: leave out resident=, sweep= and update=, or use sources and a schedule "
                    "that do not wait"
                )
        modes = self._modes.post()
        self.post(jobs)
        for job in jobs:
            job.modes = modes
        self.waiting.append(jobs)
        if len(self.waiting) >= self.sweep:
            self._visit_all()

    def _visit_all(self) -> None:
        batches, self.waiting = self.waiting, []
        with keep_modes(), torch.enable_grad():
            for worker in self.workers.values():
                with self._at_work(worker):
                    for jobs in batches:
                        job = jobs.pop(0)  # with all that it holds, once it is done
                        worker.learner.take_rates(job)
                        run_posted(worker, job)
                        del job
        self._modes.rest()

    @contextlib.contextmanager
    def _at_work(self, worker: StageWorker) -> Iterator[None]:
        """A visit: first its sources learn from what has come back; last, no gradient is left
        but those of an unfinished update.
        """
        with self.residency.visit(worker.index):
            with named(worker.index, worker.desk.steps - 1):
                worker.attend()
                if worker.desk.steps % self.objective.accumulate == 0:
                    worker.learner.update_sources()
            yield
            worker.clear()

    def drain(self) -> int:
        """Visit all stages for the batches that wait, and once more for what comes back. Returns
        how many batches waited.
        """
        count = len(self.waiting)
        if count:
            self._visit_all()
        with keep_modes(), torch.enable_grad():
            for worker in self.workers.values():
                if worker.desk.ledger.pending:
                    with self._at_work(worker):
                        pass
        return count

    def gather(self) -> None:
        """Bring all stages into memory, until the next step."""
        self.residency.gather()

    def check_modes(self) -> None:
        """Refuse modes that were changed while batches wait."""
        self._modes.check()

    def end_with(self, owner: object) -> None:
        """Bring all stages into memory when nobody holds the owner any more; at the interpreter's
        end, where it may not fit and nobody needs it, only clear the store.
        """
        ending = weakref.finalize(owner, self.residency.close)
        ending.atexit = False
        weakref.finalize(self.residency, self.residency.store.clear)

    def close(self) -> None:
        """Bring all stages into memory, and drop the batches that wait."""
        self.waiting = []
        self.residency.close()


def _check(decoupled: Decoupled) -> None:
    """Whether every stage's work is done in one visit."""
    for name, stages in shared_state(decoupled):
        raise DecouplingError(
            f"{name!r} is used by stages {', '.join(map(str, stages))}, but a stage is updated in "
            "its own visit, and may be out of memory after it: cut so that they are one stage, or "
            "leave out resident=, sweep= and update="
        )
    for name, source in decoupled.sources.items():
        if source.asks.wait is not None or source.asks.exact:
            raise DecouplingError(
                f"the source at {name!r} ({type(source).__name__}) has its stage wait for what "
                "later stages send, so that its work is not done in one visit: use one that "
                "answers at once (a regression, 'local', 'zero'), or leave out resident=, sweep= "
                "and update="
            )
    if decoupled.inputs:
        raise DecouplingError(
            "synthetic inputs have no use where stages run one after the other: leave out inputs=, "
            "or resident=, sweep= and update="
        )


def _learners_of(decoupled: Decoupled, stage: int) -> list[Tensor]:
    """Weights and buffers of its sources."""
    sources = decoupled.stages[stage].sources.values()
    return [t for s in sources for t in (*s.parameters(), *s.buffers())]


def _tensors_of(decoupled: Decoupled, optimizers: StageOptimizers, stage: int) -> list[Tensor]:
    """What a stage needs in memory while it works."""
    own, names = decoupled.stages[stage], [n for n, _ in decoupled.named_learners([stage])]
    parts: list[nn.Module] = [own.module, *own.sources.values()]
    found: list[Tensor] = [t for p in parts for t in (*p.parameters(), *p.buffers())]
    found += own.parameters()
    found += [t.grad for t in found if t.grad is not None]
    for optimizer in (optimizers.stages.get(own.name), *map(optimizers.sources.get, names)):
        states = [] if optimizer is None else optimizer.state.values()
        found += [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return found
