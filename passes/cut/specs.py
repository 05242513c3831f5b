"""Facts about the values of a traced graph: names, shapes, and which way their features lie."""

from __future__ import annotations

import operator
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
_MOVES = ("permute", "transpose", "movedim", "swapaxes", "view", "reshape", "unflatten")
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
    """Shape, dtype, feature and batch dimension of every tensor, by node name."""
    specs = {}
    batch = _batch_size(trace)
    for node in trace.graph.nodes:
        if (rank := _rank(node)) >= 0:
            value, dim = node.meta["value"], _feature_dim(trace, node) if rank > 2 else -1
            shape = tuple(map(int, value.shape))
            second = _is_last_state(trace, node) or _is_batch_second(shape, dim, batch)
            specs[node.name] = TensorSpec(shape, value.dtype, dim, int(second))
    return specs


def _batch_size(trace: Trace) -> int | None:
    """What all inputs that are tensors agree on as their first size; None where they do not."""
    inputs = [n for n in trace.graph.nodes if n.op == "placeholder" and _rank(n) > 0]
    sizes = {int(n.meta["value"].shape[0]) for n in inputs}
    return sizes.pop() if len(sizes) == 1 else None


def _is_batch_second(shape: tuple[int, ...], feature_dim: int, batch: int | None) -> bool:
    """Whether sizes alone tell that a value is ``(something, batch, ..., features)``.

    A first size that is a multiple of the batch may be ``(batch * time, ...)``, and 1 be shared by
    all samples: they tell nothing.
    """
    if batch is None or len(shape) < 3 or feature_dim == 1:
        return False
    if shape[0] == 1 or shape[0] % batch == 0:
        return False
    return shape[1] == batch and batch not in shape[2:]


def _is_last_state(trace: Trace, node: fx.Node) -> bool:
    """Whether a value is the last state of a recurrent layer, ``(layers, batch, features)``, or
    made from one where it lies.
    """
    for _ in range(_LOOK_BACK):
        if _rank(node) != 3 or not (given := node.all_input_nodes):
            return False
        path: list[Any] = []
        source = node
        while source.op == "call_function" and source.target is operator.getitem:
            path.append(source.args[1])
            source = source.all_input_nodes[0]
        module = trace.attributes.get(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, nn.RNNBase):
            return path[-1:] == [1]
        name = getattr(node.target, "__name__", str(node.target))
        kept = [n for n in given if _rank(n) == 3 and _leads(n) == _leads(node)]
        if name in _MOVES or len(kept) != 1:
            return False
        node = kept[0]
    return False


def _leads(node: fx.Node) -> tuple[int, ...]:
    """The first two sizes."""
    return tuple(map(int, node.meta["value"].shape[:2]))


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
