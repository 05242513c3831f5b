"""The part of a graph that depends on the values of inputs alone, and can be run before the rest.

A model may decide by the values of its inputs (``if mask.all()``): the graph then holds where the
same answer comes out, which a few nodes tell. What depends on parameters cannot be told without
running the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from .interpreting import interpret


def ancestors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they are computed from, in program order."""
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(node.all_input_nodes)
    return sorted(found)


def is_by_value(node: fx.Node) -> bool:
    """Whether a number depends on the values of tensors, and not only on their shapes."""
    return any(n.meta.get("by_value") for n in ancestors([node]))


def obstacle(node: fx.Node) -> fx.Node | None:
    """A node because of which the value cannot be told from the inputs alone."""
    for other in ancestors([node]):
        meta = other.meta
        if meta.get("parameters") or meta.get("random") or meta.get("mutates"):
            return other
        if other.op == "call_module":
            return other
    return None


def run_prefix(
    nodes: Iterable[fx.Node],
    attributes: Mapping[str, Any],
    inputs: Mapping[fx.Node, torch.Tensor],
) -> dict[fx.Node, Any]:
    """Compute some nodes, and what they need, from the model's inputs."""
    wanted = set(nodes)
    with torch.no_grad():
        found = interpret(ancestors(wanted), attributes, inputs.__getitem__)
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
