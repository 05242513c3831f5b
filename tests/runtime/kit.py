"""A chain with batch norm and dropout, its batches, and trainers of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import dni_fx

from ..helpers.comparing import state_of
from ..helpers.optimisers import adam
from ..helpers.training import batch, decoupled_of, trainer_of
from ..models.feedforward import norm_dropout_chain
from ..models.small import CHAIN

NORMS = replace(CHAIN, name="norms", make=norm_dropout_chain, cuts=("3", "6"))
CUTS = list(NORMS.cuts)


SOURCES = [name for name in dni_fx.sources.SOURCES if name != "conv"]  # of a value without space


def fresh() -> nn.Module:
    """BatchNorm and dropout, the same bits each time; the global generator goes on from where it
    was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return norm_dropout_chain()


def batches(
    count: int, size: int = 4, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Those of the first steps."""
    return [batch(step, size, NORMS, dtype) for step in range(count)]


def decouple(
    gradients: Any = "linear", *, model: nn.Module | None = None, **options: Any
) -> dni_fx.Decoupled:
    """The chain, or another model of its kind, with a self-check."""
    model = fresh() if model is None else model
    return decoupled_of(gradients, NORMS, model=model, check=True, **options)


def make_trainer(
    gradients: Any = "linear",
    optimizer: Any = adam,
    *,
    model: nn.Module | None = None,
    **options: Any,
) -> dni_fx.Trainer:
    """A trainer of the chain, or of another model of its kind."""
    model = fresh() if model is None else model
    return trainer_of(gradients, NORMS, model=model, optimizer=optimizer, **options)


def whole(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """All that the next step depends on, copied."""
    return {"state": copy.deepcopy(trainer.state_dict()), "buffers": state_of(trainer.decoupled)}
