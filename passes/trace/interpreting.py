"""A recorded graph, or a part of it, run node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

Values = Mapping[fx.Node, Any]
Call = Callable[[fx.Node, Values], Any]  # runs one node on the values of those that it uses


def interpret(
    nodes: Iterable[fx.Node],
    attributes: Mapping[str, Any],
    given: Callable[[fx.Node], Any],
    call: Call | None = None,
    known: Mapping[fx.Node, Any] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Run nodes, each in the regions that it was recorded in, and give each with its value.

    What nothing needs any more is let go.

    Args:
        nodes: in program order, with all that they are computed from; the output is passed over.
        attributes: what ``call_module`` and ``get_attr`` targets stand for.
        given: the value of a placeholder.
        call: runs a node; by default it is called as recorded.
        known: nodes that need not be run, with their values; what these need may be missing.
    """
    known = known or {}
    values: dict[fx.Node, Any] = {}
    pending: dict[fx.Node, int] = {}
    for node in nodes:
        if node in known:
            value = known[node]
        elif node.op == "placeholder":
            value = given(node)
        elif node.op == "get_attr":
            value = attributes[str(node.target)]
        elif node.op != "output":
            with regions(node):
                value = call_node(attributes, node, values) if call is None else call(node, values)
        else:
            continue
        values[node], pending[node] = value, len(node.users)
        yield node, value
        del value
        for used in () if node in known else node.all_input_nodes:
            pending[used] -= 1
            if not pending[used]:
                del values[used]


def call_node(attributes: Mapping[str, Any], node: fx.Node, values: Values) -> Any:
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


@contextlib.contextmanager
def regions(node: fx.Node) -> Iterator[None]:
    """The regions without gradients, or under autocast, that the model itself entered around a
    node.
    """
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            stack.enter_context(region)
        if node.meta.get("no_grad"):
            stack.enter_context(torch.no_grad())
        yield
