"""The part of a graph that depends on the values of inputs alone, and can be run before the rest.

A model may decide by the values of its inputs (``if mask.all()``): the graph then holds where the
same answer comes out, which a few nodes tell. What depends on parameters cannot be told without
running the model, but for sizes, which follow from the shapes of the inputs
(``torch.arange(h.shape[1])``).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from .interpreting import interpret

_SIZES = {"size", "numel"}


def ancestors(nodes: Iterable[fx.Node], until: Container[fx.Node] = ()) -> list[fx.Node]:
    """The nodes and all that they are computed from, in program order.

    Args:
        nodes: where to begin.
        until: nodes behind which not to go.
    """
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            if node not in until:
                pending.extend(node.all_input_nodes)
    return sorted(found)


def is_by_value(node: fx.Node) -> bool:
    """Whether a number depends on the values of tensors, and not only on their shapes."""
    return any(n.meta.get("by_value") for n in ancestors([node]))


def obstacle(node: fx.Node) -> fx.Node | None:
    """A node because of which the value cannot be told from the inputs alone."""
    found = ancestors([node], until=_sizes([node]))
    return next((other for other in found if _is_obstacle(other)), None)


def sizes_behind(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Sizes that some nodes are computed from, and that nothing but shapes can tell."""
    nodes = list(nodes)
    sizes = _sizes(nodes)
    reached = [n for n in ancestors(nodes, until=sizes) if n in sizes]
    return tuple(n for n in reached if any(map(_is_obstacle, ancestors([n]))))


def example_sizes(sizes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Those of the call that is recorded."""
    found = {}
    for node in sizes:
        value: Any = node.all_input_nodes[0].meta["value"]
        found[node] = value.numel() if node.target == "numel" else value.shape[node.args[1]]
    return found


def _sizes(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    every = ancestors(nodes)
    asked = [n for n in every if n.op == "call_method" and n.target in _SIZES]
    return {n for n in asked if not is_by_value(n)}


def _is_obstacle(node: fx.Node) -> bool:
    own = any(node.meta.get(key) for key in ("parameters", "random", "mutates"))
    return own or node.op == "call_module"


def run_prefix(
    nodes: Iterable[fx.Node],
    attributes: Mapping[str, Any],
    inputs: Mapping[fx.Node, torch.Tensor],
    sizes: Mapping[fx.Node, int],
) -> dict[fx.Node, Any]:
    """Compute some nodes, and what they need, from the model's inputs.

    Args:
        nodes: which ones.
        attributes: what targets stand for.
        inputs: of the call, by placeholder.
        sizes: those of :func:`sizes_behind`.
    """
    wanted = set(nodes)
    needed = ancestors(wanted, until=sizes)
    with torch.no_grad():
        found = interpret(needed, attributes, inputs.__getitem__, known=sizes)
        return {node: value for node, value in found if node in wanted}


def mark_differentiated(call: fx.Node) -> None:
    """What ``torch.autograd.grad`` differentiates inside a model must stay in one stage: no
    history reaches across a cut.

    Args:
        call: the node of the call, whose first two arguments are what is differentiated, and by
            what.
    """
    named = {**dict(zip(("outputs", "inputs"), call.args, strict=False)), **call.kwargs}
    above = set(ancestors(_nodes_in(named["outputs"])))
    sources = _nodes_in(named["inputs"])
    below: set[fx.Node] = set()
    pending = list(sources)
    while pending:
        node = pending.pop()
        if node not in below and node in above:
            below.add(node)
            pending.extend(node.users)
    mark = (call.name, "torch.autograd.grad inside the model differentiates across it")
    for node in (*sorted(below), call):
        node.meta["together"] = (*node.meta.get("together", ()), mark)


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, lambda n: found.append(n))
    return found
