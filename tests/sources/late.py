"""A chain with batch norm and dropout in double precision, trained by sources that wait."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.sources import GradientSource, Prediction

CUTS = ["0", "1", "2"]


class Block(nn.Module):
    """A residual block with batch norm and dropout: buffers and random numbers, used once a
    batch.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = (
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


def chain(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3)).double()


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trainer_of(gradients: Any, model: nn.Module | None = None, **options: Any) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        chain() if model is None else model,
        CUTS,
        example_inputs=(batch(0)[0],),
        gradients=gradients,
        context=options.pop("context", dni_fx.one_hot(3)),
        check=False,
    )
    return dni_fx.Trainer(decoupled, options.pop("loss", F.cross_entropy), optimizer=sgd, **options)


def train(trainer: dni_fx.Trainer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(step)
        trainer.step(x, target=y)


def state(trainer: dni_fx.Trainer) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in trainer.decoupled.model.state_dict().items()}


class Fixed(GradientSource):
    """Always the same prediction."""

    message = "none"

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        generator = torch.Generator().manual_seed(1)
        return Prediction(
            tuple(0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
        )
