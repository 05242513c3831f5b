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
from torch.fx.immutable_collections import immutable_dict, immutable_list


def call_node(attributes: Mapping[str, Any], node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Call what a recorded node calls, on the values of the nodes that it uses."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, dict(node.kwargs)), lambda a: values[a] if isinstance(a, fx.Node) else a
    )
    args, kwargs = _own(args), _own(kwargs)
    if node.op == "call_module":
        return attributes[str(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _own(value: Any) -> Any:
    """A container that a callee may change, in place of one that fx has frozen."""
    if isinstance(value, immutable_list):
        return [_own(v) for v in value]
    if isinstance(value, immutable_dict):
        return {k: _own(v) for k, v in value.items()}
    return tuple(map(_own, value)) if type(value) is tuple else value


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
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in ancestors(nodes):
            if node.op == "placeholder":
                values[node] = inputs[node]
            elif node.op == "get_attr":
                values[node] = attributes[str(node.target)]
            else:
                values[node] = call_node(attributes, node, values)
    return values


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
