"""What is kept of a stage's forward while its gradients are under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.trace.settings import casts
from ..passes.trace.state import preserved_rng


@dataclass
class Tape:
    """One stage's forward on one batch, with its autograd graph."""

    outputs: dict[str, Any]
    leaves: dict[str, Any]
    entries: dict[str, Any]


class Rerun:
    """What a stage's forward needs to be run again: its inputs, and the state of everything that it
    depends on; made before the forward.
    """

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        self.module, self.values = module, values
        self._put_back_rng = preserved_rng()
        self._modes = [(m, m.training) for m in module.modules()]
        self._casts = [torch.autocast(*cast) for cast in casts()]

    @contextlib.contextmanager
    def as_then(self) -> Iterator[None]:
        """In the modes and casts of then, with its random numbers; generators and buffers stay as
        they are now.

        Buffers are exchanged, not written to: other graphs may hold them.
        """
        tables = [m._buffers for m in self.module.modules() if m._buffers]
        buffers = [dict(table) for table in tables]
        copies = {id(b): b.detach().clone() for b in self.module.buffers()}
        for table in tables:
            table.update({n: copies[id(b)] for n, b in table.items() if b is not None})
        put_back_rng, modes = preserved_rng(), [(m, m.training) for m, _ in self._modes]
        self._put_back_rng()
        for m, training in self._modes:
            m.training = training
        try:
            with contextlib.ExitStack() as stack:
                for cast in self._casts:
                    stack.enter_context(cast)
                yield
        finally:
            put_back_rng()
            for m, training in modes:
                m.training = training
            for table, content in zip(tables, buffers, strict=True):
                table.update(content)
