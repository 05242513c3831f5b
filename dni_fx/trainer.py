"""The trainer of a whole model: stages in turn, or each on a thread."""

from __future__ import annotations

import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .decoupled import Decoupled
from .errors import DecouplingError
from .graphs.nested import map_tensors
from .parallel.threads import OnThreads
from .reports.steps import StepReport
from .runtime.batch_state import Settings
from .runtime.fusing.steps import FusedSteps
from .runtime.in_turn import Batch, InTurn
from .runtime.measuring import Measures
from .runtime.objective import Loss
from .runtime.optimizing import MakeOptimizer
from .runtime.saving import load_trained, trained_state
from .runtime.transforms import check_ordinary
from .schedules import Flow, Mode, Schedule, Sequential, Threads, make_schedule, mode_of


class Trainer(Measures):
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
        synthesizer_optimizer: the same for the sources; Adam by default.
        schedule: which stages a step updates, and how much of the true gradient they get:
            ``"sequential"`` (all, none), ``"random"``, or one of :mod:`dni_fx.schedules`.
        clip_norm: largest norm of one stage's gradients. It is per stage: a global norm would have
            to wait for all.
        accumulate: how many steps' gradients make one update; the loss of each counts 1 /
            accumulate.
        metrics_every: how often the predictions are compared with their targets, in steps.
        compile: whether a whole step (stages, sources, SGD's or Adam's updates) is one call that
            TorchInductor makes faster; or its options, as ``torch.compile(options=)`` takes them.
            Numbers agree with eager steps to rounding, ``.grad`` is not kept, and what cannot be
            recorded runs eagerly, with a warning that says why.

    Attributes:
        fused: the compiled steps; None without ``compile``.
        threads: the stages at work, with ``schedules.Threads``; None before the first step.

    Raises:
        DecouplingError: arguments of the wrong kind.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Loss,
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer = torch.optim.Adam,
        schedule: str | Schedule = "sequential",
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__(
            decoupled,
            loss,
            optimizer=optimizer,
            synthesizer_optimizer=synthesizer_optimizer,
            clip_norm=clip_norm,
            accumulate=accumulate,
            metrics_every=metrics_every,
        )
        self.schedule = make_schedule(schedule)
        _warn_if_alone()
        self._in_turn: InTurn[Batch] = InTurn(decoupled, self.optimizing, self.metrics, accumulate)
        self.threads: OnThreads | None = None
        self._settings = Settings(decoupled.graphs, self.objective)
        self.fused: FusedSteps | None = None
        if compile is not False:
            options = _checked_options(compile, self.schedule)
            self.fused = FusedSteps(decoupled, self.objective, self.optimizing, options)
        if decoupled.graphs.active is not None:
            self._prepare_optimizers()

    # ---- steps -----------------------------------------------------------------------------------

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
        if isinstance(schedule, Threads):
            # The caller may write into its own.
            args, kwargs, target = map_tensors(torch.clone, (args, kwargs, target))
            if self.threads is not None:
                self.threads.check_modes()
            if not self.decoupled.has_graph_for(*args, **kwargs):
                self.drain()  # a model is traced while nothing else uses it
        values = check_ordinary(self._bind_call(*args, **kwargs), target)
        self._prepare_optimizers()
        mode = mode_of(schedule, self.steps, len(self.decoupled.stages))
        if isinstance(schedule, Threads):
            return self._hand_over(schedule.flow, mode, values, target)
        return self._run(mode, values, target)

    def _run(self, mode: Mode, values: dict[str, Any], target: Any) -> StepReport:
        """One stage after the other."""
        setting = self._settings.of(mode)
        context = functools.cache(lambda: self.objective.context(target))  # it may be random
        fused = None if self.metrics.is_due(self.steps) else self.fused
        made = None if fused is None else fused.step(setting, values, context, target)
        if made is not None:
            self.steps += 1
            return StepReport(*made, dict(self.metrics.found), self.steps)
        batch = Batch(setting)
        output: list[Any] = []

        def begin() -> None:
            batch.begin(values, context(), target, self._in_turn.clock)
            output.append(batch.state.output)

        self._in_turn.advance(self.steps, batch, begin)
        self.steps += 1
        found = batch.state.loss
        loss = torch.tensor(math.nan) if found is None else found * self.accumulate
        return StepReport(loss, output[0], dict(self.metrics.found), self.steps)

    def _hand_over(self, flow: Flow, mode: Mode, values: dict[str, Any], target: Any) -> StepReport:
        """To the stages' threads."""
        try:
            if self.threads is None:
                model, loss, optimizers = self.decoupled, self.objective, self.optimizing
                self.threads = OnThreads(model, loss, optimizers, self.metrics, flow, self.steps)
                self.threads.end_with(self)
            threads = self.threads
            threads.submit(threads.make_jobs(self.steps, mode, values, target))
            self.metrics.requested = False
            self.steps += 1
            return threads.report(self.steps)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads of ``schedules.Threads``, without waiting for batches that are under way;
        else do nothing.
        """
        threads, self.threads = self.threads, None
        if threads is not None:
            threads.close()

    def drain(self) -> int:
        """Finish the batches that are under way, each of whose messages comes a step later, without
        new ones.

        Returns:
            How many steps of time that took: 0 where no source is late. Each makes an update,
            unless one that ``accumulate`` has begun is under way: what comes late is added to that.

        Raises:
            DecouplingError: a source waits for something that does not come.
        """
        if self.threads is None:
            return self._in_turn.drain(self.steps)
        try:
            return self.threads.drain()
        except BaseException:
            self.close()
            raise

    @property
    def under_way(self) -> tuple[Batch, ...]:
        """Batches that something is still expected for, oldest first."""
        return tuple(self._in_turn.under_way)

    def finish_threads(self) -> None:
        """Wait until no thread works on the model."""
        if self.threads is not None:
            self.drain()

    def to_folder(self, path: str | Path) -> Path:
        if not isinstance(self.schedule, Sequential | Threads):
            raise DecouplingError(
                f"a program with schedule={type(self.schedule).__name__} cannot be written as "
                "files: only 'sequential' and schedules.Threads"
            )
        self.finish_threads()
        self._make_optimizers()
        return super().to_folder(path)

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on bit for bit: model, sources, optimisers, random
        states, step.

        Raises:
            DecouplingError: batches are under way to a late source; their graphs cannot be saved.
        """
        self.finish_threads()
        if waiting := len(self._in_turn.under_way):
            raise DecouplingError(
                f"{waiting} batches are still under way to late sources and cannot be saved: call "
                "trainer.drain() first, which finishes them"
            )
        return trained_state(self.decoupled, self.optimizing, self.steps, self.accumulate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the plan must be the same. Batches under way are
        dropped.

        Args:
            state: what ``state_dict`` returned, for example by ``torch.load``.

        Raises:
            DecouplingError: the state belongs to other stages or sources; nothing is loaded then.
        """
        load_trained(state, self.decoupled, self.optimizing, self.close)
        self.steps = state["steps"]
        self._in_turn.under_way = []


def _checked_options(compile: Any, schedule: Schedule) -> dict[str, Any]:
    """Options of ``torch.compile``, as given."""
    if not isinstance(compile, bool | dict):
        raise DecouplingError(
            "compile= is True, False or a dict of options as torch.compile(options=) takes it, not "
            f"{type(compile).__name__}"
        )
    if isinstance(schedule, Threads):
        raise DecouplingError(
            "compile= makes one call of all stages in turn, and schedules.Threads runs them at "
            "once: leave one of them out"
        )
    return compile if isinstance(compile, dict) else {}


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
