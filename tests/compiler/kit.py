"""What several tests of the compiler share."""

from __future__ import annotations

from torch import Tensor, nn


class DataDependent(nn.Module):
    """Reads a tensor's values at the top level, and no tracer can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.relu() if h.sum().item() > 0 else h.tanh())
