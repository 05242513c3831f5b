"""Stages on several processes of ``torch.distributed``, each at the speed of its own work.

    torchrun --standalone --nproc-per-node 2 train.py

Every process builds the same model, makes a :class:`Trainer`, and calls ``step`` with the same
batches. A process runs its own stages and optimises their parameters alone; values go forward and
answers come back while it works on. Without a process group the same script trains in one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..reports.files import write_atomically
from ..reports.steps import StepReport
from ..runtime.base import BaseTrainer, one_at_a_time
from ..runtime.evaluating import Means, Sums
from ..runtime.loops import Unpack
from ..runtime.optimizing import LrScale, MakeOptimizer
from ..runtime.transforms import check_ordinary
from ..schedules import Flow, Schedule, Threads, make_schedule, mode_of
from .checkpoints import Checkpoints
from .executors import find_late_delays
from .judging import Judging
from .monitoring import Status, trace_events
from .placement import Placement
from .process import Process
from .sharing import Peers


class Trainer(BaseTrainer):
    """Trains the stages of this process, beside the other processes.

    All processes must make their trainers in the same order, and the same number of steps with the
    same batches (of each the model's inputs and the target, whichever stage needs them). A step
    returns when this process's stages are done with the batch, which says nothing of the others.
    With ``gradients="exact"`` all wait for each other: that is the locked baseline, and equals
    backpropagation.

    Args:
        decoupled: the model, cut alike in all processes; see :func:`dni_fx.distributed.decouple`.
        loss, optimizer, synthesizer_optimizer, clip_norm, accumulate, metrics_every, lr_scale: as
            for :class:`dni_fx.Trainer`.
        schedule: what each step does; all processes follow the same.
        placement: a rank for every stage, in order or by name; several ranks share a stage's
            batches, each working on its rows (with a fixed staleness only, and gradients summed
            over them). By default as many stages, in order, on each rank.
        queue: how many values of a stage may be under way to another stage, not answered yet.
        policy: what a stage does where so many are: ``"wait"``, or go on and ``"drop_oldest"``; see
            :class:`Flow`.
        staleness: after how many steps answers are learnt from; None: when they come. A number
            makes runs repeatable bit for bit; 0 waits for them within the step, and equals
            :class:`dni_fx.Trainer`.
        discount: ``discount ** d`` is the weight of an answer that is d steps late in a source's
            regression.
        timeout: seconds after which a process without any sign of life ends the run.
        group: the process group; the default one. Tensors of GPUs travel through the memory of
            their hosts.

    Attributes:
        rank, world: this process's number, and how many there are.
        process: this process's side, with the stages at work in it.

    Raises:
        DecouplingError: arguments of the wrong kind; at the first step: stages that cannot be
            placed so.
    """

    is_alone = False

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer | None = None,
        schedule: str | Schedule = "sequential",
        placement: Placement | None = None,
        queue: int = 4,
        policy: str = "wait",
        staleness: int | None = None,
        discount: float = 1.0,
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
        lr_scale: LrScale = None,
        timeout: float = 300.0,
        group: Any = None,
    ) -> None:
        super().__init__(
            decoupled,
            loss,
            optimizer=optimizer,
            synthesizer_optimizer=synthesizer_optimizer,
            clip_norm=clip_norm,
            accumulate=accumulate,
            metrics_every=metrics_every,
            lr_scale=lr_scale,
        )
        self.schedule = _in_turn(make_schedule(schedule))
        self._peers = peers = Peers(group)
        self.rank, self.world = peers.rank, peers.world
        flow = Flow(queue, policy, staleness, discount)
        what = decoupled, self.objective, self.optimizing, self.metrics
        self.process = Process(*what, peers=peers, flow=flow, placement=placement, timeout=timeout)
        self._checkpoints = Checkpoints(self.process)
        self.process.prepare()

    def _prepare_optimizers(self) -> None:
        self.process.prepare()

    def _find_delays(self) -> dict[int, int]:
        own = self.process
        return find_late_delays(self.decoupled, own.flow.staleness, own.workers)

    @one_at_a_time
    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """One batch through this process's stages; the same batch in every process.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs of the model.

        Returns:
            Loss and outputs where the last stage is, of this process's rows; elsewhere no outputs,
            and the newest loss that was heard of (nan at first).

        Raises:
            ParallelError: another process failed, ended, or does not answer; which, and why.
            NonFiniteError: a value or gradient is NaN or infinite; that stage is not updated, and
                all processes end.
            DecouplingError: inputs that do not fit the plan, or a loss that is no scalar.
        """
        with self.process.telling():
            values = check_ordinary(self._bind_call(*args, **kwargs), target)
            mode = mode_of(self.schedule, self.steps, len(self.decoupled.stages))
            report = self.process.step(self.steps, mode, values, target)
        self.metrics.requested = False
        self.steps += 1
        return report

    def drain(self) -> int:
        """Finish the batches that are under way; to be called in every process.

        With ``policy="drop_oldest"`` call it before collective operations of your own, too: a
        process behind waits for a newer value, and this says that none comes.

        Returns:
            How many there were here.
        """
        return self.process.drain()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output of this process's rows where the last stage is, None elsewhere; no
        gradients, in the mode of now, called in every process with the same inputs.
        """
        with self.process.telling():
            return self.process.forward(self.steps, self.decoupled.bind(*args, **kwargs))

    def _evaluate(self, loader: Iterable[Any], means: Means, unpack: Unpack | None) -> list[Sums]:
        with self.process.telling():
            judging = Judging(self.process, means, self.steps)
            self._run_over(loader, judging.run, unpack)
            return judging.gather()

    def share(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Rank 0's batches, for data that only rank 0 can read; to be iterated in every process.

        Args:
            batches: of any nesting; what other ranks pass is not looked at. Tensors arrive on the
                CPU, or on the device of the same kind.

        Raises:
            DecouplingError: the policy is ``"drop_oldest"``: rank 0 would wait for the slowest.
        """
        return self.process.share(self.steps, batches)

    def close(self) -> None:
        """Finish what is under way, and wait for all others to close; in every process."""
        try:
            if self.process.mail.failure is None:
                self.process.meet("close()", self.steps)
                self._checkpoints.wait()
        finally:
            self.process.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if error is None:
            self.close()
        else:
            self.process.tell(error)

    def gather(self) -> dict[str, Any]:
        """Bring all parameters and buffers into this process's model; called in every process.

        Returns:
            ``model.state_dict()``, under the model's own names, complete.
        """
        self.process.gather(self.steps)
        return self.decoupled.model.state_dict()

    def mean(self, value: float, weight: float = 1.0) -> float:
        """The mean over the processes that have a number; called in all, outside the loop.

        Args:
            value: a loss, say; nan where this process has none of its own: ``report.loss`` is the
                newest heard of where ``report.outputs`` is None.
            weight: how much it counts.
        """
        self.process.meet("mean()", self.steps, drain=False)
        return self._peers.mean(value, weight)

    def status(self, everywhere: bool = False) -> Status:
        """All stages; those elsewhere of a second ago, or of now: ``everywhere``, in every one."""
        rows = self.process.status_rows()
        if everywhere:
            self.process.meet("status()", self.steps, drain=False)
            self.process.status_rows()
            rows = tuple(r for part in self._peers.gather(self.process.rows) for r in part)
        return Status(tuple(sorted(rows, key=lambda row: (int(row["stage"][6:]), row["rank"]))))

    def save_timeline(self, path: str | Path) -> None:
        """Write what all stages did when, for ``chrome://tracing`` or Perfetto; in every process.

        Args:
            path: of the JSON file, which rank 0 writes; of each stage the newest spans.
        """
        self.process.meet("save_timeline()", self.steps, drain=False)
        watches = [worker.learner.watch for worker in self.process.workers.values()]
        every = self._peers.gather(trace_events(watches, self.rank))
        if self.rank == 0:
            write_atomically(path, json.dumps({"traceEvents": [e for part in every for e in part]}))

    def save(
        self, directory: str | Path, *, extra: Any = None, asynchronous: bool = False, keep: int = 2
    ) -> Path:
        """Finish what is under way and write a checkpoint; in every process, at the same step.

        It holds stages, sources, optimisers, random states, the number of steps and ``extra``. It
        is there as a whole or not at all, whenever a process ends.

        Args:
            directory: of all checkpoints of the run. On machines that share no file system each
                keeps the parts of its own processes.
            extra: what ``resume`` gives back, pickled, such as a loader's state; of rank 0.
            asynchronous: copy the state and write it while training goes on.
            keep: how many checkpoints stay.

        Returns:
            The checkpoint, ``directory/step-000000100`` after 100 steps.
        """
        self.process.connect(self.steps)
        self.process.meet("save()", self.steps)
        return self._checkpoints.save(Path(directory), self.steps, extra, asynchronous, keep)

    def resume(self, directory: str | Path) -> Any:
        """Go on from the newest complete checkpoint, if there is one; in every process.

        The plan must be the same; stages may be on other ranks. ``trainer.steps`` says where the
        data goes on. A checkpoint that lacks a part everywhere is left out with a warning.

        Args:
            directory: as for :meth:`save`.

        Returns:
            What ``save`` was given as ``extra``; None also where there is no checkpoint.

        Raises:
            DecouplingError: the checkpoint is of another model or plan; nothing is loaded then.
        """
        self.process.connect(self.steps)
        self.process.meet("resume()", self.steps)
        self.steps, extra = self._checkpoints.load(Path(directory)) or (self.steps, None)
        return extra


def _in_turn(schedule: Schedule) -> Schedule:
    """Refuse one that runs stages at once itself."""
    if isinstance(schedule, Threads):
        raise DecouplingError(
            "schedules.Threads is for dni_fx.Trainer; here each process runs its stages in turn"
        )
    return schedule
