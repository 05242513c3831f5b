"""The stages of one process at work: one after the other, or each on a thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..runtime.emitted import keep_modes
from ..runtime.in_turn import Loss
from ..runtime.stage_batch import Payload, StageRun
from ..schedules import Mode
from .limits import Flow
from .mailbox import Address, Letter, Mail, ParallelError
from .worker import StageWorker

if TYPE_CHECKING:
    from ..decoupled import Decoupled
    from ..runtime.trainer import Trainer

JOB = "job"


class Job(NamedTuple):
    """A batch for one stage."""

    run: StageRun
    values: Payload
    context: Any
    target: Any


class Crew:
    """Workers for some of the stages.

    Args:
        trainer: whose model, optimisers and options are used.
        stages: indices of the stages, ascending.
        mail: their letters.
        flow: how far they may drift apart.
        own_random: whether each stage has a stream of random numbers of its own.
    """

    def __init__(
        self,
        trainer: Trainer,
        stages: Sequence[int],
        mail: Mail,
        flow: Flow,
        own_random: bool = False,
    ) -> None:
        self.trainer, self.mail, self.flow = trainer, mail, flow
        lags = find_lags(trainer.decoupled, flow.staleness)
        self.workers = {k: StageWorker(trainer, k, mail, flow, lags[k], own_random) for k in stages}

        for worker in self.workers.values():
            worker.team = list(self.workers.values())

    def make_jobs(self, step: int, mode: Mode, values: Payload, target: Any) -> list[Job]:
        """A batch as each of the stages sees it; the graph that fits it must be active.

        Args:
            step: number of the batch.
            mode: what the schedule says.
            values: the model's inputs by name, the whole batch.
            target: the training target, or None.
        """
        trainer = self.trainer
        if trainer._is_exact:
            mode = Mode(1.0, mode.active)
        jobs, taught = [], set[str]()
        for index, worker in self.workers.items():
            mine, context, aim = self.rows_of(worker, values, target)
            run = StageRun(
                trainer.decoupled, index, step, self._loss_of(worker), mode, trainer.loss
            )
            run.inputs = {n: worker.own_inputs.get(id(s), s) for n, s in run.inputs.items()}  # type: ignore[misc]
            # A synthetic input that several stages use learns in the first of them, or each has its
            # copy.
            taught -= {n for n, s in run.inputs.items() if s in worker.own_inputs.values()}
            run.teaches = {n for n in run.stage.inputs if n in run.inputs and n not in taught}
            taught |= run.teaches
            run.measure = trainer._measure_next or step % trainer.metrics_every == 0
            if run.is_locked and self.flow.policy == "drop_oldest":
                raise DecouplingError(
                    f"stage_{index} waits for others within the step (exact steps, 'mix', "
                    "'feedback'), who may leave it out: pass policy='wait', or use sources that do "
                    "not wait"
                )
            jobs.append(Job(run, mine, context, aim))
        return jobs

    def rows_of(
        self, worker: StageWorker, values: Payload, target: Any
    ) -> tuple[Payload, Any, Any]:
        """The model's inputs, the context and the target of what a worker works on: all of it here."""
        return values, self.trainer._context(target), target

    def _loss_of(self, worker: StageWorker) -> Loss:
        """Of the rows that a worker has: a mean, which counts as much as they are of the batch."""
        scaled, share = self.trainer._scaled_loss, worker.share
        return scaled if share == 1 else lambda output, target: scaled(output, target) * share

    def step(self, jobs: list[Job]) -> None:
        """One batch, stage after stage."""
        with keep_modes(), torch.enable_grad():
            for worker in self.workers.values():
                worker.clear()
            for run, *rest in jobs:
                with self._named(run.index, run.step):
                    self.workers[run.index].begin(run, *rest)
            for run, *_ in reversed(jobs):
                with self._named(run.index, run.step):
                    self.workers[run.index].finish(run)

    def drain(self) -> int:
        """Finish the batches that are under way. Returns how many there were."""
        with keep_modes(), torch.enable_grad():
            for worker in self.workers.values():
                worker.end()
            steps = sorted({s for w in self.workers.values() for s in w.pending})
            for step in steps:
                for worker in self.workers.values():
                    worker.clear()
                for worker in reversed(self.workers.values()):
                    with self._named(worker.index, step):
                        worker.drain(step)
            for worker in reversed(self.workers.values()):
                worker.rest()
        return len(steps)

    def report(self, steps: int) -> StepReport:
        """Of the newest batch that the last stage has finished, where that stage is among these."""
        last = self.workers.get(len(self.trainer.decoupled.stages) - 1)
        loss = torch.tensor(math.nan)
        if last is not None and last.loss is not None:
            loss = last.loss * (self.trainer.accumulate / last.share)
        output = None if last is None else last.output
        return StepReport(loss, output, dict(self.trainer._measured), steps)

    @contextlib.contextmanager
    def _named(self, index: int, step: int) -> Iterator[None]:
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


class ThreadCrew(Crew):
    """Each stage on a thread of its own. After a failure it is of no more use: its threads have
    ended.
    """

    def __init__(self, trainer: Trainer, flow: Flow) -> None:
        stages = range(len(trainer.decoupled.stages))
        super().__init__(trainer, stages, Mail(timeout=math.inf), flow)
        for name, _ in shared_state(trainer.decoupled):
            raise DecouplingError(
                f"{name!r} is used by several stages, whose threads would write to it at once: cut "
                "so that they are one stage, or use another schedule"
            )
        for worker in self.workers.values():
            worker.team = [worker]
        self._copy_inputs()
        self.idle = dict.fromkeys(stages, True)
        self.operators = torch.get_num_threads()
        self.threads = [
            threading.Thread(target=self._work, args=(k,), name=f"dni_fx stage_{k}", daemon=True)
            for k in stages
        ]
        atexit.register(self.close)  # an interpreter that ends under a working thread aborts
        for thread in self.threads:
            thread.start()

    def _copy_inputs(self) -> None:
        """Of what several stages predict from, all but the first get copies: another thread must
        not train them.
        """
        inputs = self.trainer.decoupled.inputs
        for interface in self.trainer.decoupled.interfaces:
            for consumer in interface.consumers[1:] if interface.name in inputs else ():
                worker, name, source = (
                    self.workers[consumer],
                    f"{interface.name}@input",
                    inputs[interface.name],
                )
                worker.own_inputs[id(source)] = copied = copy.deepcopy(source)
                if name in self.trainer.synthesizer_optimizers:
                    made = self.trainer._make_synthesizer_optimizer(list(copied.named_parameters()))
                    made.load_state_dict(
                        copy.deepcopy(self.trainer.synthesizer_optimizers[name].state_dict())
                    )
                    worker.own_optimizers[name] = made

    def submit(self, jobs: list[Job]) -> None:
        """Hand a batch to every stage.

        Where one has as many before it as the queue may hold, this waits, or tells the stage to
        leave out the oldest.
        """
        boxes, most = self.mail.boxes, self.flow.queue
        if self.flow.policy == "drop_oldest":
            most *= 64  # of those that are left out, which hold no batch
        self.mail.wait(
            lambda: all(len(boxes.get(_box(k), ())) < most for k in self.workers),
            "room for a batch",
        )
        for job in jobs:
            job.run.casts = [
                torch.autocast(d, torch.get_autocast_dtype(d))
                for d in ("cpu", "cuda")
                if torch.is_autocast_enabled(d)
            ]
            box = boxes.setdefault(_box(job.run.index), deque())
            with self.mail.changed:
                waiting = [i for i, letter in enumerate(box) if isinstance(letter.payload, Job)]
                if len(waiting) >= self.flow.queue:
                    box[waiting[0]] = Letter(box[waiting[0]].step, box[waiting[0]].payload.run)
            self.mail.send(_box(job.run.index), job.run.step, job)

    def drain(self) -> int:
        """Finish everything; the threads are idle then."""
        for worker in self.workers.values():
            self.mail.send(_box(worker.index), worker.steps, None)
        self.mail.wait(
            lambda: (
                all(self.idle.values())
                and not any(self.mail.boxes.get(_box(k)) for k in self.workers)
            ),
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

    def _work(self, index: int) -> None:
        worker, box = self.workers[index], _box(index)
        torch.set_num_threads(
            self.operators
        )  # a new thread starts from the machine's number, not from the caller's
        try:
            while True:
                with self.mail.changed:
                    self.idle[index] = not self.mail.boxes.get(box)
                    self.mail.changed.notify_all()
                letter = self._next_job(index)
                with torch.enable_grad(), self._named(index, letter.step):
                    self._do(worker, letter.payload)
        except Exception as error:
            self.mail.fail(error)
        except BaseException as error:  # it ends this thread, and with it the training
            self.mail.fail(
                ParallelError(
                    f"stage_{index}, step {worker.steps}: {type(error).__name__}: {error}"
                )
            )

    def _next_job(self, index: int) -> Letter:
        box = _box(index)
        worker = self.workers[index]
        while not self.mail.boxes.get(box):
            self.mail.wait(
                lambda: bool(self.mail.boxes.get(box)) or worker.has_letters(), "a batch"
            )
            with torch.enable_grad(), self._named(index, worker.steps - 1):
                worker.clear()
                worker.attend()
                worker.update()
        with self.mail.changed:
            self.idle[index] = False
            letter = self.mail.boxes[box].popleft()
            self.mail.changed.notify_all()  # there is room for another one
        return letter

    @staticmethod
    def _do(worker: StageWorker, job: Job | StageRun | None) -> None:
        """A batch, one that is left out, or, where there is none, what is under way."""
        if isinstance(job, StageRun):
            worker.skip(job)
            return
        if job is not None:
            with contextlib.ExitStack() as stack:
                for cast in job.run.casts:
                    stack.enter_context(cast)
                worker.clear()
                worker.begin(*job)
                worker.finish(job.run)
            return
        worker.end()
        for step in list(worker.pending):
            worker.clear()
            worker.drain(step)
        worker.rest()


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
    late = {i.producer for i in decoupled.interfaces if (sources[i.name].lag or 0) > 0}
    lags: list[int] = [staleness] * len(stages)
    for index in reversed(range(len(stages))):
        behind = [
            c for i in decoupled.interfaces if i.producer == index for c in i.consumers if c in late
        ]
        lags[index] += max((lags[c] for c in behind), default=0)
    return list(lags)


def _box(stage: int) -> Address:
    return Address(JOB, -1, stage)
