"""Looking into the arguments of recorded calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...graphs.nested import flatten
from ...graphs.pictures import items_of
from .containers import Copy
from .symbols import TracedInt, plain

SPARSE = {
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
}  # fmt: skip


def storage_key(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (
        NotImplementedError,
        RuntimeError,
    ):  # sparse and other tensors without memory of their own
        return -id(tensor)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of its own, laid out in memory as the tensor is, for code that looks at strides."""
    copy = tensor.detach().clone()
    if tensor.layout is torch.strided and tensor.numel():
        start, strides = tensor.storage_offset(), tensor.stride()
        if start or copy.stride() != strides:
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
            memory = tensor.detach().new_empty(start + span)
            memory[start:] = tensor.detach().as_strided((span,), (1,))
            copy = memory.as_strided(tensor.shape, strides, start).detach()
    return copy.requires_grad_(tensor.requires_grad)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that can be compared: sparse ones have no elements in place."""
    return tensor.to_dense() if tensor.layout in SPARSE else tensor


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in plain containers and in whatever else can be opened."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in items_of(value):
            yield from tensors_in(item)
    else:
        yield from flatten(value)[0]


def plain_tree(value: Any, copies: list[Copy] | None = None) -> Any:
    """Replace traced integers by their values, containers included.

    Args:
        value: anything.
        copies: takes the lists and dicts that are copied.
    """
    if isinstance(value, TracedInt):
        return value.value
    if isinstance(value, torch.Size):
        return torch.Size([plain(v) for v in value])
    if isinstance(value, tuple):
        items = [plain_tree(v, copies) for v in items_of(value)]
        if type(value) is not tuple and all(map(operator.is_, items, items_of(value))):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    given: Any = None
    if type(value) is list:
        given = [plain_tree(v, copies) for v in value]
    elif type(value) is dict:
        given = {k: plain_tree(v, copies) for k, v in value.items()}
    if given is not None:
        if copies is not None:
            copies.append(Copy.of(value, given))
        return given
    if isinstance(value, slice):
        return slice(plain_tree(value.start), plain_tree(value.stop), plain_tree(value.step))
    return value


class OperatorMode(TorchDispatchMode):
    """Sees the operators below a model's code, and stays out of what the model compiles."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and the wrapper that this avoids imports all of torch._dynamo
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # else what the model compiles inside is refused, and from then on outside, too
        return True
