"""Shared parameters, views and mutation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feedforward import ResidualBlock


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(6, 8) * 0.1)
        self.block1 = ResidualBlock(8)
        self.block2 = ResidualBlock(8)
        self.decoder = nn.Linear(8, 11, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        return self.decoder(self.block2(self.block1(x)))


class ReusedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.shared(self.inp(x))))
        return self.head(torch.relu(self.shared(x)))


class ReusedThrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.norm1 = nn.LayerNorm(8)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.shared(self.shared(x)))
        x = self.norm2(self.shared(x) + x)
        return self.head(self.shared(x))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.tower(a), self.tower(b)) * 2 - 1


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.code = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.encoder(x))
        return F.linear(code, self.encoder.weight.t(), self.bias)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.mid = nn.Linear(4, 4)
        self.late = nn.Linear(4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        first, second = h.chunk(2, dim=1)
        grid = h.view(x.shape[0], 2, 4)
        column = grid.transpose(1, 2)[:, 1:3]
        y = self.mid(first)
        left, right = second.split([1, 3], dim=-1)
        y = torch.relu(y) * torch.cat((right, left), -1) + column.reshape(-1, 4)
        y = self.late(y) + grid[:, 0]
        return self.head(torch.cat([y, first + second], 1))


class InplaceAfterCut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.b(x)
        h.add_(k)
        h += 1
        return self.c(h)


class SetitemAfterCut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.b(x)
        h[:, :2] = k[:, 2:4]
        h[k > 1] = 0.5
        return self.c(h)


class ReadAfterMutation(nn.Module):
    """``v`` changes in the second stage; the third reads ``v`` and the mutation's result, the same
    memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x)
        k = self.b(x)
        y = v.add_(1)
        k = self.c(k)
        return self.head(v * k + y)


class MutateThroughView(nn.Module):
    """After ``b``, two names of memory written to later would cross, which is refused; after ``c``
    it is fine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x)
        left = v[:, :4]
        k = self.b(x)
        left.mul_(2)
        k.narrow(1, 0, 2).zero_()
        y = self.c(v + k)
        return self.head(y + v) * left[:, :3]


class SqueezeEinsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 8)
        self.key = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(8, 8, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unsqueeze(1)
        k = self.key(x).unsqueeze(-1)
        scores = (q @ k).squeeze(-1)
        out = torch.einsum("bi,bj,ijk->bk", q.squeeze(1), k.squeeze(2), self.weight)
        return out * torch.sigmoid(scores)
