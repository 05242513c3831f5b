"""The graphs of one decoupled model: one for each mode, kind of inputs, and set of sizes that the
model looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.cut.checking import guards_hold, values_hold
from ..passes.cut.emission import StageFunctions
from ..passes.cut.splitting import Split
from ..passes.search.choosing import Choice
from ..passes.trace.held import broken
from ..passes.trace.tracing import Trace
from ..sources import GradientSource, Served
from .nested import Structure


@dataclass
class Variant:
    """The stages for one kind of call: structure of the inputs, modes, and sizes that the model
    looked at.

    Attributes:
        trace: the traced graph.
        choice: which node belongs to which stage.
        split: its stages.
        functions: emitted functions by stage.
        kinds: dtype, rank, device and ``requires_grad`` of each tensor input.
        modes: values of the training flags that the graph is valid for.
        parameters: the model's parameters when traced.
        frozen: their ``requires_grad`` when traced.
        bound: where the model keeps what the stages refer to, and what it was.
        layouts: shapes and strides of inputs, under which modes, for which the graph is known to
            be valid.
        exact: whether the self-check found it equal bit for bit; None where it was not run.
        sources: the gradient source of each interface; None until first asked for.
        served: the same, grouped by source.
    """

    trace: Trace
    choice: Choice
    split: Split
    kinds: tuple[Any, ...]
    modes: set[tuple[bool, ...]]
    parameters: tuple[nn.Parameter, ...]
    frozen: tuple[bool, ...]
    bound: tuple[tuple[dict[str, Any], str, Any], ...]
    layouts: set[tuple[Any, ...]]
    exact: bool | None = None
    functions: tuple[StageFunctions, ...] = ()
    sources: dict[str, GradientSource] | None = None
    served: tuple[Served, ...] = ()

    @classmethod
    def of(cls, trace: Trace, choice: Choice, split: Split, leaves: list[torch.Tensor]) -> Variant:
        """The variant for the call that it was traced with, whose tensors are ``leaves``."""
        parameters = tuple(trace.model.parameters())
        return cls(
            trace=trace,
            choice=choice,
            split=split,
            kinds=kinds_of(leaves),
            modes={tuple(m.training for m in trace.modes)},
            parameters=parameters,
            frozen=tuple(p.requires_grad for p in parameters),
            bound=_bound_attributes(split, trace.model),
            layouts={layouts_of(leaves)},
        )

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the cuts, in order."""
        return self.choice.cuts

    def is_current(self) -> bool:
        """Whether the model is in a mode, and of the objects, that the graph was traced with."""
        return self._change() is None

    def _change(self) -> str | None:
        """What has changed in the model since the graph was traced."""
        if tuple([m.training for m in self.trace.modes]) not in self.modes:
            return "a module's mode"
        if (changed := broken(self.trace.held)) is not None:
            return changed.place
        if not all(table.get(key) is value for table, key, value in self.bound):
            return next(repr(k) for t, k, v in self.bound if t.get(k) is not v)
        if tuple([p.requires_grad for p in self.parameters]) != self.frozen:
            return "requires_grad of a parameter"
        return None

    def is_outdated(self) -> bool:
        """Whether something that the graph refers to was replaced, frozen or unfrozen since."""
        same = all(table.get(key) is value for table, key, value in self.bound)
        return not same or tuple(p.requires_grad for p in self.parameters) != self.frozen

    def has_same_objects(self, other: Variant) -> bool:
        """Whether both were traced with the same parameters, buffers and modules, frozen or not."""
        mine = [(id(t), k, id(v)) for t, k, v in self.bound]
        return (
            mine == [(id(t), k, id(v)) for t, k, v in other.bound] and self.frozen == other.frozen
        )

    def absorb(self, other: Variant) -> bool:
        """Take over the calls of a variant whose graph turned out to be the same, for example in
        evaluation mode.
        """
        same = (
            self.trace.has_same_guards(other.trace)
            and all(
                other.trace.attributes.get(k) is v
                for k, v in self.trace.attributes.items()
                if k[0] == "_"
            )
            and self.trace.is_same_graph(other.trace)
            and self.trace.inputs == other.trace.inputs
            and self.trace.modes == other.trace.modes
            and self.kinds == other.kinds
            and self.has_same_objects(other)
        )
        if same:
            self.modes |= other.modes
            self.layouts |= other.layouts
        return same

    def accepts(self, structure: Structure, leaves: list[torch.Tensor]) -> bool:
        """Whether the graph is valid for a call."""
        return self.objection(structure, leaves) is None

    def objection(self, structure: Structure, leaves: list[torch.Tensor]) -> str | None:
        """Why the graph is not valid for a call, in a few words; None where it is."""
        if (change := self._change()) is not None:
            return change
        if kinds_of(leaves) != self.kinds:
            return "dtype, rank, device or requires_grad of an input"
        if structure != self.trace.inputs or not self._holds_objects(structure):
            return "an input that is no tensor"
        key = layouts_of(leaves)
        if key not in self.layouts:
            if self.trace.rung == "export" or not guards_hold(self.trace, leaves):
                return "sizes or strides of inputs"
            self.layouts.add(key)
        return None if values_hold(self.trace, leaves) else "values of inputs"

    def _holds_objects(self, structure: Structure) -> bool:
        """Whether objects among the inputs that the graph itself refers to are the same."""
        if not self.trace.holds_inputs:
            return True
        pairs = zip(structure.constants(), self.trace.inputs.constants(), strict=True)
        return all(a is b for a, b in pairs if id(b) in self.trace.holds_inputs)


def kinds_of(leaves: list[torch.Tensor]) -> tuple[Any, ...]:
    """What must not change between calls of one graph, besides sizes that the model looked at."""
    return tuple((type(t), t.dtype, t.dim(), t.device, t.layout, t.requires_grad) for t in leaves)


def layouts_of(leaves: list[torch.Tensor]) -> tuple[Any, ...]:
    """What guards may depend on and need not be proved twice: shapes, strides and autocast."""
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    strided = torch.strided
    return cast, *((t.shape, t.stride() if t.layout is strided else ()) for t in leaves)


def _bound_attributes(
    split: Split, model: nn.Module
) -> tuple[tuple[dict[str, Any], str, Any], ...]:
    """Where the model keeps what the stages refer to, so that a replaced parameter, buffer or
    module is noticed.

    Returns:
        Triples (table of the owning module, key, object) for every module called and attribute
        read.
    """
    called = {path for stage in split.stages for path in stage.called}
    bound: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind in ("_modules", "_parameters", "_buffers"):
            table = vars(module)[kind]
            for key, value in table.items():
                name = f"{path}.{key}" if path else key
                if name in called if kind == "_modules" else path not in called:
                    bound[id(table), key] = (table, key, value)
    return tuple(bound.values())
