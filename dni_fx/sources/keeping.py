"""Weights of then, for a backward that comes after they have been updated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def kept_weights(module: nn.Module) -> Iterator[None]:
    """Graphs made inside keep copies of the module's weights and buffers: their updates would spoil
    a late backward.
    """
    owned = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    copies: dict[Any, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in owned:
            # An output itself would hold its own node, for ever where the graph is retained.
            return tensor.detach()
        key = (place, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().clone()
        return copies[key]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
