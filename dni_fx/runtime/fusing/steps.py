"""Which steps a program makes, and the programs that there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...decoupled import Decoupled
from ...graphs.nested import Structure
from ...graphs.variants import Variant, kinds_of, layouts_of
from ...passes.trace.calls import ReadAttribute, StoreAttribute
from ...passes.trace.operators import count_constants
from ...passes.trace.state import preserved_rng, python_draws
from ..batch_state import Setting
from ..deferring import Deferral
from ..emitted import keep_modes
from ..objective import Objective
from ..optimizing import StageOptimizers
from ..saving import AllOrNothing
from .holding import Holding
from .program import Program, is_watched
from .recording import Inputs, record
from .updates import UnsettledError, find_updates

_MOST = 8  # programs; batches of further kinds are run eagerly
_OPTIONS = {"fallback_random": True}  # the random numbers of eager code


class _UndoneError(Exception):
    """Ends a step that is only looked at."""


class FusedSteps:
    """Makes a decoupled step by one compiled call where it can.

    Args:
        decoupled, objective, optimizers: what is trained, and how.
        options: of TorchInductor, as ``torch.compile(options=)`` takes them.

    Attributes:
        programs: made so far, the newest last.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        options: dict[str, Any],
    ) -> None:
        self._decoupled, self._objective, self._optimizers = decoupled, objective, optimizers
        self._options = _OPTIONS | options
        self._known: list[tuple[Variant, Any, Structure, Holding, Program | None]] = []
        self._said: set[str] = set()

    @property
    def programs(self) -> list[Program]:
        """Those that there are."""
        return [program for *_, program in self._known if program is not None]

    def step(
        self,
        setting: Setting,
        values: dict[str, Any],
        context: Callable[[], Tensor | None],
        target: Any,
        deferral: Deferral | None = None,
    ) -> tuple[Tensor, Any, Tensor] | None:
        """Make one step.

        Args:
            setting, values, target: of the batch.
            context: gives what sources see of the target.
            deferral: the step before, where this one's check is not looked at yet: it is made if
                that was finite, too.

        Returns:
            Loss and output, detached, and whether it was made; None where the step is to be made
            eagerly: nothing was changed then.
        """
        if (reason := self._obstacle(setting, values)) is not None:
            self._decline(reason)
            return None
        batch = Inputs.of(values, context(), target)
        program = self._find(setting, batch)
        if program is None:
            return None
        if deferral is not None:
            last = deferral.last
            return program(batch, None if last is None else last.verdict.tensor)
        put_back_rng = preserved_rng()
        found = program(batch)
        if not bool(found[-1]):  # the eager step names the place
            put_back_rng()
            return None
        return found

    def _decline(self, reason: str) -> Program | None:
        """No program; say why, once."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"compile=: these steps run eagerly: {reason}", stacklevel=2)
        return None

    def _obstacle(self, setting: Setting, values: dict[str, Any]) -> str | None:
        """Why steps of this kind are not recorded."""
        if setting.holds:
            return "a source waits for a message, or a schedule asks for the true gradient"
        if setting.inputs:
            return "there are synthetic inputs"
        if len(setting.active) < len(setting.stages):
            return "the schedule leaves stages out"
        if self._objective.accumulate > 1:
            return "accumulate= is not part of programs"
        if any(v.requires_grad for v in values.values()):
            return "an input asks for its gradient"
        return None

    def _find(self, setting: Setting, batch: Inputs) -> Program | None:
        """The program for a batch; recorded where there is none yet."""
        leaves, variant = [*batch.leaves], self._decoupled.graphs.variant
        layouts = kinds_of(leaves), layouts_of(leaves)
        for entry in self._known:
            known, shapes, like, holding, program = entry
            same = known is variant and shapes == layouts and like == batch.structure
            if same and holding.holds() and (program is None or program.holds()):
                return program
            if same:
                self._known.remove(entry)
                break
        if len(self._known) >= _MOST:
            return self._decline(f"there are {_MOST} programs, and this is another kind of batch")
        asked = [served.source for served in setting.served]
        called = [m for stage in setting.stages for m in stage.module.children()]
        holding = Holding(self._objective.loss, [*asked, *called])
        try:
            program = self._make(setting, batch, holding)
        except UnsettledError:  # the eager step makes the states
            return None
        self._known.append((variant, layouts, batch.structure, holding, program))
        return program

    def _make(self, setting: Setting, batch: Inputs, holding: Holding) -> Program | None:
        """Record a step, and put back all that it has changed."""
        named = dict(self._decoupled.named_parameters())
        kept = dict(self._decoupled.named_buffers())
        nodes = self._decoupled.graphs.variant.trace.graph.nodes
        if any(isinstance(node.target, ReadAttribute | StoreAttribute) for node in nodes):
            return self._decline("the model keeps tensors from call to call")
        if any(map(is_watched, named.values())):
            return self._decline("a parameter has hooks")
        found, draws, same = None, python_draws(), True
        try:
            with AllOrNothing(self._decoupled).step(False), keep_modes(), torch.enable_grad():
                found = record(setting, [*named.values()], [*kept.values()], batch)
                same = holding.holds() and python_draws() == draws
                raise _UndoneError
        except _UndoneError:
            pass
        except Exception as error:
            return self._decline(f"it cannot be recorded: {_first_line(error)}")
        assert found is not None
        if not same:
            return self._decline(
                "a source, the loss or a module changes its own attributes, or draws from Python's "
                "or NumPy's random numbers"
            )
        if held := count_constants(found.graph):
            return self._decline(f"it reads {held} tensors that are neither parameters nor buffers")
        updates = find_updates(self._optimizers.every(), found.parameters)
        if isinstance(updates, str):
            return self._decline(updates)
        tensors = [*named.values()], [*kept.values()], [*named, *kept]
        try:
            return Program(found, updates, self._optimizers, *tensors, batch, self._options)
        except Exception as error:
            return self._decline(f"it does not compile: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
