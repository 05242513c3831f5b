"""A function of tensors as a graph of plain operators, below autograd: what ran, written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_FRESH = ("lift_fresh", "lift_fresh_copy")  # of a tensor that was made within the function


def record_operators(
    function: Callable[..., Any], tensors: Sequence[Tensor], fake: bool = False
) -> fx.GraphModule:
    """Run a function once and write down its operators, those of its backward passes too.

    Args:
        function: of the tensors, each an argument; returns a list of tensors.
        tensors: what it is run on; parameters among them are inputs of the graph wherever the
            function takes them from.
        fake: run it on stand-ins, which nothing is computed of.

    Returns:
        A graph of as many inputs.

    Raises:
        RuntimeError: the function reads a number back from a tensor, or does something else that
            no graph of plain operators can hold.
    """
    mode: Literal["fake", "real"] = "fake" if fake else "real"
    return make_fx(function, tracing_mode=mode, decomposition_table=_DECLARED)(*tensors)


def named_inputs(graph: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The same graph, its inputs called by these names."""
    made = fx.GraphModule(graph, fx.Graph())
    copied: dict[fx.Node, fx.Node] = {}
    waiting = list(names)
    for node in graph.graph.nodes:
        copied[node] = made.graph.node_copy(node, copied.__getitem__)
        if node.op == "placeholder":
            word = "".join(c if c.isalnum() else "_" for c in waiting.pop(0))
            copied[node]._rename(word)
            copied[node].target = copied[node].name
    made.recompile()
    return made


def count_constants(graph: fx.GraphModule) -> int:
    """How many tensors a graph holds fast that were there before it."""
    held = [node for node in graph.graph.nodes if node.op == "get_attr"]
    return sum(any(u.name.rstrip("_0123456789") not in _FRESH for u in n.users) for n in held)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *how: Any,
) -> Any:
    """The same kernel, by the operator that declares that it writes its running statistics."""
    if mean is None or var is None:
        return _aten._native_batch_norm_legit.no_stats(x, weight, bias, *how)
    return _aten._native_batch_norm_legit.default(x, weight, bias, mean, var, *how)


_DECLARED = {_aten.native_batch_norm.default: _batch_norm}
