"""What tracing gives: a graph, what it stands for, and where it holds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...graphs.nested import Structure
from .calls import DropAttribute, Fill, StoreAttribute
from .containers import Assembled, signature
from .held import Held
from .prefixes import is_by_value, sizes_behind
from .state import Changes


@dataclass(frozen=True)
class Port:
    """A value that leaves the graph for the next window or for another network.

    Attributes:
        name: of the interface.
        index: which of the output node's arguments it is; those after the model's own output.
        feeds: as in :class:`dni_fx.plan.Interface`.
        batch_dim: dimension of the batch.
    """

    name: str
    index: int
    feeds: str
    batch_dim: int = 0


@dataclass
class Trace:
    """A traced model.

    Attributes:
        graph: nodes with the facts listed in ``provenance`` in their ``meta``; never changed after
            tracing.
        model: the user's model.
        attributes: what ``call_module`` and ``get_attr`` targets stand for, by reference.
        inputs: structure of ``(args, kwargs)``; its leaves are the placeholders, in order.
        outputs: structure of the result; its leaves are the arguments of the output node.
        guards: nodes whose value, if it differs for other inputs, makes this graph invalid for
            them.
        calls: module path, output node and last node made in it, in the order in which modules
            returned.
        modes: modules whose ``training`` flag this graph holds fast.
        held: plain values that it holds fast.
        rung: which tracer made the graph: ``"calls"``, ``"calls on real tensors"`` or ``"export"``.
        opaque: paths of modules kept as one node because they could not be looked into, with the
            reason.
        notes: further remarks for the plan.
        ports: values that leave the graph besides the output.
        incoming: names of the placeholders that such values arrive at and gradients leave from.
        changes: what a call does besides returning something, as far as was seen.
    """

    graph: fx.Graph
    model: nn.Module
    attributes: dict[str, Any]
    inputs: Structure
    outputs: Structure
    guards: tuple[tuple[fx.Node, Any], ...]
    calls: tuple[tuple[str, fx.Node | None, fx.Node], ...]
    modes: tuple[nn.Module, ...]
    rung: str
    held: tuple[Held, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    incoming: tuple[str, ...] = ()
    changes: Changes = field(default_factory=Changes)

    @functools.cached_property
    def guards_by_shape(self) -> dict[fx.Node, Any]:
        """Those that tell themselves from shapes, strides and kinds of the inputs."""
        return {n: value for n, value in self.guards if not is_by_value(n)}

    @functools.cached_property
    def guards_by_value(self) -> dict[fx.Node, Any]:
        """Those for which a part of the graph is run before each call."""
        return {n: value for n, value in self.guards if is_by_value(n)}

    @functools.cached_property
    def guarded_sizes(self) -> tuple[fx.Node, ...]:
        """What those need of sizes that only shapes tell."""
        return sizes_behind(self.guards_by_value)

    @functools.cached_property
    def known_sizes(self) -> dict[tuple[torch.Size, ...], dict[fx.Node, int]]:
        """The same, as far as it was found, by the shapes of the inputs."""
        return {}

    def placed(self, leaves: Sequence[torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
        """The tensors of a call by placeholder."""
        places = (node for node in self.graph.nodes if node.op == "placeholder")
        return dict(zip(places, leaves, strict=True))

    @property
    def output_leaves(self) -> tuple[Any, ...]:
        """What the model's own output is made of: nodes, or constants."""
        leaves: Any = next(reversed(self.graph.nodes)).args[0]
        return tuple(leaves[: self.outputs.leaf_count])

    def port_node(self, port: Port) -> fx.Node:
        """The node whose value leaves."""
        leaves: Any = next(reversed(self.graph.nodes)).args[0]
        node: fx.Node = leaves[port.index]
        return node

    @functools.cached_property
    def holds_inputs(self) -> frozenset[int]:
        """Identities of objects among the inputs that nodes refer to."""
        inputs = {id(value) for value in self.inputs.constants()}
        return frozenset(inputs & {id(v) for k, v in self.attributes.items() if k[0] == "_"})

    def has_same_guards(self, other: Trace) -> bool:
        """Whether two graphs hold in the same calls."""
        mine, others = [[(n.name, v) for n, v in t.guards] for t in (self, other)]
        held, held_there = [[(h.place, h.was) for h in t.held] for t in (self, other)]
        return mine == others and held == held_there

    def is_same_graph(self, other: Trace) -> bool:
        """Whether two graphs call the same functions and modules on the same values."""
        mine, others = [[n.target for n in t.graph.nodes] for t in (self, other)]
        return self.digest == other.digest and mine == others

    @property
    def digest(self) -> str:
        """Hash of nodes, operators and edges; equal for equal graphs in every process, and whatever
        the model keeps from a call before: that a constant is put in its place is left out.
        """
        text = "\n".join(
            f"{n.name} {n.op} {self._target_name(n)} {_signature(n.args)} {_signature(n.kwargs)}"
            + _regions(n)
            for n in self.graph.nodes
            if n.all_input_nodes or not isinstance(n.target, StoreAttribute | DropAttribute | Fill)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _target_name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            kind = type(self.attributes[str(node.target)])
            return f"{node.target}:{kind.__module__}.{kind.__qualname__}"
        if isinstance(node.target, str):
            return node.target
        name = getattr(node.target, "__name__", node.target)
        return f"{getattr(node.target, '__module__', '')}.{name}"


def _regions(node: fx.Node) -> str:
    """Regions that the model itself entered around a node."""
    modes = [key for key in ("no_grad", "grad") if node.meta.get(key)]
    regions = [*node.meta.get("autocast", ()), *modes]
    return f" in {regions}" if regions else ""


def _signature(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_signature(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Assembled):
        built = signature(value.structure)
        return f"{type(value).__name__}({','.join(map(_signature, value))}){built}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_signature(v) for v in value) + ")"
    return repr(value)
