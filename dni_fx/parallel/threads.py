"""Executor: each stage of a process on a thread of its own."""

from __future__ import annotations

import atexit
import copy
import math
import threading
import weakref
from collections.abc import Sequence

import torch

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Flow
from .executors import Team, finish_all, named, run_posted, shared_state
from .job import Job
from .mailbox import Address, Letter, Mail, ParallelError
from .owning import PostedModes
from .worker import StageWorker

JOB = "job"
_working = weakref.WeakSet["OnThreads"]()  # those whose threads have not all ended


class OnThreads(Team):
    """Executor: each stage on a thread of its own, until one fails: all threads end then.

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
        stages, mail = range(len(decoupled.stages)), Mail(timeout=math.inf)
        super().__init__(decoupled, objective, optimizers, metrics, flow, stages, mail, steps)
        self._copy_inputs(optimizers)
        self.post_rates(optimizers)
        self.idle = dict.fromkeys(stages, True)
        self._modes, self._rests = PostedModes(decoupled.model), True
        self._operators = torch.get_num_threads()
        self.threads = [
            threading.Thread(target=self._work, args=(k,), name=f"dni_fx stage_{k}", daemon=True)
            for k in stages
        ]
        _working.add(self)
        for thread in self.threads:
            thread.start()

    def _in_turn_with(self, worker: StageWorker) -> list[StageWorker]:
        return [worker]

    def _copy_inputs(self, optimizers: StageOptimizers) -> None:
        """Of a synthetic input all users but the first get copies: no other thread trains those."""
        users = {i.name: i.consumers for i in self.decoupled.interfaces}
        for interface, source in self.decoupled.inputs.items():
            for consumer in users[interface][1:]:
                name, copied = f"{interface}@input", copy.deepcopy(source)
                self.copies.setdefault(consumer, {})[id(source)] = copied
                if known := optimizers.sources.get(name):
                    made = optimizers.made_for_source(name, copied)
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
        self.mail.wait(
            lambda: all(len(self._box(k)) < most for k in self.workers), "room for a batch"
        )
        modes = self._modes.post()
        for job in jobs:
            if self._rests:
                self.workers[job.index].learner.owned.claim(job.setting, job.index)
        self._rests = False
        self.post(jobs)
        for job in jobs:
            job.modes = modes
            with self.mail.changed:
                queued = [letter.payload for letter in self._box(job.index)]
                waiting = [other for other in queued if other and not other.left_out]
                if len(waiting) >= self.flow.queue:
                    waiting[0].drop()
            self.mail.send(_address(job.index), job.step, job)

    def drain(self) -> int:
        """Finish everything; the threads are idle then."""
        for k, worker in self.workers.items():
            self.mail.send(_address(k), worker.desk.steps, None)
        self.mail.wait(
            lambda: all(self.idle.values()) and not any(map(self._box, self.workers)),
            "the end of what is under way",
        )
        self._modes.rest()
        self._rests = True
        return 0

    def check_modes(self) -> None:
        """Refuse modes that were changed since the newest batch was posted, unless all rests."""
        self._modes.check()

    def gather(self) -> None:
        """All stages are in memory, always."""

    def end_with(self, owner: object) -> None:
        """Have the threads end when nobody holds the owner any more; nothing waits for that."""
        weakref.finalize(owner, _end, weakref.ref(self))

    def close(self) -> None:
        """End the threads, wherever they are."""
        _end(weakref.ref(self))
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()

    def _box(self, stage: int) -> Sequence[Letter]:
        """What waits for a stage: batches, or None for the end of what is under way."""
        return self.mail.boxes.get(_address(stage), ())

    def _work(self, index: int) -> None:
        worker = self.workers[index]
        torch.set_num_threads(self._operators)  # else a thread starts from the machine's number
        try:
            while True:
                with self.mail.changed:
                    self.idle[index] = not self._box(index)
                    self.mail.changed.notify_all()
                with torch.enable_grad():
                    _do(worker, self._next(worker))
        except Exception as error:
            self.mail.fail(_explained(worker, error))
        except BaseException as error:  # it ends this thread, and with it the training
            where = f"stage_{index}, step {worker.desk.steps}"
            self.mail.fail(ParallelError(f"{where}: {type(error).__name__}: {error}"))

    def _next(self, worker: StageWorker) -> Job | None:
        index, desk = worker.index, worker.desk
        while not self._box(index):
            self.mail.wait(lambda: bool(self._box(index)) or desk.has_letters(), "a batch")
            with named(index, desk.steps - 1):
                worker.clear()
                worker.attend()
                worker.learner.update()
        with self.mail.changed:
            self.idle[index] = False
            letter = self.mail.take(_address(index))
            self.mail.changed.notify_all()  # there is room for another one
        assert letter is not None
        job: Job | None = letter.payload
        if job is not None:
            worker.learner.take_rates(job)
        return job


def _end(executor: weakref.ref[OnThreads]) -> None:
    working = executor()
    if working is not None:
        working.mail.fail(ParallelError("the trainer was closed"))


@atexit.register
def _end_all() -> None:
    """An interpreter that ends under a working thread aborts."""
    for executor in list(_working):
        executor.close()


def _explained(worker: StageWorker, error: Exception) -> Exception:
    """What autograd says where weights were changed from outside between forward and backward."""
    if "modified by an inplace operation" in str(error):
        try:
            with named(worker.index, worker.desk.steps - 1):
                worker.learner.owned.check_weights()
        except DecouplingError as clear:
            clear.__cause__ = error
            return clear
    return error


def _address(stage: int) -> Address:
    return Address(JOB, -1, stage)


def _do(worker: StageWorker, job: Job | None) -> None:
    """A batch, one that is left out, or, where there is none, what is under way."""
    if job is None:
        finish_all([worker])
    elif job.left_out:
        with named(job.index, job.step):
            worker.skip(job)
    else:
        run_posted(worker, job)
