"""The stages of one process at work: what executors share, and the one in the caller's thread."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.settings import casts
from ..reports.steps import StepReport
from ..runtime.batch_state import Setting, Settings
from ..runtime.delays import find_delays, moved_along
from ..runtime.emitted import keep_modes
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Flow, Mode
from .desk import Desk
from .job import Job, Routes, Values
from .learning import StageLearner
from .mailbox import Mail, ParallelError
from .rates import Posted
from .worker import StageWorker

RowsOf = Callable[[int, Values, Any], tuple[Values, Any]]


class Team:
    """Workers for some of the stages, and the batches as each of them sees them.

    Args:
        stages: indices of the stages, ascending.
        steps: batches that are done already.
        rows_of: of the model's inputs and the target, the rows that a stage works on here.

    Attributes:
        workers: by stage.
        copies: the stages' own copies of synthetic inputs that others train, by stage and by the
            identity of the original (graphs may name its interface differently).
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        flow: Flow,
        stages: Iterable[int],
        mail: Mail,
        steps: int = 0,
        own_random: bool = False,
        rows_of: RowsOf = lambda _, values, target: (values, target),
    ) -> None:
        self.decoupled, self.objective, self.optimizers = decoupled, objective, optimizers
        self.metrics, self.mail, self.flow = metrics, mail, flow
        self.copies: dict[int, dict[int, Any]] = {}
        self._rows_of = rows_of
        self._known: tuple[Setting, dict[int, Routes], dict[str, str]] | None = None
        self.workers: dict[int, StageWorker] = {}
        lags = find_lags(decoupled, flow.staleness)
        for k in stages:
            desk = Desk(k, mail, flow, lags[k], steps)
            parts = (objective, optimizers, metrics, flow.discount, own_random)
            self.workers[k] = StageWorker(StageLearner(desk, *parts), flow, lags[k])
        for worker in self.workers.values():
            worker.team = self._in_turn_with(worker)
            check_apart(decoupled, len(worker.team))
        self._last = self.workers.get(len(decoupled.stages) - 1)
        scaled = None if self._last is None else self._last.learner.scaled
        here = None if self._last is None else [w.index for w in self._last.team]
        self._settings = Settings(decoupled.graphs, objective, scaled, here, ahead=self._ahead)

    def _in_turn_with(self, worker: StageWorker) -> list[StageWorker]:
        """The workers in the same thread."""
        return list(self.workers.values())

    def _ahead(
        self, stage: int, steps: int, own: Collection[torch.nn.Parameter]
    ) -> contextlib.AbstractContextManager[None]:
        """As of the stages' optimisers, by the delay that there is."""
        worker = self.workers[stage]
        delay = worker.learner.delay or 0 if worker.lag is None else worker.lag
        updates = math.ceil(delay * self.optimizers.unit)
        return moved_along(worker.learner.optimizer, own, updates)

    def make_jobs(self, step: int, mode: Mode, values: Values, target: Any) -> list[Job]:
        """A batch, whole, as each of the stages sees it; the graph that fits it must be active.

        Raises:
            DecouplingError: a stage would wait within the step for others that may leave it out.
        """
        jobs, taught = [], set[str]()
        setting = self._settings.of(mode)
        if self._known is None or self._known[0] is not setting:
            every = {k: Routes(setting, k) for k in self.workers}
            self._known = setting, every, self.decoupled.graphs.learner_names()
        _, every, planned = self._known
        for k, routes in every.items():
            own = self.copies.get(k, {})
            inputs = {n: own.get(id(s), s) for n, s in setting.inputs.items()}
            # What several stages use learns in the first of them, or each has its copy.
            names = [n for n in setting.stages[k].inputs if n in inputs]
            teaches = {n for n in names if id(setting.inputs[n]) in own or n not in taught}
            taught |= teaches
            mine, aim = self._rows_of(k, values, target)
            context, measure = self.objective.context(aim), self.metrics.is_due(step)
            made = (setting, k, step, routes, inputs, teaches, planned, measure)
            jobs.append(Job(*made, mine, aim, context, clip_norm=self.optimizers.clip_norm))
            if jobs[-1].is_locked and self.flow.policy == "drop_oldest":
                raise DecouplingError(
                    f"stage_{k} waits for others within the step (exact steps, 'mix', "
                    "'feedback'), who may leave it out: pass policy='wait', or use sources that do "
                    "not wait"
                )
        return jobs

    def post_rates(self, optimizers: StageOptimizers) -> None:
        """From now on every optimiser is stepped by one stage, with settings that come with the
        batches.
        """
        known = set[str]()
        for k, worker in self.workers.items():
            own = {n: optimizers.sources.get(n) for n, _ in self.decoupled.named_learners([k])}
            own[worker.name] = optimizers.stages.get(worker.name)
            posted = {n: Posted(o) for n, o in own.items() if o is not None and n not in known}
            known |= posted.keys()
            worker.learner.posted = posted

    def post(self, jobs: list[Job]) -> None:
        """Write down what the caller has set for a batch: optimisers' settings, autocast."""
        now = [torch.autocast(*cast) for cast in casts() if cast[-1]]
        for job in jobs:
            job.casts = now
            posted = self.workers[job.index].learner.posted
            job.rates = {name: p.post() for name, p in posted.items()}

    def report(self, steps: int) -> StepReport:
        """Of the newest batch that the last stage has finished, where that stage is among these."""
        loss, last = torch.tensor(math.nan), self._last
        if last is not None and last.learner.loss is not None:
            loss = last.learner.loss * (self.objective.accumulate / last.learner.fraction)
        output = None if last is None else last.output
        return StepReport(loss, output, dict(self.metrics.found), steps)


class OneByOne(Team):
    """Executor: the stages, one after the other in the caller's thread."""

    def step(self, jobs: list[Job]) -> None:
        """One batch, stage after stage."""
        with keep_modes(), torch.enable_grad():
            run_batch(list(self.workers.values()), jobs)

    def drain(self) -> int:
        """Finish the batches that are under way. Returns how many there were."""
        with keep_modes(), torch.enable_grad():
            return finish_all(list(self.workers.values()))


def run_batch(workers: Sequence[StageWorker], jobs: Sequence[Job]) -> None:
    """One batch, in the stages of one thread; after an error those not updated are put back."""
    pairs = [*zip(workers, jobs, strict=True)]
    try:
        for worker, job in pairs:
            with named(job.index, job.step):
                worker.clear()
        for worker, job in pairs:
            with named(job.index, job.step):
                worker.begin(job)
        for worker, job in reversed(pairs):
            with named(job.index, job.step):
                worker.finish(job)
    except BaseException:
        for worker in workers:
            worker.put_back()
        raise


def run_posted(worker: StageWorker, job: Job) -> None:
    """One batch in one stage, under the autocast that it was posted with."""
    with contextlib.ExitStack() as stack:
        for cast in job.casts:
            stack.enter_context(cast)
        run_batch([worker], [job])


def finish_all(workers: Sequence[StageWorker]) -> int:
    """Finish what is under way in the stages of one thread. Returns how many batches that were."""
    for worker in workers:
        worker.end()
    steps = sorted({s for w in workers for s in w.desk.ledger.pending})
    for step in steps:
        for worker in workers:
            worker.clear()
        for worker in reversed(workers):
            with named(worker.index, step):
                worker.drain(step)
    for worker in reversed(workers):
        with named(worker.index, worker.desk.steps - 1):
            worker.rest()
    return len(steps)


@contextlib.contextmanager
def named(index: int, step: int) -> Iterator[None]:
    """Errors say which stage they are about."""
    try:
        yield
    except Exception as error:
        where = f"stage_{index}, step {step + 1}"
        if not isinstance(error, DecouplingError):
            raise ParallelError(f"{where}: {type(error).__name__}: {error}") from error
        if str(error).startswith(f"stage_{index}") or isinstance(error, ParallelError):
            raise
        raise type(error)(f"{where}: {error}") from error


def shared_state(decoupled: Decoupled) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters and buffers that several stages use, with these."""
    split, model = decoupled.graphs.variant.split, decoupled.model
    found = [(name, where) for name, _, where in split.shared]
    held = [{id(b) for b in stage.module.buffers()} for stage in split.stages]
    for name, buffer in model.named_buffers():
        where = tuple(k for k, ids in enumerate(held) if id(buffer) in ids)
        if len(where) > 1:
            found.append((name, where))
    return found


def check_apart(decoupled: Decoupled, together: int) -> None:
    """Refuse sources that read other stages' weights where not all stages run in turn."""
    for name, source in decoupled.sources.items():
        if source.asks.shares and together < len(decoupled.stages):
            raise DecouplingError(
                f"the source at {name!r} ({type(source).__name__}) reads weights that another "
                "stage trains, which here works by itself (on a thread, in a process, in visits): "
                "pass share=False to the source, or run the stages in turn"
            )


def find_late_delays(
    decoupled: Decoupled, staleness: int | None, workers: Mapping[int, StageWorker]
) -> dict[int, int]:
    """In how many steps each stage will have pulled back a batch; see ``Trainer.delays``."""
    delays = find_delays(decoupled.graphs.served(), len(decoupled.stages))
    lags = find_lags(decoupled, staleness)
    for index in (k for k, delay in delays.items() if delay > 0):
        measured = workers[index].learner.delay if index in workers else None
        fixed = lags[index]
        if fixed is not None:
            delays[index] = fixed
        elif measured is not None:
            delays[index] = measured
    return delays


def find_lags(decoupled: Decoupled, staleness: int | None) -> Sequence[int | None]:
    """After how many steps each stage learns from its answers, in a run with a fixed staleness.

    A stage whose source is late answers only when it has itself been pulled back.
    """
    count, interfaces, sources = len(decoupled.stages), decoupled.interfaces, decoupled.sources
    if staleness is None:
        return [None] * count
    late = {i.producer for i in interfaces if (sources[i.name].asks.lag or 0) > 0}
    lags = [staleness] * count
    for index in reversed(range(count)):
        behind = [c for i in interfaces if i.producer == index for c in i.consumers if c in late]
        lags[index] += max((lags[c] for c in behind), default=0)
    return lags
