"""Sources that are written as they should be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.plan import TensorSpec
from dni_fx.sources import GradientSource, Prediction

SPEC, LABELS = TensorSpec((4, 6), torch.float32), TensorSpec((4, 3), torch.float32)


X, Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])


def decoupled_with(gradients: Any, **options: Any) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return dni_fx.decouple(
        model, ["1", "3"], example_inputs=(X,), gradients=gradients, check=False, **options
    )


def trained(gradients: Any, steps: int = 5) -> dict[str, Tensor]:
    decoupled = decoupled_with(gradients, context=dni_fx.one_hot(3))
    trainer = dni_fx.Trainer(
        decoupled,
        F.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        synthesizer_optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    for _ in range(steps):
        trainer.step(X, target=Y)
    trainer.drain()
    return decoupled.model.state_dict()


class Good(GradientSource):
    """A source as it should be written; the mistakes below are this one with one thing wrong."""

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.weight = nn.Parameter(torch.zeros(self.specs[0].shape[1:]))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        guess = torch.zeros_like(values[0]) + self.weight
        return Prediction((guess.detach(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        return F.mse_loss(prediction.state, message[0])


class Nothing(GradientSource):
    """Says zero, and has nothing to learn."""

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        return Prediction(tuple(torch.zeros_like(value) for value in values))
