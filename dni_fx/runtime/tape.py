"""What is kept of a stage's forward while its gradients are under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.trace.state import preserved_rng


@dataclass
class Tape:
    """One stage's forward on one batch, with its autograd graph."""

    outputs: dict[str, Any]
    leaves: dict[str, Any]
    entries: dict[str, Any]


@dataclass
class Rerun:
    """What a stage's forward needs to be run again: its inputs, and the state of everything that it
    depends on.
    """

    values: dict[str, Any]
    rng: Callable[[], None]
    modes: list[tuple[nn.Module, bool]]
    casts: list[torch.autocast]

    @classmethod
    def of(cls, module: nn.Module, values: dict[str, Any]) -> Rerun:
        """Before the forward."""
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        casts = [
            torch.autocast(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d))
            for d in devices
        ]
        return cls(values, preserved_rng(), [(m, m.training) for m in module.modules()], casts)

    @contextlib.contextmanager
    def as_then(self, module: nn.Module) -> Iterator[None]:
        """In the modes and casts of then, with its random numbers; generators and buffers stay as
        they are now.

        Buffers are exchanged, not written to: other graphs may hold them.
        """
        tables = [m._buffers for m in module.modules() if m._buffers]
        buffers = [dict(table) for table in tables]
        copies = {
            id(b): b.detach().clone() for table in tables for b in table.values() if b is not None
        }
        for table in tables:
            table.update({n: copies[id(b)] for n, b in table.items() if b is not None})
        now, modes = preserved_rng(), [(m, m.training) for m, _ in self.modes]
        self.rng()
        for m, training in self.modes:
            m.training = training
        try:
            with contextlib.ExitStack() as stack:
                for cast in self.casts:
                    stack.enter_context(cast)
                yield
        finally:
            now()
            for m, training in modes:
                m.training = training
            for table, content in zip(tables, buffers, strict=True):
                table.update(content)
