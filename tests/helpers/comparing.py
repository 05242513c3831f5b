"""Nested structures of tensors, copied and compared bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..models.cases import named_leaves


def same_bits(a: Any, b: Any) -> bool:
    """Whether two leaves are equal: tensors in dtype, shape and every bit (nan equals itself, 0.0
    is not -0.0).
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes_of(a), _bytes_of(b))


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = torch.empty(
        tensor.numel(), dtype=tensor.dtype
    )  # in memory of its own, whatever the tensor's strides
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def describe(a: Any, b: Any) -> str:
    """How two leaves differ, in a line."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        difference = (a.detach().double() - b.detach().double()).abs().max().item()
        largest = b.detach().double().abs().max().item()
        return f"largest difference {difference:.3g}, largest value {largest:.3g}"
    return " against ".join(
        f"tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in (a, b)
    )


def assert_bits_equal(a: Any, b: Any, what: str) -> None:
    """Assert that two nested structures of tensors are equal bit for bit.

    Raises:
        AssertionError: naming ``what`` and every leaf that differs.
    """
    left, right = dict(named_leaves(a)), dict(named_leaves(b))
    extra, missing = (
        [path for path in left if path not in right],
        [path for path in right if path not in left],
    )
    if extra or missing:
        raise AssertionError(f"{what}: unexpected {extra[:12]}, missing {missing[:12]}")
    wrong = [f"{path or 'value'}: {describe(left[path], right[path])}" for path in left
             if not same_bits(left[path], right[path])]  # fmt: skip
    assert not wrong, f"{what}: {len(wrong)} of {len(left)} differ\n  " + "\n  ".join(wrong[:12])


def frozen(value: Any) -> Any:
    """A detached copy of nested tensors, in the same containers."""
    memo = {
        id(leaf): leaf.detach().clone()
        for _, leaf in named_leaves(value)
        if isinstance(leaf, Tensor)
    }
    return copy.deepcopy(value, memo)


def containers(value: Any) -> Any:
    """The types of nested containers, without their leaves."""
    if isinstance(value, dict):
        return type(value), {key: containers(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value), [containers(item) for item in value]
    return type(value)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers (also those that ``state_dict`` leaves out) by name, copied."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def graph_of(output: Tensor) -> str:
    """Names of all nodes that autograd would run."""
    nodes, names = [output.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(node.name())
            nodes += [following for following, _ in node.next_functions]
    return " ".join(names)
