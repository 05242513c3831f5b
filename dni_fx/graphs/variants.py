"""The graphs of one decoupled model: one for each mode, kind of inputs, and set of sizes that the
model looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.cut.checking import guards_hold
from ..passes.cut.emission import StageFunctions
from ..passes.cut.splitting import Split
from ..passes.search.searching import Choice
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
        shapes: shapes of inputs for which the graph is known to be valid.
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
    shapes: set[tuple[torch.Size, ...]]
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
            shapes={tuple(t.shape for t in leaves)},
        )

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the cuts, in order."""
        return self.choice.cuts

    def is_current(self) -> bool:
        """Whether the model is in a mode, and of the objects, that the graph was traced with."""
        return (
            tuple([m.training for m in self.trace.modes]) in self.modes
            and all(table.get(key) is value for table, key, value in self.bound)
            and tuple([p.requires_grad for p in self.parameters]) == self.frozen
        )

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
            not self.trace.guards
            and not other.trace.guards
            and all(
                other.trace.attributes.get(k) is v
                for k, v in self.trace.attributes.items()
                if k[0] == "_"
            )
            and self.trace.digest == other.trace.digest
            and self.trace.inputs == other.trace.inputs
            and self.trace.modes == other.trace.modes
            and self.kinds == other.kinds
            and self.has_same_objects(other)
        )
        if same:
            self.modes |= other.modes
            self.shapes |= other.shapes
        return same

    def accepts(self, structure: Structure, leaves: list[torch.Tensor]) -> bool:
        """Whether the graph is valid for a call."""
        if (
            not self.is_current()
            or kinds_of(leaves) != self.kinds
            or structure != self.trace.inputs
        ):
            return False
        shapes = tuple([t.shape for t in leaves])
        if shapes not in self.shapes:
            if not self._differs_in_batch_only(shapes) and not guards_hold(self.trace, leaves):
                return False
            self.shapes.add(shapes)
        return True

    def _differs_in_batch_only(self, shapes: tuple[torch.Size, ...]) -> bool:
        """A new batch size of a graph without guards needs no proof."""
        known = next(iter(self.shapes))
        return not self.trace.guards and [s[1:] for s in shapes] == [s[1:] for s in known]


def kinds_of(leaves: list[torch.Tensor]) -> tuple[Any, ...]:
    """What must not change between calls of one graph, besides sizes that the model looked at."""
    return tuple((t.dtype, t.dim(), t.device, t.requires_grad) for t in leaves)


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
