"""The optimisers of all tests."""

from __future__ import annotations

from typing import Any

import torch


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(params, lr=0.01)
