"""Small models for training: each has one input, three classes and more than two stages.

Most take six features, so that one batch (``tests/helpers/training.py``) serves them all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, labels, rows, tokens


class Block(nn.Module):
    """A residual block with batch norm and dropout: buffers and random numbers."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


class Chain(nn.Sequential):
    """Three blocks and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3))


class Skips(nn.Module):
    """Four stages; what the first sends is used in the second and in the last."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, width), nn.Tanh()), nn.Linear(width, width)
        self.c, self.d = nn.Linear(width, width), nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.c(self.b(h).relu())
        return self.d(torch.cat([k.relu(), h], 1))


class Towers(nn.Module):
    """Two towers and a head; the middle stage sends two values, one of them to both later
    stages.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(6, width)
        self.c, self.d = nn.Linear(2 * width, width), nn.Linear(3 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x).relu()
        joined = self.c(torch.cat([left, right], 1)).relu()
        return self.d(torch.cat([joined, left, right], 1))


class Crossing(nn.Module):
    """Two values cross each cut, and the last stage uses values of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a).tanh()
        c = self.c(a + b).relu()
        return self.head(a * c + b)


class Tied(nn.Module):
    """A value that two later stages use, and one weight in the first and the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        g = F.relu(self.b(F.relu(h)))
        k = F.relu(self.c(g + h))
        return F.linear(F.relu(self.out(torch.cat([k, g], 1))), self.a.weight[:3])


class SharedStatistics(Skips):
    """Two stages write to the same buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        k = self.norm(self.c(self.b(h).relu())).relu()
        return self.d(torch.cat([k, h], 1))


class Convolutions(nn.Sequential):
    """Three convolutions with batch norm, and a head."""

    def __init__(self) -> None:
        blocks = [
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for c in (3, 4, 4)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Encoder(nn.Module):
    """A transformer encoder."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


CHAIN = Case("chain", Chain, rows(6), ("0", "1", "2"), labels(3), F.cross_entropy)
SKIPS = replace(CHAIN, name="skips", make=Skips, cuts=("a", "b", "c"))
TOWERS = replace(SKIPS, name="towers", make=Towers)
CROSSING = replace(SKIPS, name="crossing", make=Crossing)
TIED = replace(SKIPS, name="tied", make=Tied)
SHARED_STATISTICS = replace(SKIPS, name="shared_statistics", make=SharedStatistics)
CONVOLUTIONS = replace(CHAIN, name="convolutions", make=Convolutions, inputs=rows(3, 6, 6))
ENCODER = replace(
    CHAIN,
    name="encoder",
    make=Encoder,
    inputs=tokens(5, 11),
    cuts=("layers.0", "layers.1", "layers.2"),
)
DROPOUT = replace(ENCODER, name="dropout", make=partial(Encoder, 0.1))
SMALL = (CHAIN, SKIPS, TOWERS, CROSSING, TIED, CONVOLUTIONS, ENCODER, DROPOUT)
