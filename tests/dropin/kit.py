"""A chain of blocks as a drop-in module, trained by a loop as people write it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.sources import GradientSource, Prediction

from ..helpers.comparing import same_bits
from ..models import cases
from ..models.cases import Case


class Block(nn.Module):
    """A residual block with batch norm and dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = (
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


class Chain(nn.Sequential):
    """Three blocks and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3))


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 6, generator=generator, dtype=dtype)
    return x, torch.randint(3, (size,), generator=generator)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def decoupled_chain(
    gradients: Any = "linear", dropout: float = 0.0, **options: Any
) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    options = {
        "example_inputs": (batch(0)[0],),
        "context": dni_fx.one_hot(3),
        "check": False,
    } | options
    return dni_fx.decouple(
        options.pop("model", None) or Chain(dropout),
        ["0", "1", "2"],
        gradients=gradients,
        **options,
    )


def made(gradients: Any = "linear", dropout: float = 0.0, **options: Any) -> Any:
    return decoupled_chain(gradients, dropout).as_module(**options)


def loop(
    m: Any, steps: int, first: int = 0, optimizer: Any = None, size: int = 8
) -> torch.optim.Optimizer:
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
    """Of the model and its sources."""
    return {
        **{n: t.clone() for n, t in m.state_dict().items()},
        **{
            f"sources.{n}": t.clone()
            for n, t in sources(m).state_dict().items()
            if isinstance(t, Tensor)
        },
    }


def sources(m: Any) -> nn.ModuleDict:
    found: nn.ModuleDict = m._dni_fx.graphs.synthesizers
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


def gradients_of(m: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}


class Skips(nn.Module):
    """A value that two later stages use, and one weight in the first and the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        g = F.relu(self.b(F.relu(h)))
        k = F.relu(self.c(g + h))
        return F.linear(F.relu(self.out(torch.cat([k, g], 1))), self.a.weight)


class Encoder(nn.Module):
    """A transformer encoder with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        blocks = [
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for c in (3, 4, 4)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))


CASES = (
    Case(
        "convolutions",
        Convolutions,
        cases.rows(3, 6, 6),
        ("0", "1", "2"),
        cases.labels(6),
        F.cross_entropy,
    ),
    Case(
        "encoder",
        Encoder,
        cases.tokens(5, 11),
        ("layers.0", "layers.1"),
        cases.labels(6),
        F.cross_entropy,
    ),
    Case("skips", Skips, cases.rows(6), ("a", "b", "c"), cases.labels(6), F.cross_entropy),
)


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
