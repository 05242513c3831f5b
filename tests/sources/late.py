"""A chain with batch norm and dropout in double precision, trained by sources that wait."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.sources import GradientSource, Prediction

from ..helpers import training
from ..models.small import CHAIN, Chain

CUTS = list(CHAIN.cuts)
batch = partial(training.batch, dtype=torch.float64)


def chain(dropout: float = 0.0) -> Any:
    """Always with the same weights."""
    return replace(CHAIN, make=partial(Chain, dropout)).build(torch.float64)


def trainer_of(gradients: Any, model: nn.Module | None = None, **options: Any) -> dni_fx.Trainer:
    """A trainer of a chain."""
    return training.trainer_of(gradients, model=chain() if model is None else model, **options)


class Fixed(GradientSource):
    """Always the same prediction."""

    message = "none"

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        generator = torch.Generator().manual_seed(1)
        return Prediction(
            tuple(0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
        )
