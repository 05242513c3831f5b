"""A chain of blocks as a drop-in module, trained by a loop as people write it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.sources import GradientSource, Prediction

from ..helpers.comparing import same_bits
from ..helpers.optimisers import sgd
from ..helpers.training import batch, decoupled_of
from ..models.small import CHAIN, Chain


def decoupled_chain(
    gradients: Any = "linear",
    dropout: float = 0.0,
    model: nn.Module | None = None,
    **options: Any,
) -> dni_fx.Decoupled:
    """A chain, always with the same weights, or a given model of its kind."""
    chain = replace(CHAIN, make=partial(Chain, dropout))
    return decoupled_of(gradients, chain, model=model, **options)


def made(gradients: Any = "linear", dropout: float = 0.0, **options: Any) -> Any:
    """The drop-in of a chain."""
    return decoupled_chain(gradients, dropout).as_module(**options)


def loop(
    m: Any, steps: int, first: int = 0, optimizer: Any = None, size: int = 8
) -> torch.optim.Optimizer:
    """Train as people do; the optimiser."""
    optimizer = optimizer or sgd(m.parameters())
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(step, size)
        with m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def state(m: Any) -> dict[str, Tensor]:
    """Of the model and its sources, copied."""
    tensors = {**m.state_dict()}
    for name, value in m.synthesizer_state_dict()["synthesizers"].items():
        if isinstance(value, Tensor):
            tensors[f"sources.{name}"] = value
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


def gradients_of(m: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}


class Mean(GradientSource):
    """A source of the user's own."""

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.mean = nn.Parameter(torch.zeros(self.specs[0].shape[1:]))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        guess = torch.zeros_like(values[0]) + self.mean
        return Prediction((guess.detach(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(prediction.state, message[0])
