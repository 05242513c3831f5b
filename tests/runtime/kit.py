"""A chain with batch norm and dropout, its batches, and trainers of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx

from ..helpers.comparing import state_of
from ..helpers.optimisers import adam
from ..models.feedforward import norm_dropout_chain

CUTS = ["3", "6"]


SOURCES = ("linear", "mlp", "stale", "zero", "exact")


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
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def decouple(
    gradients: Any = "linear",
    *,
    cuts: list[str] = CUTS,
    model: nn.Module | None = None,
    **options: Any,
) -> dni_fx.Decoupled:
    model = fresh() if model is None else model
    options.setdefault("example_inputs", (batches(1)[0][0].to(next(model.parameters()).dtype),))
    options.setdefault("context", dni_fx.one_hot(3))
    return dni_fx.decouple(model, cuts, gradients=gradients, **options)


def make_trainer(
    gradients: Any = "linear", optimizer: Any = adam, loss: Any = F.cross_entropy, **options: Any
) -> dni_fx.Trainer:
    names = ("accumulate", "clip_norm", "metrics_every", "synthesizer_optimizer")
    mine = {k: options.pop(k) for k in names if k in options}
    return dni_fx.Trainer(decouple(gradients, **options), loss, optimizer=optimizer, **mine)


def whole(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """All that the next step depends on, copied."""
    return {"state": copy.deepcopy(trainer.state_dict()), "buffers": state_of(trainer.decoupled)}
