"""Optimisers as users hand them over: a function that makes one from named parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError

NamedParameters = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def made_optimizer(optimizer: Any, name: str) -> torch.optim.Optimizer:
    """What a user's function made, if it can step once a batch.

    Args:
        optimizer: what the function returned.
        name: the argument that the function was passed as, for the error.

    Raises:
        DecouplingError: it is no optimiser, or one that evaluates the loss several times a step.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DecouplingError(
            f"{name}= must return a torch.optim.Optimizer, but returned {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DecouplingError(
            f"{name}= returned LBFGS, which evaluates the loss several times a step; use another "
            "one"
        )
    return optimizer
