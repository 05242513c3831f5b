"""What every trainer has, whichever way it runs the stages."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar, cast

import torch
from torch import nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..program.folder import write_folder
from ..program.options import TrainingOptions
from .delays import find_delays
from .loops import Loops
from .objective import Loss, Metrics, Objective
from .optimizing import LrScale, MakeOptimizer, StageOptimizers

_EXAMPLES = {  # of what a trainer calls
    "loss": "torch.nn.functional.cross_entropy, or lambda output, target: ... -> a scalar tensor",
    "optimizer": "optimizer=lambda params: torch.optim.Adam(params, 1e-3)",
    "synthesizer_optimizer": "synthesizer_optimizer=lambda params: torch.optim.Adam(params, 1e-3)",
}


_Step = TypeVar("_Step", bound=Callable[..., Any])


def one_at_a_time(step: _Step) -> _Step:
    """A trainer's step that refuses to begin while another one is under way."""

    @functools.wraps(step)
    def alone(self: BaseTrainer, *args: Any, **kwargs: Any) -> Any:
        if not self.turn.acquire(blocking=False):
            raise DecouplingError(
                "step() was called while another step of this trainer is under way, on another "
                "thread or from what the step itself calls: make one after the other (stages that "
                "run at once: schedule=dni_fx.schedules.Threads())"
            )
        try:
            return step(self, *args, **kwargs)
        finally:
            self.turn.release()

    return cast(_Step, alone)


class BaseTrainer(Loops):
    """A model, its objective, its optimisers, and the loop over a loader.

    Args:
        decoupled, loss, optimizer, synthesizer_optimizer, clip_norm, accumulate, metrics_every,
            lr_scale: as for :class:`dni_fx.Trainer`.
        context: turns a target into what sources see; that of ``decoupled`` by default.

    Attributes:
        objective: the loss, and what sources see of the target.
        optimizing: the optimisers, with what each owns.
        metrics: when predictions are compared, and what was found.
        is_alone: whether the trainer holds the whole model.
        steps: number of steps made.
        turn: held by the step that is under way.

    Raises:
        DecouplingError: arguments of the wrong kind.
    """

    is_alone = True

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Loss,
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
        context: Callable[[Any], torch.Tensor] | None = None,
        lr_scale: LrScale = None,
    ) -> None:
        if not isinstance(decoupled, Decoupled):
            raise DecouplingError(
                f"Trainer takes what dni_fx.decouple returned, not {type(decoupled).__name__}"
            )
        _check_callables(loss, optimizer, synthesizer_optimizer)
        if not all(type(n) is int and n >= 1 for n in (accumulate, metrics_every)):
            raise DecouplingError("accumulate and metrics_every must be whole numbers, at least 1")
        if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
            raise DecouplingError(f"clip_norm must be positive, not {clip_norm!r}")
        _check_rates(lr_scale)
        self.decoupled = decoupled
        self.objective = Objective(loss, accumulate, lambda: context or decoupled.context)
        self.optimizing = StageOptimizers(
            optimizer, synthesizer_optimizer, clip_norm, 1 / accumulate, lr_scale
        )
        self.metrics = Metrics(metrics_every)
        self.steps, self.turn = 0, threading.Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a trainer is neither copied nor pickled: save its state_dict(), make another one of "
            "the same model and plan, and load it there"
        )

    def prepare(self, *args: Any, target: Any = None, **kwargs: Any) -> Self:
        """Trace the model for one batch without training on it, as the first step would: stages,
        sources and optimisers exist then. Not needed where ``decouple`` was given example inputs.

        Args:
            *args: positional inputs of the model.
            target: taken so that the call may be that of ``step``; not looked at.
            **kwargs: keyword inputs of the model.

        Returns:
            The trainer.

        Raises:
            DecouplingError: inputs that do not fit the plan.
        """
        self._bind_call(*args, **kwargs)
        self._prepare_optimizers()
        return self

    def _bind_call(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's inputs by name; an error tells where the target goes if there are too many
        of them.
        """
        try:
            return self.decoupled.bind(*args, **kwargs)
        except DecouplingError as error:
            if not _takes_fewer(self.decoupled.model, len(args)):
                raise
            hint = "; the target goes by keyword: step(x, target=y)"
            raise type(error)(f"{error}{hint}") from error

    @property
    def loss(self) -> Loss:
        """The user's loss; another one counts from the next step on."""
        return self.objective.loss

    @loss.setter
    def loss(self, loss: Loss) -> None:
        self.objective.loss = loss

    @property
    def clip_norm(self) -> float | None:
        """Largest norm of one stage's gradients; another one counts from the next step on."""
        return self.optimizing.clip_norm

    @clip_norm.setter
    def clip_norm(self, clip_norm: float | None) -> None:
        self.optimizing.clip_norm = clip_norm

    @property
    def metrics_every(self) -> int:
        """How often predictions are compared with their targets, in steps; may be changed."""
        return self.metrics.every

    @metrics_every.setter
    def metrics_every(self, every: int) -> None:
        self.metrics.every = every

    @property
    def accumulate(self) -> int:
        """How many steps' gradients make one update; fixed when the trainer is made."""
        return self.objective.accumulate

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By stage name, for learning-rate schedulers.

        Raises:
            DecouplingError: the model is not traced yet.
        """
        self._make_optimizers()
        return self.optimizing.stages

    @property
    def synthesizer_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By interface name, that of a synthetic input by ``name@input``.

        Raises:
            DecouplingError: the model is not traced yet.
        """
        self._make_optimizers()
        return self.optimizing.sources

    def _make_optimizers(self) -> None:
        """They exist as soon as the model is traced, whoever called it."""
        if self.optimizing.is_prepared:
            return
        if self.decoupled.graphs.active is None:
            raise DecouplingError(
                "there are no optimisers yet, since the model is traced at its first call and only "
                "then has stages: call trainer.prepare(...) with one batch, as step takes it, or "
                "pass example_inputs= to decouple, before asking for optimisers or making "
                "schedulers of them"
            )
        self._prepare_optimizers()

    def _prepare_optimizers(self) -> None:
        """Make them for all stages that are trained here."""
        self.optimizing.prepare(self.decoupled.graphs, self.decoupled.stages)

    def delays(self) -> dict[str, int]:
        """How many steps pass from a stage's forward on a batch to its whole gradient, by stage.

        It is 0 where a stage's sources answer at once, and where it waits within the step. Of
        stages that run at once without a fixed staleness it is what was last measured here; before
        that, and of other processes' stages, the lag of the sources.

        Raises:
            DecouplingError: the model is not traced yet.
        """
        self._make_optimizers()
        return {f"stage_{k}": delay for k, delay in sorted(self._find_delays().items())}

    def _find_delays(self) -> dict[int, int]:
        return find_delays(self.decoupled.graphs.served(), len(self.decoupled.stages))

    def to_folder(self, path: str | Path) -> Path:
        """As :meth:`dni_fx.Decoupled.to_folder`, with this trainer's loss and optimisers, which
        begin anew there. Through time, ``train_step`` takes a window and what goes on from the one
        before, and sequences of a batch end together.

        Raises:
            DecouplingError: as there; or a schedule, options or messages that the files have no
                loop for.
        """
        own = self.optimizing
        if not self.is_alone:
            raise DecouplingError(
                "a program of several processes cannot be written as files: call "
                "decoupled.to_folder on one of them"
            )
        if own.lr_scale is not None:
            raise DecouplingError(
                "a program with lr_scale= cannot be written as files: let optimizer= make each "
                "stage's own rates"
            )
        told = TrainingOptions(
            self.loss,
            own.make,
            own.make_for_sources,
            self.clip_norm,
            self.accumulate,
            self.objective.encoder(),
        )
        return write_folder(self.decoupled.graphs, told, path)

    def request_metrics(self) -> None:
        """Compare predictions with their targets at the next step, whatever ``metrics_every``
        says.
        """
        self.metrics.requested = True


def _check_callables(*given: Any) -> None:
    """Refuse what a trainer could not call: loss and optimisers, in the order of the examples."""
    for (name, example), value in zip(_EXAMPLES.items(), given, strict=True):
        if callable(value) or (value is None and name == "synthesizer_optimizer"):
            continue
        found, why = repr(value), ""
        if isinstance(value, torch.optim.Optimizer):
            found, why = (
                f"a {type(value).__name__} made already",
                ", since each stage makes its own",
            )
        raise DecouplingError(f"{name} must be callable{why}, but is {found[:80]}: pass {example}")


def _check_rates(lr_scale: Any) -> None:
    """Refuse what is no factor for each stage."""
    if lr_scale is None or lr_scale == "delay":
        return
    fits = isinstance(lr_scale, Mapping) and all(
        isinstance(v, int | float) and 0 <= v < math.inf for v in lr_scale.values()
    )
    if not fits:
        raise DecouplingError(
            "lr_scale takes 'delay', or a factor for each stage by name, such as {'stage_0': 0.5}, "
            f"not {lr_scale!r}"
        )


def _takes_fewer(model: nn.Module, count: int) -> bool:
    """Whether a model takes fewer positional inputs than ``count``."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) < count
