"""The trainer of a whole model: stages in turn, or each on a thread."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .decoupled import Decoupled
from .errors import DecouplingError
from .graphs.nested import map_tensors
from .parallel.beside import Beside
from .parallel.capping import read_cap
from .parallel.threads import OnThreads
from .parallel.visits import Visiting
from .reports.steps import StepReport
from .runtime.base import one_at_a_time
from .runtime.deferring import Deferral
from .runtime.fusing.steps import FusedSteps
from .runtime.in_turn import Batch
from .runtime.keeping import Keeps
from .runtime.objective import Loss
from .runtime.optimizing import LrScale, MakeOptimizer
from .runtime.stepping import Stepping
from .runtime.transforms import check_ordinary
from .schedules import Schedule, Sequential, Threads, make_schedule, mode_of
from .simulation import Forecast


class Trainer(Keeps):
    """Trains a decoupled model, every stage with an optimiser of its own.

    A step runs the stages one after the other: each runs forward, asks its sources for the
    gradients of what it sends, and pulls them back; the input gradients of the next stage are the
    targets of its sources (bootstrapped: Jaderberg et al. 2016, arXiv:1608.05343, section 2). A
    stage whose source waits for a message is pulled back when that is there, in the same step or a
    later one. Updates happen at the end of the step, once everything is known to be finite; since
    no stage reads another's parameters, that changes no number.

    Args:
        decoupled: the model.
        loss: ``loss(output, target)``, a scalar tensor; ``lambda out, _: out.loss`` for models that
            compute their own.
        optimizer: makes an optimiser from the ``(name, parameter)`` pairs of one stage, which
            torch.optim takes as they are. A parameter used by several stages is given to the first
            of them.
        synthesizer_optimizer: the same for the sources; by default
            :func:`~dni_fx.sources.default_optimizer`, Adam at a rate for each kind.
        schedule: which stages a step updates, and how much of the true gradient they get:
            ``"sequential"`` (all, none), ``"random"``, or one of :mod:`dni_fx.schedules`.
        clip_norm: largest norm of one stage's gradients. It is per stage: a global norm would have
            to wait for all.
        accumulate: how many steps' gradients make one update; the loss of each counts 1 /
            accumulate.
        metrics_every: how often the predictions are compared with their targets, in steps.
        update: ``"together"`` at the end of the step, or ``"at_once"``: each stage clips, steps and
            frees its gradients before the next one runs, so that those of one stage live at a
            time. A step is whole in each stage then, not in all.
        resident: how many stages may be in memory at a time (weights, gradients, what optimisers
            keep, sources); the others are in the store, and a thread reads the next one while a
            stage works. With 1 there is no such overlap. Implies ``update="at_once"``.
        store: where the others are: ``"host"`` memory (for models on an accelerator), or a folder.
        sweep: how many batches a stage takes in one visit, each with an update of its own, so that
            reading it costs a part of that. ``step`` keeps the batches until there are so many;
            what comes back to the sources is up to so many steps late.
        memory_cap: bytes of tensors that a step may take, or words such as ``"2GB"``: what is left
            open of ``resident`` and ``sweep`` is chosen to keep to it, by :attr:`forecast`.
        lr_scale: what the learning rates of each stage are multiplied with when its optimiser is
            made: a mapping from stage names to factors, or ``"delay"`` for 1 / (1 + delay), the
            delay being that of :meth:`delays` in updates, for stages in turn (PipeMare's rule, Yang
            et al. 2021, arXiv:1910.05124, without its annealing, and with 1 added).
        compile: whether a whole step (stages, sources, SGD's or Adam's updates) is one call that
            TorchInductor makes faster; or its options, as ``torch.compile(options=)`` takes them.
            Numbers agree with eager steps to rounding, ``.grad`` is not kept, and what cannot be
            recorded runs eagerly, with a warning that says why.
        check_finite: ``"step"``: every step is known to be finite before its update, for which the
            host waits for the device. ``"deferred"``: that is looked at in the next step, once this
            one's work is on its way, and before anything is saved (``fit``, ``drain``,
            ``state_dict``, ``diagnose``; call ``drain`` before you save a model by other means).
            What was not finite is undone, with all that followed. For accelerators: each step
            copies what it changes, on the device, which on a CPU is time and memory for nothing.

    Attributes:
        fused: the compiled steps; None without ``compile``.
        beside: the stages at work, where they are not updated together.

    Raises:
        DecouplingError: arguments of the wrong kind.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Loss,
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer | None = None,
        schedule: str | Schedule = "sequential",
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
        update: str = "together",
        resident: int | None = None,
        store: str | os.PathLike[str] = "host",
        sweep: int = 1,
        memory_cap: float | str | None = None,
        lr_scale: LrScale = None,
        compile: bool | dict[str, Any] = False,
        check_finite: str = "step",
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
        self.schedule = make_schedule(schedule)
        _warn_if_alone()
        cap = read_cap(memory_cap)
        visiting = Visiting.checked(update, resident, store, sweep, capped=cap is not None)
        parts = (decoupled, self.objective, self.optimizing, self.metrics)
        self.beside = Beside(*parts, visiting, cap)
        is_beside = self.beside.check(self.schedule)
        self.fused: FusedSteps | None = None
        if compile is not False:
            options = _checked_options(compile, is_beside)
            self.fused = FusedSteps(decoupled, self.objective, self.optimizing, options)
        deferral = _checked_deferral(check_finite, is_beside)
        self._stepping = Stepping(*parts, self.fused, deferral)
        self._in_turn = self._stepping.in_turn
        if decoupled.graphs.active is not None:
            self._prepare_optimizers()

    # ---- steps -----------------------------------------------------------------------------------

    @one_at_a_time
    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """Train on one batch: the model's own call, plus the target.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs of the model.

        Returns:
            Loss, outputs and, every ``metrics_every`` steps, how good the predictions were.

        Raises:
            NonFiniteError: a value or gradient is NaN or infinite; named, and nothing is updated.
            DecouplingError: inputs that do not fit the plan, or a loss that is no scalar.

        After any error parameters, buffers, sources, random states and the gradients of an
        unfinished update are as they were before. Those of a finished update are dropped when the
        next step starts, as ``zero_grad`` would.
        """
        schedule = self.schedule
        beside = self.beside.check(schedule)
        if beside:
            # The caller may write into its own.
            args, kwargs, target = map_tensors(torch.clone, (args, kwargs, target))
            self.beside.prepare_for(args, kwargs)
        if self._stepping.is_unseen and not self.decoupled.has_graph_for(*args, **kwargs):
            self._settle()
        values = check_ordinary(self._bind_call(*args, **kwargs), target)
        self._prepare_optimizers()
        mode = mode_of(schedule, self.steps, len(self.decoupled.stages))
        if beside:
            report = self.beside.step(self, schedule, self.steps, mode, values, target)
            self.steps += 1
            return report
        try:
            return self._stepping.run(self.steps, mode, values, target)
        finally:
            self.steps = self._stepping.steps

    def _prepare_optimizers(self) -> None:
        super()._prepare_optimizers()
        self.beside.keep_cap()

    @property
    def forecast(self) -> Forecast | None:
        """With ``memory_cap``: what a step would take in each way, and which was chosen; prints as
        a table. None without, or before the model is traced.
        """
        return None if self.beside.cap is None else self.beside.cap.forecast

    @property
    def threads(self) -> OnThreads | None:
        """The stages at work, with ``schedules.Threads``; None before the first step."""
        executor = self.beside.executor
        return executor if isinstance(executor, OnThreads) else None

    def gather(self) -> None:
        """Finish what is under way, and bring all stages into memory; they leave it at the next
        step. Else, what has left it must not be read.
        """
        self.beside.gather()

    def _find_delays(self) -> dict[int, int]:
        return self.beside.find_delays(self.schedule) or super()._find_delays()

    def close(self) -> None:
        """End the threads of ``schedules.Threads``, without waiting for batches that are under way;
        bring stages into memory that have left it; else do nothing.
        """
        self.beside.close()

    def drain(self) -> int:
        """Finish the batches that are under way, each of whose messages comes a step later, without
        new ones.

        Returns:
            How many steps of time that took: 0 where no source is late. Each makes an update,
            unless one that ``accumulate`` has begun is under way: what comes late is added to that.

        Raises:
            DecouplingError: a source waits for something that does not come.
            NonFiniteError: the last step's check was deferred, and it was not finite.
        """
        self._settle()
        if self.beside.executor is None:
            return self._in_turn.drain(self.steps)
        return self.beside.drain()

    @property
    def under_way(self) -> tuple[Batch, ...]:
        """Batches that something is still expected for, oldest first."""
        return tuple(self._in_turn.under_way)

    def finish_threads(self) -> None:
        """Wait until no thread works on the model, all of it is in memory, and no check is left."""
        self._settle()
        self.gather()

    def _settle(self) -> None:
        try:
            self._stepping.settle(self.steps, "later, when it was asked for")
        finally:
            self.steps = self._stepping.steps

    def to_folder(self, path: str | Path) -> Path:
        if not isinstance(self.schedule, Sequential | Threads):
            raise DecouplingError(
                f"a program with schedule={type(self.schedule).__name__} cannot be written as "
                "files: only 'sequential' and schedules.Threads"
            )
        if self.beside.visiting is not None:
            raise DecouplingError(
                "a program with update=, resident= or sweep= cannot be written as files: make the "
                "trainer without them"
            )
        self.finish_threads()
        self._make_optimizers()
        return super().to_folder(path)

    # ---- state -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._settle()
        self.beside.drain()

    def _in_memory(self, stage: int) -> AbstractContextManager[None]:
        return self.beside.in_memory(self, self.schedule, self.steps, stage)

    @property
    def _sweep(self) -> int | None:
        return self.beside.sweep

    def _begin_anew(self, steps: int) -> None:
        self.steps = steps
        self._in_turn.under_way = []
        self._stepping.forget()
        self.beside.begin_anew(steps)


def _checked_options(compile: Any, is_beside: bool) -> dict[str, Any]:
    """Options of ``torch.compile``, as given."""
    if not isinstance(compile, bool | dict):
        raise DecouplingError(
            "compile= is True, False or a dict of options as torch.compile(options=) takes it, not "
            f"{type(compile).__name__}"
        )
    if is_beside:
        raise DecouplingError(
            "compile= makes one call of all stages in turn, while schedules.Threads, update=, "
            "resident= and sweep= have each updated by itself: leave one of them out"
        )
    return compile if isinstance(compile, dict) else {}


def _checked_deferral(check_finite: Any, is_beside: bool) -> Deferral | None:
    """What defers the check, if it is to be."""
    if check_finite not in ("step", "deferred"):
        raise DecouplingError(f"check_finite= is 'step' or 'deferred', not {check_finite!r}")
    if check_finite == "step":
        return None
    if is_beside:
        raise DecouplingError(
            "check_finite='deferred' undoes whole steps of stages in turn, while "
            "schedules.Threads, update=, resident= and sweep= have each updated by itself: leave "
            "one of them out"
        )
    return Deferral()


def _warn_if_alone() -> None:
    """Say it where a launcher started several processes that know nothing of each other."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) < 2 or (dist.is_available() and dist.is_initialized()):
        return
    warnings.warn(
        f"WORLD_SIZE is {world}, but there is no process group: each process trains the whole "
        "model alone. To train together call dni_fx.distributed.start() and use "
        "dni_fx.distributed.Trainer",
        stacklevel=3,
    )
