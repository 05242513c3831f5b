"""Whole steps of stages in turn: compiled where that can be, else eager; known to be finite before
their updates, or in the next step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import map_tensors
from ..passes.trace.state import preserved_rng
from ..reports.steps import StepReport
from ..schedules import Mode
from .batch_state import Settings
from .deferring import Deferral, SpoiltError, Unseen, Verdict
from .fusing.steps import FusedSteps
from .in_turn import Batch, InTurn
from .objective import Metrics, Objective
from .optimizing import StageOptimizers


class Stepping:
    """Makes steps.

    Args:
        decoupled, objective, optimizers, metrics: what is trained, and how.
        fused: compiled steps; None for eager ones alone.
        deferral: where checks are looked at a step later; None where they are not.

    Attributes:
        in_turn: the executor.
        steps: made so far; fewer again where some are undone.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        fused: FusedSteps | None,
        deferral: Deferral | None,
    ) -> None:
        self.in_turn: InTurn[Batch] = InTurn(decoupled, optimizers, metrics, objective.accumulate)
        self.steps = 0
        self._decoupled, self._objective, self._metrics = decoupled, objective, metrics
        self._settings = Settings(decoupled.graphs, objective, ahead=optimizers.ahead)
        self._fused, self._deferral = fused, deferral

    @property
    def is_unseen(self) -> bool:
        """Whether the last step has not been looked at."""
        return self._deferral is not None and self._deferral.last is not None

    def forget(self) -> None:
        """Leave the last step as it is."""
        if self._deferral is not None:
            self._deferral.last = None

    def settle(self, steps: int, when: str) -> None:
        """See :meth:`Deferral.settle`; ``steps`` are those made so far."""
        self.steps = steps
        if self._deferral is not None:
            self._deferral.settle(when)

    def run(self, steps: int, mode: Mode, values: dict[str, Any], target: Any) -> StepReport:
        """Make one step.

        Args:
            steps: made so far.
            mode: what the schedule asks for.
            values: the model's inputs, by name.
            target: what the loss and the context take.

        Raises:
            NonFiniteError: this step, or the one before, is not finite.
            DecouplingError: the check is to be deferred, and a source is late.
        """
        self.steps, deferral = steps, self._deferral
        if deferral is None:
            return self._make(mode, values, target)
        if any(isinstance(v, Tensor) and v.requires_grad for v in values.values()):
            deferral.settle("in the next step")  # which could not be made again
            return self._make(mode, values, target)
        self._check_none_late()
        # the caller may write into its own before the step has to be made again
        kept = map_tensors(torch.clone, (values, target))
        try:
            return self._make(mode, values, target, deferral, kept)
        except BaseException:
            if deferral.is_fine:
                raise
        deferral.settle(f"in step {steps + 1}, which was not made, either")
        return self._make(mode, values, target)

    def _make(
        self,
        mode: Mode,
        values: dict[str, Any],
        target: Any,
        deferral: Deferral | None = None,
        kept: Any = None,
    ) -> StepReport:
        """Make a step; with a ``deferral`` its check is left to that, and it is made again of what
        was ``kept`` if it must.
        """
        setting, steps, known = self._settings.of(mode), self.steps, dict(self._metrics.found)
        context = functools.cache(lambda: self._objective.context(target))  # it may be random
        put_back_rng = (lambda: None) if deferral is None else preserved_rng()
        compares = self._metrics.is_due(steps)
        fused = None if compares else self._fused
        made = None if fused is None else fused.step(setting, values, context, target, deferral)
        flag: Tensor | None
        undo_step: Callable[[], None]
        if made is not None:
            (loss, output, flag), undo_step = made, put_back_rng
            if deferral is not None and not deferral.is_fine:
                raise SpoiltError
        else:
            batch, outputs = Batch(setting, compares), list[Any]()

            def begin() -> None:
                batch.begin(values, context(), target, self.in_turn.clock)
                outputs.append(batch.state.output)

            flag, undo_step = self.in_turn.advance(steps, batch, begin, None, deferral)
            found, output = batch.state.loss, outputs[0]
            loss = torch.tensor(math.nan) if found is None else found * self._objective.accumulate
        self.steps += 1
        if deferral is not None and flag is not None:

            def undo() -> None:
                undo_step()
                self.steps, self._metrics.found = steps, known

            deferral.last = Unseen(Verdict(flag), undo, functools.partial(self._make, mode, *kept))
        return StepReport(loss, output, dict(self._metrics.found), self.steps)

    def _check_none_late(self) -> None:
        """Steps that go on in later ones cannot be undone by themselves."""
        for name, source in self._decoupled.sources.items():
            if source.asks.lag:
                raise DecouplingError(
                    "check_finite='deferred' undoes a step that was not finite, but the source at "
                    f"{name!r} ({type(source).__name__}) is late: batches would be under way. Use "
                    "check_finite='step', or a source without a lag"
                )
