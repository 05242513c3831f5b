"""What a trainer of a whole model needs where stages are not updated together: on threads, or in
visits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..residency.absent import AbsentError
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Mode, Schedule, Threads
from .capping import MemoryCap
from .executors import find_late_delays
from .threads import OnThreads
from .visits import Visiting, Visits


class Beside:
    """Makes the executor at the first step, and ends it.

    Args:
        decoupled, objective, optimizers, metrics: as for :class:`~dni_fx.parallel.executors.Team`.
        visiting: how stages are visited; None where they are not.
        memory_cap: bytes to keep to; what ``visiting`` leaves open is chosen by it.

    Attributes:
        cap: what chooses; None without a cap, or on threads.
        executor: at work; None before the first step, and once it has ended.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        visiting: Visiting | None,
        memory_cap: float | None = None,
    ) -> None:
        self._parts = (decoupled, objective, optimizers, metrics)
        self._metrics, self.visiting = metrics, visiting
        self.executor: OnThreads | Visits | None = None
        self.cap: MemoryCap | None = None
        if memory_cap is not None and visiting is not None:
            self.cap = MemoryCap(memory_cap, visiting)

    def keep_cap(self) -> None:
        """Choose how stages are visited, once they and their optimisers exist.

        Raises:
            DecouplingError: the cap cannot be kept.
        """
        if self.cap is not None and self.cap.forecast is None:
            self.visiting = self.cap.choose(self._parts[0], self._parts[2])

    def prepare_for(self, args: Any, kwargs: Any) -> None:
        """Before a batch is bound: where its kind is new, and guards or a trace look at the model,
        nothing is under way and all of it is in memory.

        Raises:
            DecouplingError: it is larger than what a cap was reckoned for.
        """
        if self.cap is not None:
            self.cap.check((args, kwargs))
        try:
            known = self._parts[0].has_graph_for(*args, **kwargs)
        except AbsentError:  # a guard is asked for the first time about such a batch
            known = False
        if not known:
            self.gather()

    def check(self, schedule: Schedule) -> bool:
        """Whether stages are not updated together, before a step.

        Raises:
            DecouplingError: threads and visits are both asked for, or modes were changed while
                batches are under way.
        """
        on_threads = isinstance(schedule, Threads)
        if on_threads and self.visiting is not None:
            raise DecouplingError(
                "update=, resident= and sweep= visit one stage after the other, and "
                "schedules.Threads runs them at once: leave one of them out"
            )
        if self.executor is not None:
            self.executor.check_modes()
        return on_threads or self.visiting is not None

    def step(
        self,
        owner: object,
        schedule: Schedule,
        steps: int,
        mode: Mode,
        values: dict[str, Any],
        target: Any,
    ) -> StepReport:
        """Hand over a batch.

        Args:
            owner: the trainer; when nobody holds it any more, the executor ends.
            schedule: what it goes by.
            steps: batches before this one.
            mode, values, target: of the batch.
        """
        try:
            executor = self._at_work(owner, schedule, steps)
            executor.submit(executor.make_jobs(steps, mode, values, target))
            self._metrics.requested = False
            return executor.report(steps + 1)
        except BaseException:
            self.close()
            raise

    def in_memory(
        self, owner: object, schedule: Schedule, steps: int, stage: int
    ) -> AbstractContextManager[None]:
        """A region in which a stage is in memory, while nothing is under way; other arguments as
        for :meth:`step`.
        """
        if self.visiting is None or isinstance(schedule, Threads):
            return nullcontext()
        executor = self._at_work(owner, schedule, steps)
        assert isinstance(executor, Visits)
        return executor.residency.visit(stage)

    @property
    def sweep(self) -> int | None:
        """Batches of a visit while stages are out of memory; None where all are there."""
        executor = self.executor
        if not isinstance(executor, Visits) or not executor.residency.away:
            return None
        return executor.sweep

    def begin_anew(self, steps: int) -> None:
        """Another state was loaded, after so many steps."""
        for worker in self.executor.workers.values() if self.executor else ():
            worker.desk.steps = steps

    def _at_work(self, owner: object, schedule: Schedule, steps: int) -> OnThreads | Visits:
        if self.executor is None:
            self.executor = self._make(schedule, steps)
            self.executor.end_with(owner)
        return self.executor

    def _make(self, schedule: Schedule, steps: int) -> OnThreads | Visits:
        if isinstance(schedule, Threads):
            return OnThreads(*self._parts, schedule.flow, steps)
        assert self.visiting is not None
        return Visits(*self._parts, steps, self.visiting)

    def drain(self) -> int:
        """Finish what is under way; returns how many batches waited."""
        if self.executor is None:
            return 0
        try:
            return self.executor.drain()
        except BaseException:
            self.close()
            raise

    def find_delays(self, schedule: Schedule) -> dict[int, int] | None:
        """In how many steps each stage will have pulled back a batch, on threads."""
        if not isinstance(schedule, Threads):
            return None
        workers = {} if self.executor is None else self.executor.workers
        return find_late_delays(self._parts[0], schedule.flow.staleness, workers)

    def gather(self) -> None:
        """Finish what is under way, and bring all stages into memory."""
        if self.executor is not None:
            self.drain()
            self.executor.gather()

    def close(self) -> None:
        """End it without waiting for what is under way."""
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.close()
