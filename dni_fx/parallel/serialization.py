"""Letters as bytes: nested values with their tensors' shapes, strides and dtypes, in one buffer.

Strides travel with a tensor, since later sums run in the order of memory. Both ends are processes
of one training run: what is no tensor is pickled, as torch.distributed pickles objects.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from ..graphs.nested import flatten

ALIGNMENT = 64
_HEAD = 8  # bytes of the description's length


def pack(value: Any) -> Tensor:
    """A nested value as a ``uint8`` tensor ``(bytes,)`` on the CPU, with a copy of all tensors."""
    leaves, structure = flatten(value)
    pieces, described, position = [], [], 0
    for leaf in leaves:
        memory, strides = _memory(leaf.detach().resolve_conj().resolve_neg())
        described.append((leaf.dtype, tuple(leaf.shape), strides, position, leaf.device.type))
        pieces.append((position, memory))
        position = _aligned(position + memory.numel())
    description = pickle.dumps((structure, described), protocol=pickle.HIGHEST_PROTOCOL)
    start = _aligned(_HEAD + len(description))
    buffer = torch.empty(start + position, dtype=torch.uint8)
    head = len(description).to_bytes(_HEAD, "little") + description
    buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for place, memory in pieces:
        buffer[start + place : start + place + memory.numel()] = memory
    return buffer


def unpack(buffer: Tensor) -> Any:
    """The value that was packed, from a buffer that may be longer; its tensors on the CPU share the
    buffer's memory.
    """
    length = int.from_bytes(bytes(buffer[:_HEAD].numpy()), "little")
    structure, described = pickle.loads(bytes(buffer[_HEAD : _HEAD + length].numpy()))
    start = _aligned(_HEAD + length)
    leaves = []
    for dtype, shape, strides, position, device in described:
        count = _extent(shape, strides)
        memory = buffer[start + position : start + position + count * dtype.itemsize].view(dtype)
        leaves.append(memory.as_strided(shape, strides, memory.storage_offset()).to(device))
    return structure.build(iter(leaves))


def _memory(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The bytes that a tensor's elements lie in, and its strides there; a dense copy where most of
    them are others'.
    """
    extent = _extent(tuple(tensor.shape), tensor.stride())
    if tensor.layout != torch.strided or extent > 2 * tensor.numel() or tensor.device.type != "cpu":
        tensor = torch.empty_like(tensor, device="cpu", layout=torch.strided).copy_(tensor)
        extent = _extent(tuple(tensor.shape), tensor.stride())
    flat = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    return flat.view(torch.uint8), tensor.stride()


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements from the first to the last in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
