"""Facts about the values of a traced graph: names, shapes, and which way their features lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ...plan import TensorSpec
from ..trace.traces import Trace

_MAPS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d,
)  # fmt: skip
_TOKENS = (
    nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer, nn.RNNBase,
)  # fmt: skip
_LOOK_BACK = 40


def name_values(trace: Trace) -> dict[fx.Node, tuple[str, ...]]:
    """Names of every value, the preferred one first: the paths of the modules whose output it is,
    outermost first (``path@1`` for a module's second call), then the node's own name where no
    module has it.
    """
    names: dict[fx.Node, list[str]] = {}
    for path, count, node, _ in numbered_calls(trace):
        if node is not None:
            names.setdefault(node, []).insert(0, f"{path}@{count}" if count else path)
    taken = {n for group in names.values() for n in group}
    for node in trace.graph.nodes:
        if node.name not in taken:
            names.setdefault(node, []).append(node.name)
        elif node not in names:  # ``F.relu`` in a model that also has a module ``relu``
            names[node] = [f"{node.name}_function"]
    return {node: tuple(group) for node, group in names.items()}


def numbered_calls(trace: Trace) -> Iterator[tuple[str, int, fx.Node | None, fx.Node]]:
    """Every call of a submodule: its path, how often it was called before, its output node and the
    last node made in it.
    """
    seen: Counter[str] = Counter()
    for path, node, last in trace.calls:
        if path:
            yield path, seen[path], node, last
            seen[path] += 1


def modules_of(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that a node lies in or calls, outermost first."""
    called = (str(node.target),) if node.op == "call_module" else ()
    return tuple(p for p in dict.fromkeys((*node.meta.get("modules", ()), *called)) if p)


def parameters_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the parameters that a node uses."""
    fetched = [i.meta["parameters"] for i in node.all_input_nodes if i.op == "get_attr"]
    direct = sorted({name for names in fetched for name in names})
    return tuple(dict.fromkeys((*node.meta.get("parameters", ()), *direct)))


def infer_specs(trace: Trace) -> dict[str, TensorSpec]:
    """Shape, dtype and feature dimension of every tensor, by node name."""
    specs = {}
    for node in trace.graph.nodes:
        if (rank := _rank(node)) >= 0:
            value, dim = node.meta["value"], _feature_dim(trace, node) if rank > 2 else -1
            specs[node.name] = TensorSpec(tuple(map(int, value.shape)), value.dtype, dim)
    return specs


def _feature_dim(trace: Trace, node: fx.Node) -> int:
    """1 or -1, told by the nearest layer before the value; maps by default for four and more
    dimensions.
    """
    seen = {node: None}
    for current in (queue := [node]):
        module = trace.attributes.get(str(current.target)) if current.op == "call_module" else None
        name = getattr(current.target, "__name__", str(current.target))
        if isinstance(module, _MAPS) or any(
            word in name for word in ("conv", "batch_norm", "pool")
        ):
            return 1
        if isinstance(module, _TOKENS) or name in ("linear", "layer_norm", "embedding", "matmul"):
            return -1
        if name == "permute":
            order: list[Any] = []
            fx.node.map_aggregate(current.args[1:], order.append)
            if order[-1:] == [1]:
                return -1
            if len(order) > 1 and order[1] in (len(order) - 1, -1):
                return 1
        if name not in ("permute", "transpose", "movedim", "swapaxes") and len(queue) < _LOOK_BACK:
            for value in current.all_input_nodes:
                if value not in seen and _rank(value) == _rank(node):
                    seen[value] = None
                    queue.append(value)
    return 1 if _rank(node) >= 4 else -1


def _rank(node: fx.Node) -> int:
    value = node.meta.get("value")
    return value.dim() if isinstance(value, torch.Tensor) else -1
