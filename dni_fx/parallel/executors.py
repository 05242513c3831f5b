"""The stages of one process at work: one after the other, or each on a thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..runtime.batch_state import Setting, Settings
from ..runtime.emitted import keep_modes
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Mode
from .job import Job, Values
from .learning import StageLearner
from .limits import Flow
from .mailbox import Address, Letter, Mail, ParallelError
from .monitoring import Stopwatch
from .routes import Routes
from .worker import StageWorker

JOB = "job"
RowsOf = Callable[[int, Values, Any], tuple[Values, Any]]


class Team:
    """Workers for some of the stages, and the batches as each of them sees them.

    Args:
        decoupled: the model, traced.
        objective: the loss, and what sources see of the target.
        optimizers: of these stages and their sources.
        metrics: when predictions are compared, and what was found.
        flow: how far the stages may drift apart.
        stages: indices of the stages, ascending.
        mail: their messages.
        steps: batches that are done already.
        own_random: whether each stage has a stream of random numbers of its own.
        rows_of: of the model's inputs and the target, the rows that a stage works on here; by
            default all.

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
        stages: Sequence[int],
        mail: Mail,
        steps: int = 0,
        own_random: bool = False,
        rows_of: RowsOf | None = None,
    ) -> None:
        self.decoupled, self.objective = decoupled, objective
        self.metrics, self.mail, self.flow = metrics, mail, flow
        self.copies: dict[int, dict[int, Any]] = {}
        self._rows_of = rows_of
        self._routes: tuple[Setting, dict[int, Routes], dict[str, str]] | None = None
        self.workers: dict[int, StageWorker] = {}
        lags = find_lags(decoupled, flow.staleness)
        for k in stages:
            name, watch = f"stage_{k}", Stopwatch(k)
            learner = StageLearner(name, objective, optimizers, flow.discount, watch)
            self.workers[k] = StageWorker(
                k, mail, flow, lags[k], learner, metrics, steps, own_random
            )
        for worker in self.workers.values():
            worker.team = list(self.workers.values())
        last = self.workers.get(len(decoupled.stages) - 1)
        loss = None if last is None else last.learner.scaled_loss
        self._settings = Settings(decoupled.graphs, objective, loss)

    def make_jobs(self, step: int, mode: Mode, values: Values, target: Any) -> list[Job]:
        """A batch as each of the stages sees it; the graph that fits it must be active.

        Args:
            step: number of the batch.
            mode: what the schedule says.
            values: the model's inputs by name, the whole batch.
            target: the training target, or None.

        Raises:
            DecouplingError: a stage would wait within the step for others that may leave it out.
        """
        jobs, taught = [], set[str]()
        setting = self._settings.of(mode)
        if self._routes is None or self._routes[0] is not setting:
            routes_of = {k: Routes.of(setting, k) for k in self.workers}
            self._routes = setting, routes_of, self.decoupled.graphs.learner_names()
        _, every, planned = self._routes
        for index, routes in every.items():
            own = self.copies.get(index, {})
            inputs = {n: own.get(id(s), s) for n, s in setting.inputs.items()}
            # A synthetic input that several stages use learns in the first of them, or each has its
            # copy.
            names = [n for n in setting.stages[index].inputs if n in inputs]
            teaches = {n for n in names if id(setting.inputs[n]) in own or n not in taught}
            taught |= teaches
            job = Job(setting, index, step, routes, inputs, teaches, planned)
            job.values, job.target = values, target
            if self._rows_of is not None:
                job.values, job.target = self._rows_of(index, values, target)
            job.context = self.objective.context(job.target)
            job.measure = self.metrics.is_due(step)
            if job.is_locked and self.flow.policy == "drop_oldest":
                raise DecouplingError(
                    f"stage_{index} waits for others within the step (exact steps, 'mix', "
                    "'feedback'), who may leave it out: pass policy='wait', or use sources that do "
                    "not wait"
                )
            jobs.append(job)
        return jobs

    def report(self, steps: int) -> StepReport:
        """Of the newest batch that the last stage has finished, where that stage is among these."""
        last = self.workers.get(len(self.decoupled.stages) - 1)
        loss = torch.tensor(math.nan)
        if last is not None and last.loss is not None:
            loss = last.loss * (self.objective.accumulate / last.learner.share)
        output = None if last is None else last.output
        return StepReport(loss, output, dict(self.metrics.found), steps)

    @contextlib.contextmanager
    def named(self, index: int, step: int) -> Iterator[None]:
        """Errors say which stage they are about."""
        try:
            yield
        except Exception as error:
            name = f"stage_{index}"
            if isinstance(error, DecouplingError):
                if str(error).startswith(name) or isinstance(error, ParallelError):
                    raise
                raise type(error)(f"{name}, step {step + 1}: {error}") from error
            raise ParallelError(
                f"{name}, step {step + 1}: {type(error).__name__}: {error}"
            ) from error


class OneByOne:
    """Executor: the stages of a team, one after the other in the caller's thread."""

    def __init__(self, team: Team) -> None:
        self.team = team

    def step(self, jobs: list[Job]) -> None:
        """One batch, stage after stage."""
        team = self.team
        with keep_modes(), torch.enable_grad():
            for worker in team.workers.values():
                worker.clear()
            for job in jobs:
                with team.named(job.index, job.step):
                    team.workers[job.index].begin(job)
            for job in reversed(jobs):
                with team.named(job.index, job.step):
                    team.workers[job.index].finish(job)

    def drain(self) -> int:
        """Finish the batches that are under way. Returns how many there were."""
        workers = self.team.workers.values()
        with keep_modes(), torch.enable_grad():
            for worker in workers:
                worker.end()
            steps = sorted({s for w in workers for s in w.desk.ledger.pending})
            for step in steps:
                for worker in workers:
                    worker.clear()
                for worker in reversed(workers):
                    with self.team.named(worker.index, step):
                        worker.drain(step)
            for worker in reversed(workers):
                worker.rest()
        return len(steps)


class OnThreads:
    """Executor: each stage on a thread of its own.

    After a failure it is of no more use: its threads have ended.

    Args:
        decoupled, objective, optimizers, metrics, flow, steps: as for :class:`Team`.

    Raises:
        DecouplingError: several stages would write to the same parameter or buffer.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        flow: Flow,
        steps: int = 0,
    ) -> None:
        for name, _ in shared_state(decoupled):
            raise DecouplingError(
                f"{name!r} is used by several stages, whose threads would write to it at once: cut "
                "so that they are one stage, or use another schedule"
            )
        stages = range(len(decoupled.stages))
        self.mail, self.flow = Mail(timeout=math.inf), flow
        self.team = Team(decoupled, objective, optimizers, metrics, flow, stages, self.mail, steps)
        self.workers = self.team.workers
        for worker in self.workers.values():
            worker.team = [worker]
        self._copy_inputs(decoupled, optimizers)
        self.idle = dict.fromkeys(stages, True)
        self._operators = torch.get_num_threads()
        self.threads = [
            threading.Thread(target=self._work, args=(k,), name=f"dni_fx stage_{k}", daemon=True)
            for k in stages
        ]
        atexit.register(self.close)  # an interpreter that ends under a working thread aborts
        for thread in self.threads:
            thread.start()

    def _copy_inputs(self, decoupled: Decoupled, optimizers: StageOptimizers) -> None:
        """Of what several stages predict from, all but the first get copies: another thread must
        not train them.
        """
        inputs = decoupled.inputs
        for interface in decoupled.interfaces:
            for consumer in interface.consumers[1:] if interface.name in inputs else ():
                name = f"{interface.name}@input"
                copied = copy.deepcopy(inputs[interface.name])
                self.team.copies.setdefault(consumer, {})[id(inputs[interface.name])] = copied
                if known := optimizers.sources.get(name):
                    made = optimizers.made_for_source(name, list(copied.named_parameters()))
                    made.load_state_dict(copy.deepcopy(known.state_dict()))
                    self.workers[consumer].learner.own[name] = made

    def submit(self, jobs: list[Job]) -> None:
        """Hand a batch to every stage.

        Where one has as many before it as the queue may hold, this waits, or tells the stage to
        leave out the oldest.
        """
        most = self.flow.queue
        if self.flow.policy == "drop_oldest":
            most *= 64  # of those that are left out, which hold no batch
        self.mail.wait(lambda: all(self._count(k) < most for k in self.workers), "room for a batch")
        for job in jobs:
            devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
            job.casts = [torch.autocast(d, torch.get_autocast_dtype(d)) for d in devices]
            with self.mail.changed:
                box = self.mail.boxes.setdefault(_box(job.index), deque())
                waiting = [i for i, letter in enumerate(box) if _is_run(letter.payload)]
                if len(waiting) >= self.flow.queue:
                    oldest = box[waiting[0]]
                    oldest.payload[0].drop()
                    box[waiting[0]] = Letter(oldest.step, (oldest.payload[0], False))
            self.mail.send(_box(job.index), job.step, (job, True))

    def drain(self) -> int:
        """Finish everything; the threads are idle then."""
        for worker in self.workers.values():
            self.mail.send(_box(worker.index), worker.steps, None)
        self.mail.wait(
            lambda: all(self.idle.values()) and not any(map(self._count, self.workers)),
            "the end of what is under way",
        )
        return 0

    def close(self) -> None:
        """End the threads, wherever they are."""
        atexit.unregister(self.close)
        self.mail.fail(ParallelError("the trainer was closed"))
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()

    def _count(self, stage: int) -> int:
        """Batches that wait for a stage."""
        return len(self.mail.boxes.get(_box(stage), ()))

    def _work(self, index: int) -> None:
        worker, team = self.workers[index], self.team
        # A new thread starts from the machine's number, not from the caller's.
        torch.set_num_threads(self._operators)
        try:
            while True:
                with self.mail.changed:
                    self.idle[index] = not self._count(index)
                    self.mail.changed.notify_all()
                letter = self._next_job(index)
                with torch.enable_grad(), team.named(index, letter.step):
                    _do(worker, letter.payload)
        except Exception as error:
            self.mail.fail(error)
        except BaseException as error:  # it ends this thread, and with it the training
            where = f"stage_{index}, step {worker.steps}"
            self.mail.fail(ParallelError(f"{where}: {type(error).__name__}: {error}"))

    def _next_job(self, index: int) -> Letter:
        worker = self.workers[index]
        while not self._count(index):
            self.mail.wait(
                lambda: bool(self._count(index)) or worker.desk.has_messages(), "a batch"
            )
            with torch.enable_grad(), self.team.named(index, worker.steps - 1):
                worker.clear()
                worker.attend()
                worker.update()
        with self.mail.changed:
            self.idle[index] = False
            letter = self.mail.boxes[_box(index)].popleft()
            self.mail.changed.notify_all()  # there is room for another one
        return letter


def _do(worker: StageWorker, task: tuple[Job, bool] | None) -> None:
    """A batch, one that is left out, or, where there is none, what is under way."""
    if task is None:
        worker.end()
        for step in list(worker.desk.ledger.pending):
            worker.clear()
            worker.drain(step)
        worker.rest()
        return
    job, runs = task
    if not runs:
        worker.skip(job)
        return
    with contextlib.ExitStack() as stack:
        for cast in job.casts:
            stack.enter_context(cast)
        worker.clear()
        worker.begin(job)
        worker.finish(job)


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


def find_lags(decoupled: Decoupled, staleness: int | None) -> list[int | None]:
    """After how many steps each stage learns from its answers, in a run with a fixed staleness.

    A stage whose source is late answers only when it has itself been pulled back.
    """
    stages = decoupled.stages
    if staleness is None:
        return [None] * len(stages)
    sources = decoupled.sources
    late = {i.producer for i in decoupled.interfaces if (sources[i.name].asks.lag or 0) > 0}
    lags: list[int] = [staleness] * len(stages)
    for index in reversed(range(len(stages))):
        behind = [
            c for i in decoupled.interfaces if i.producer == index for c in i.consumers if c in late
        ]
        lags[index] += max((lags[c] for c in behind), default=0)
    return list(lags)


def _box(stage: int) -> Address:
    return Address(JOB, -1, stage)


def _is_run(payload: Any) -> bool:
    return payload is not None and payload[1]
