"""What several tests of the compiler share."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn


def notes() -> ContextVar[list[Any]]:
    """A list for what a model's code sees while it is traced: no walk from the model finds it, and
    so nothing puts it back.
    """
    kept: ContextVar[list[Any]] = ContextVar("notes")
    kept.set([])
    return kept


class DataDependent(nn.Module):
    """Reads a tensor's values at the top level, and no tracer can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.relu() if h.sum().item() > 0 else h.tanh())
