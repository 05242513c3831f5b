"""The graphs of one decoupled model: one for each mode, kind of inputs, and set of sizes that the
model looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..passes.cut.checking import guards_hold, values_hold
from ..passes.cut.emission import StageFunctions
from ..passes.cut.expecting import find_expected
from ..passes.cut.splitting import Split
from ..passes.search.searching import Choice
from ..passes.trace.held import broken
from ..passes.trace.settings import casts
from ..passes.trace.traces import Trace
from ..sources import GradientSource, Served
from .nested import Structure

Bound = tuple[tuple[dict[str, Any], str, str, Any, bool], ...]


class Variant:
    """The stages for one kind of call: structure of the inputs, modes, and sizes that the model
    looked at.

    Args:
        trace: the traced graph.
        choice: which node belongs to which stage.
        split: its stages.
        leaves: the tensors of the call that it was traced with.

    Attributes:
        kinds: dtype, rank, device and ``requires_grad`` of each tensor input.
        modes: values of the training flags that the graph is valid for.
        layouts: shapes and strides of inputs, under which autocast, for which the graph is known to
            be valid.
        parameters: the model's parameters when traced.
        frozen: their ``requires_grad`` and dtypes when traced.
        bound: where the model keeps what the stages refer to, and what it was.
        expected: where gradients must arrive, by stage.
        exact: whether the self-check found it equal bit for bit; None where it was not run.
        functions: emitted functions by stage, once first trained with.
        sources: the gradient source of each interface; None until first asked for.
        served: the same, grouped by source.
    """

    def __init__(
        self, trace: Trace, choice: Choice, split: Split, leaves: list[torch.Tensor]
    ) -> None:
        self.trace, self.choice, self.split = trace, choice, split
        self.kinds = kinds_of(leaves)
        self.modes = {tuple(m.training for m in trace.modes)}
        self.layouts = {layouts_of(leaves)}
        self.parameters = tuple(trace.model.parameters())
        self.frozen = self._facts()
        self.bound = _bound_attributes(split, trace.model)
        self.expected = find_expected(trace, choice.stage_of, split)
        self.exact: bool | None = None
        self.functions: tuple[StageFunctions, ...] = ()
        self.sources: dict[str, GradientSource] | None = None
        self.served: tuple[Served, ...] = ()

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
        return "what the graph refers to" if self.is_outdated() else None

    def is_outdated(self) -> bool:
        """Whether something that the graph refers to was replaced, frozen or unfrozen since."""
        return self._facts() != self.frozen or not all(
            _is_same(tables[kind].get(key), value, theirs)
            for tables, kind, key, value, theirs in self.bound
        )

    def _facts(self) -> list[Any]:
        """Of the parameters: whether they are trained, and their kinds of numbers."""
        return [*[p.requires_grad for p in self.parameters], *[p.dtype for p in self.parameters]]

    def absorb(self, other: Variant) -> bool:
        """Take over the calls of a variant whose graph turned out to be the same, for example in
        evaluation mode.
        """
        mine, theirs = self.trace, other.trace
        kept = {k: v for k, v in mine.attributes.items() if k[0] == "_"}
        same = (
            mine.has_same_guards(theirs)
            and all(theirs.attributes.get(k) is v for k, v in kept.items())
            and mine.is_same_graph(theirs)
            and mine.inputs == theirs.inputs
            and mine.modes == theirs.modes
            and (self.kinds, self.frozen) == (other.kinds, other.frozen)
            and _identities(self.bound) == _identities(other.bound)
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
            _, *known = next(iter(self.layouts))
            other = [shape[1:] for shape, *_ in known] != [t.shape[1:] for t in leaves]
            if self.trace.rung == "export" or not guards_hold(self.trace, leaves, other):
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
    """What must not change between calls of one graph, besides sizes that the model looked at:
    kinds of tensors, and which of them are one.
    """
    kinds = [(type(t), t.dtype, t.dim(), t.device, t.layout, t.requires_grad) for t in leaves]
    places = [id(t) for t in leaves]
    again = len(set(places)) < len(places)
    return tuple(kinds), tuple(map(places.index, places)) if again else ()


def layouts_of(leaves: list[torch.Tensor]) -> tuple[Any, ...]:
    """What guards may depend on and need not be proved twice: shapes, strides and autocast."""
    strided = torch.strided
    return casts(), *(
        (t.shape, t.stride(), t.storage_offset()) if t.layout is strided else (t.shape,)
        for t in leaves
    )


def _is_same(now: Any, before: Any, theirs: bool) -> bool:
    """Whether the graph still refers to it; what is called as a whole may be lent plain tensors
    for a call, as ``torch.func.functional_call`` does.
    """
    lent = theirs and isinstance(now, torch.Tensor) and not isinstance(now, nn.Parameter)
    return now is before or lent


def _identities(bound: Bound) -> list[tuple[int, str, str, int]]:
    return [(id(tables), kind, key, id(value)) for tables, kind, key, value, _ in bound]


def _bound_attributes(split: Split, model: nn.Module) -> Bound:
    """Where the model keeps what the stages refer to, so that a replaced parameter, buffer or
    module is noticed: the owner's tables, which one, key and object of all that is called or read.
    """
    called = {path for stage in split.stages for path in stage.called}
    bound: dict[tuple[int, str, str], tuple[dict[str, Any], str, str, Any, bool]] = {}
    theirs: set[str] = set()  # paths of what modules that are called as a whole are made of
    for path, module in model.named_modules(remove_duplicate=False):
        if path in called or path.rpartition(".")[0] in theirs:
            theirs.add(path)
        for kind in ("_modules", "_parameters", "_buffers"):
            if path in theirs and kind != "_parameters":
                continue  # theirs to exchange
            tables = vars(module)
            for key, value in tables[kind].items():
                bound[id(module), kind, key] = (tables, kind, key, value, path in theirs)
    return tuple(bound.values())
