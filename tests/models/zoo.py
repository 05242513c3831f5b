"""The zoo: small models, written as users write them, that nobody prepared for a graph transform.

Each ``Case`` holds one model, its inputs and the cuts to try. Inputs and parameters are drawn from
the global generator, so that whoever seeds it decides on them. The oracles (``tests/helpers/oracles.py``)
do the checking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Inputs = Callable[[int, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
Loss = Callable[[Any, Any], Tensor]


def named_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested containers (dicts, sequences, named tuples, dataclasses) with their
    paths, in order.
    """
    if isinstance(value, dict):
        for key in value:
            yield from named_leaves(value[key], f"{prefix}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from named_leaves(item, f"{prefix}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from named_leaves(getattr(value, field.name), f"{prefix}.{field.name}")
    else:
        yield prefix, value


def squares(output: Any, target: Any = None) -> Tensor:
    """The default loss: a weighted mean of squares over all float outputs. Each has its own weight
    and offset.
    """
    floats = [
        leaf
        for _, leaf in named_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    terms = [
        (tensor - 0.1 * rank).square().mean() * (1 + rank) for rank, tensor in enumerate(floats)
    ]
    return torch.stack(terms).sum()


def classify(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the last dimension, for any leading ones."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def seed_generator(seed: int) -> None:
    """Seed the CPU's generator alone: ``torch.manual_seed`` also takes a stack trace for CUDA,
    which costs more.
    """
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    ``inputs(batch, dtype)`` gives positional and keyword arguments, ``target(batch, dtype)`` the
    target, if any.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    cuts: tuple[str, ...]
    target: Callable[[int, torch.dtype], Any] | None = None
    loss: Loss = squares
    notes: str = ""

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model in train mode; the same bits for the same seed."""
        seed_generator(seed)
        return self.make().to(dtype)


def rows(*shape: int) -> Inputs:
    """One float input of shape (batch, *shape)."""
    return lambda batch, dtype: ((torch.randn(batch, *shape, dtype=dtype),), {})


def tokens(length: int, vocabulary: int) -> Inputs:
    """One integer input of shape (batch, length)."""
    return lambda batch, dtype: ((torch.randint(0, vocabulary, (batch, length)),), {})


def labels(classes: int, *shape: int) -> Callable[[int, torch.dtype], Tensor]:
    """Integer targets of shape (batch, *shape)."""
    return lambda batch, dtype: torch.randint(0, classes, (batch, *shape))


# Chains
# ---------------------------------------------------------------------------------------------------------------


def mlp_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def norm_dropout_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


def inplace_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 3),
    )


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.fc(torch.flatten(self.pool(x), 1))


# Skips
# ----------------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.fc2(F.relu(self.fc1(x))))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(ResidualBlock(8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out += identity
        return out


class PreActivationNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = PreActivation(4)
        self.layer2 = PreActivation(4)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        x = self.relu(self.bn(x))
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4 * (i + 1), 4) for i in range(4))
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(torch.relu(layer(torch.cat(features, dim=1))))
        return self.head(torch.cat(features, 1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(2, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up2 = nn.Conv2d(12, 4, 3, padding=1)
        self.up1 = nn.Conv2d(8, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.grow = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = F.relu(self.down1(x))
        skip2 = F.relu(self.down2(self.pool(skip1)))
        x = F.relu(self.middle(self.pool(skip2)))
        x = F.relu(self.up2(torch.cat([self.grow(x), skip2], 1)))
        return self.up1(torch.cat([self.grow(x), skip1], 1))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head = nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(a), self.right(b)], dim=-1).sigmoid())


class FanOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        y = self.a(h) * h
        y = self.b(torch.relu(y)) + h
        y = self.c(torch.relu(y)) * h
        return self.d(torch.relu(y)) - h


class Inception(nn.Module):
    """An auxiliary head in training only, so that the two modes give different graphs and different
    outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.branch1 = nn.Conv2d(4, 2, 1)
        self.branch3 = nn.Sequential(
            nn.Conv2d(4, 3, 1), nn.ReLU(True), nn.Conv2d(3, 3, 3, padding=1)
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 3, 1))
        self.aux = nn.Linear(8, 3)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x), inplace=True)
        x = torch.cat([self.branch1(x), self.branch3(x), self.branch_pool(x)], 1)
        result = {}
        if self.training:
            result["aux"] = self.aux(x.mean((2, 3)))
        x = F.relu(self.last(F.relu(x)))
        result["out"] = self.fc(self.dropout(x.mean((-1, -2))))
        return result


# Shared parameters
# ----------------------------------------------------------------------------------------------------


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


# Views and mutation
# ---------------------------------------------------------------------------------------------------


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


# Sequences
# ------------------------------------------------------------------------------------------------------------


class LSTMModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        out, (h, c) = self.lstm(self.embed(ids))
        last = c[-1].unsqueeze(1).expand(-1, ids.size(1), -1)
        return self.head(torch.cat([self.norm(out), last + h[0].unsqueeze(1)], dim=-1))


class GRUModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6)
        self.gru = nn.GRU(6, 4, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(torch.tanh(self.inp(x)).transpose(0, 1))
        return self.head(y.transpose(0, 1)[:, -1])


class TransformerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.1, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(c, dim=2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(~mask[:t, :t], float("-inf"))
        y = self.dropout(F.softmax(att, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(8)
        self.attn = CausalAttention(8, 2)
        self.ln2 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.wpe = nn.Embedding(8, 8)
        self.blocks = nn.ModuleList(GPTBlock() for _ in range(3))
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        mask = torch.tril(torch.ones(t, t, dtype=torch.bool, device=ids.device))
        pos = torch.arange(0, t, dtype=torch.long, device=ids.device)
        x = self.wte(ids) + self.wpe(pos)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.ln(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class RotaryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=False)
        self.k = nn.Linear(8, 8, bias=False)
        self.v = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        return x + y.transpose(1, 2).flatten(2)


class RotaryModel(nn.Module):
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.register_buffer(
            "inv_freq", 1.0 / (100.0 ** (torch.arange(0, 4, 2).float() / 4)), persistent=False
        )
        self.layers = nn.ModuleList(RotaryAttention() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            freqs = torch.outer(
                torch.arange(x.size(1), device=x.device).to(self.inv_freq), self.inv_freq
            )
            angles = torch.cat((freqs, freqs), dim=-1)
            cos, sin = angles.cos(), angles.sin()
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.head(h)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 8)
        self.memory = nn.Linear(4, 8)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        query, memory = self.inp(x), self.memory(memory)
        y, weights = self.attn(query, memory, memory, need_weights=True)
        return self.head(self.norm(query + y)), weights


class TimeLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class UnbindLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.step = nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = torch.zeros_like(x[:, 0])
        outputs = []
        for step in x.unbind(1):
            state = torch.tanh(self.step(torch.cat([step, state], -1)))
            outputs.append(state)
        return self.head(torch.stack(outputs, dim=1))


# Autograd and global state
# --------------------------------------------------------------------------------------------


class CheckpointedBlock(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def checkpointed_chain(use_reentrant: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 8),
        CheckpointedBlock(use_reentrant),
        CheckpointedBlock(use_reentrant),
        nn.Linear(8, 3),
    )


class Binarise(torch.autograd.Function):
    """Straight-through sign: the backward is not the derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.width).to(grad.dtype), None


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.25


class BinaryNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = Binarise.apply(self.fc1(x), 1.0)
        x = torch.relu(self.fc2(x))
        return self.fc3(ScaleGradient.apply(x))


class NoGradTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.teacher = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.student(x)
        with torch.no_grad():
            goal = torch.tanh(self.teacher(x))
            scale = h.abs().mean() + 1
        return self.head(h / scale), F.mse_loss(h, goal)


class DetachedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.probe = nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc1(x))
        y = torch.relu(self.fc2(h))
        return self.head(y), self.probe(h.detach()) * y.detach().mean()


class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(h)
        h = self.norm(h + y.to(h.dtype))
        return self.head(h)


# Structures
# -----------------------------------------------------------------------------------------------------------


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.mid = nn.Linear(8, 8)
        self.boxes = nn.Linear(8, 4)
        self.scores = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.relu(self.trunk(x))
        y = torch.relu(self.mid(h))
        return {
            "boxes": self.boxes(y),
            "scores": [self.scores(y), self.scores(h)],
            "size": x.shape[1],
            "extra": None,
        }


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    count: int = 0


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Answer:
        h = torch.tanh(self.fc1(x))
        return Answer(logits=self.fc3(torch.tanh(self.fc2(h))), hidden=h)


class Moments(NamedTuple):
    mean: Tensor
    log_var: Tensor
    sample: Tensor


class NamedTupleOutput(nn.Module):
    """A variational encoder: random numbers in the middle stage."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.mean = nn.Linear(8, 3)
        self.log_var = nn.Linear(8, 3)
        self.decoder = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Moments:
        h = torch.relu(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return Moments(mean, log_var, self.decoder(z))


class NestedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(6, 8)
        self.kind = nn.Embedding(5, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Any], *, weights: Tensor) -> Tensor:
        pixels, kinds = batch["image"]["pixels"], batch["kinds"]
        h = torch.relu(self.image(pixels) + self.kind(kinds[0]))
        return self.head(torch.relu(self.mix(h) + self.kind(kinds[1]))) * weights


def nested_input(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = [torch.randint(0, 5, (batch,)), torch.randint(0, 5, (batch,))]
    nested = {
        "image": {"pixels": torch.randn(batch, 6, dtype=dtype), "id": "photo"},
        "kinds": kinds,
    }
    return (nested,), {"weights": torch.rand(batch, 1, dtype=dtype)}


class OptionalArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        h = torch.relu(self.fc1(x))
        if mask is not None:
            h = h * mask
        h = torch.relu(self.fc2(h))
        if bias is not None:
            h = h + bias
        return self.fc3(h) * scale


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(5, 8)
        self.c = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = torch.where(gate.unsqueeze(1), h, self.b(y))
        h = torch.tanh(self.c(h)) * gate.to(h.dtype)[:, None]
        return self.head(h) + x[:, :2]


class EarlyOutputs(nn.Module):
    """Deep supervision: an output of every stage, one of them fed on, one the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.exit1 = nn.Linear(8, 3)
        self.fc2 = nn.Linear(8, 8)
        self.exit2 = nn.Linear(8, 3)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h1 = torch.relu(self.fc1(x))
        e1 = self.exit1(h1)
        h2 = torch.relu(self.fc2(h1))
        e2 = self.exit2(h2)
        return e1, e2, self.fc3(h2) + e1, h1, x


class OpenArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor, *extra: Tensor, **options: Any) -> Tensor:
        h = torch.relu(self.fc1(x))
        for tensor in extra:
            h = h * tensor
        h = torch.relu(self.fc2(h))
        if options.get("shift") is not None:
            h = h + options["shift"]
        return -self.fc3(h) if options.get("negate", False) else self.fc3(h)


# Frozen parts
# ---------------------------------------------------------------------------------------------------------


def frozen_chain(*frozen: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(5))
        )
        for index in frozen:
            model[index].requires_grad_(False)
        return model

    return make


def frozen_norm_chain() -> nn.Module:
    model = norm_dropout_chain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval().requires_grad_(False)
    return model


# Randomness and state
# -------------------------------------------------------------------------------------------------


class RandomDepthBlock(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.drop:
            return x
        return x + self.body(x)


def stochastic_depth_chain() -> nn.Module:
    blocks = (RandomDepthBlock(6, 0.4) for _ in range(4))
    return nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 3))


class RowDrop(nn.Module):
    """torchvision's ``stochastic_depth`` in row mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        survival = 1.0 - self.p
        size = [x.shape[0]] + [1] * (x.ndim - 1)
        noise = torch.empty(size, dtype=x.dtype, device=x.device)
        noise = noise.bernoulli_(survival)
        if survival > 0.0:
            noise.div_(survival)
        return x * noise


class RowDropNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.drop = RowDrop(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + self.drop(torch.relu(layer(x)))
        return self.head(x)


class RunningMean(nn.Module):
    ema: Tensor
    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(width))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            with torch.no_grad():
                self.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.ema / (1 - 0.9 ** (self.steps + 1))


class Rebinding(nn.Module):
    """Assigns a new tensor to its buffer, as many moving averages do."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def buffer_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), RunningMean(8), nn.ReLU(), nn.Linear(8, 8), RunningMean(8), nn.Linear(8, 3)
    )


def rebinding_chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), Rebinding(8), nn.ReLU(), nn.Linear(8, 8), Rebinding(8), nn.Linear(8, 3)
    )


# Control flow and odds and ends
# ---------------------------------------------------------------------------------------


class ShapeControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2, f"want (batch, 6), got {tuple(x.shape)}"
        assert x.shape[-1] == 6
        h = self.fc1(x)
        if x.shape[0] > 1:
            h = h - h.mean(0, keepdim=True)
        h = torch.relu(self.fc2(torch.relu(h)))
        return self.fc3(h) / len(x)


class TrainingControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.extra = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.fc1(x)), 0.2, self.training)
        h = self.fc2(h)
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
            return self.fc3(torch.relu(h + self.extra(h)))
        return self.fc3(torch.relu(h)).softmax(-1)


def normed_chain(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(
            norm(nn.Linear(6, 8)),
            nn.ReLU(),
            norm(nn.Linear(8, 8)),
            nn.ReLU(),
            norm(nn.Linear(8, 3)),
        )

    return make


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.conv2 = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv1(x)))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)), inplace=True))
        return self.conv2(x * scale.sigmoid()).amax((2, 3))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 3, padding=1)
        self.gn1 = nn.GroupNorm(3, 6)
        self.conv2 = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.gn2 = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.gn1(self.conv1(x)), inplace=True)
        x = F.elu(self.gn2(self.conv2(x)), inplace=True)
        return self.head(x.flatten(2).mean(dim=-1))


class Routing(nn.Module):
    """Integer and boolean tensors cross the cuts: the expert's index and the mask of kept units."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.inp = nn.Linear(6, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.3)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        choice = scores.argmax(-1)
        h = self.inp(x)
        keep = h > -0.5
        y = self.norm(torch.bmm(h.unsqueeze(1), self.experts[choice]).squeeze(1))
        y = torch.where(keep, y, torch.zeros_like(y)) * scores.gather(1, choice[:, None])
        return self.head(y + self.table(choice)), choice


class TensorAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)
        self.scale = torch.linspace(0.5, 1.5, 8)
        self.shifts = [torch.zeros(8), torch.ones(8)]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x)) * self.scale.to(x.dtype)
        h = torch.relu(self.fc2(h)) + self.shifts[1].to(x)
        return self.fc3(h * self.scale.to(x.dtype))


def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def shift(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.25,)


def hooked_chain() -> nn.Module:
    model = mlp_chain()
    model.get_submodule("2").register_forward_hook(halve)
    model.get_submodule("4").register_forward_pre_hook(shift)
    return model


class Factories(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        h = self.inp(x)
        decay = torch.arange(t, device=x.device, dtype=x.dtype)
        carry = torch.zeros(b, t, 8, dtype=x.dtype)
        carry[:, 0] = 1
        h = torch.relu(h) * torch.exp(-decay / t)[None, :, None] + carry
        h = (
            self.mid(h) * x.new_full((b, 1, 1), 0.5)
            + torch.linspace(0, 1, 8).to(h)
            + torch.ones_like(h)
        )
        return self.head(h).sum(1) / torch.tensor(float(t), dtype=x.dtype)


def channels_last_convnet() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def channels_last_rows(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        torch.randn(batch, 3, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last),
    ), {}


def floats(*shapes: tuple[int, ...]) -> Inputs:
    """Several float inputs, each of shape (batch, *shape)."""
    return lambda batch, dtype: (
        tuple(torch.randn(batch, *shape, dtype=dtype) for shape in shapes),
        {},
    )


def gated(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, _ = floats((4,), (5,))(batch, dtype)
    return (*args, torch.rand(batch) > 0.3), {}


def with_keyword(name: str, width: int, extra: int = 0, **constants: Any) -> Inputs:
    """(batch, 6) positional inputs, ``extra`` more of (batch, 8), and one keyword tensor of (batch,
    width).
    """

    def inputs(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(torch.randn(batch, width, dtype=dtype) for width in (6, *(8,) * extra))
        return args, {name: torch.rand(batch, width, dtype=dtype), **constants}

    return inputs


_image = rows(3, 8, 8)
_weight_norm = nn.utils.parametrizations.weight_norm
_spectral_norm = nn.utils.parametrizations.spectral_norm

ZOO: tuple[Case, ...] = (
    Case("mlp_chain", mlp_chain, rows(6), ("1", "3", "5"), labels(3), classify),
    Case("norm_dropout_chain", norm_dropout_chain, rows(6), ("3", "6"), labels(3), classify),
    Case(
        "inplace_chain",
        inplace_chain,
        rows(6),
        ("0", "2"),
        notes="in-place ReLU right after each cut",
    ),
    Case("conv_norm_chain", ConvNet, _image, ("bn1", "conv2"), labels(4), classify),
    Case(
        "channels_last",
        channels_last_convnet,
        channels_last_rows,
        ("conv1", "bn2"),
        labels(4),
        classify,
    ),
    Case("residual", ResidualNet, rows(6), ("stem", "blocks.0", "blocks.1.fc1")),
    Case(
        "preactivation_inplace",
        PreActivationNet,
        _image,
        ("stem", "layer1", "layer2.conv1", "layer2"),
    ),
    Case("dense", DenseNet, rows(6), ("layers.0", "layers.1", "layers.2")),
    Case("unet", UNet, rows(2, 8, 8), ("down2", "middle", "up2")),
    Case("two_towers", TwoTowers, floats((6,), (5,)), ("left.1", "left", "right.1", "right")),
    Case(
        "fan_out",
        FanOut,
        rows(6),
        ("stem", "a", "b", "c"),
        notes="one value with uses in four stages",
    ),
    Case("inception", Inception, rows(2, 6, 6), ("stem", "branch3", "last")),
    Case(
        "tied_language_model",
        TiedLanguageModel,
        tokens(5, 11),
        ("embed", "block1"),
        labels(11, 5),
        classify,
    ),
    Case("reused_in_two", ReusedTwice, rows(6), ("norm",)),
    Case("reused_in_three", ReusedThrice, rows(8), ("norm1", "norm2")),
    Case(
        "siamese",
        Siamese,
        floats((6,), (6,)),
        ("tower.1",),
        notes="the cut falls inside the tower's second use",
    ),
    Case(
        "tied_autoencoder",
        TiedAutoencoder,
        rows(6),
        ("code",),
        notes="a weight read as an attribute, transposed",
    ),
    Case("views", Views, rows(6), ("inp", "mid", "late")),
    Case("inplace_after_cut", InplaceAfterCut, rows(6), ("a", "b")),
    Case("setitem_after_cut", SetitemAfterCut, rows(6), ("a", "b")),
    Case("read_after_mutation", ReadAfterMutation, rows(6), ("b", "c")),
    Case("mutate_through_view", MutateThroughView, rows(6), ("a", "c")),
    Case("squeeze_einsum", SqueezeEinsum, rows(6), ("query", "key")),
    Case("lstm", LSTMModel, tokens(4, 9), ("embed", "lstm", "norm"), labels(9, 4), classify),
    Case("gru", GRUModel, rows(4, 4), ("inp", "gru")),
    Case("transformer", TransformerModel, rows(4, 5), ("embed", "layers.0", "layers.1")),
    Case(
        "gpt",
        GPT,
        tokens(5, 11),
        ("blocks.0", "blocks.1.attn.qkv", "blocks.1"),
        labels(11, 5),
        classify,
    ),
    Case("rotary", RotaryModel, rows(4, 5), ("embed", "layers.0", "layers.1")),
    Case("cross_attention", CrossAttention, floats((3, 5), (4, 4)), ("memory", "attn")),
    Case("time_loop", TimeLoop, rows(3, 4), ("embed", "cell")),
    Case("unbind_loop", UnbindLoop, rows(3, 4), ("embed", "step")),
    Case("checkpoint", checkpointed_chain(False), rows(6), ("0", "1")),
    Case("checkpoint_reentrant", checkpointed_chain(True), rows(6), ("0", "1")),
    Case("custom_function", BinaryNet, rows(6), ("fc1", "fc2")),
    Case("no_grad_inside", NoGradTeacher, rows(6), ("student.0", "student")),
    Case("detached_branch", DetachedBranch, rows(6), ("fc1", "fc2")),
    Case("autocast_inside", AutocastInside, rows(6), ("inp", "norm")),
    Case("dict_output", DictOutput, rows(6), ("trunk", "mid")),
    Case("dataclass_output", DataclassOutput, rows(6), ("fc1", "fc2")),
    Case("namedtuple_output", NamedTupleOutput, rows(6), ("encoder", "log_var")),
    Case("nested_input", NestedInput, nested_input, ("image", "mix")),
    Case("optional_none", OptionalArguments, rows(6), ("fc1", "fc2")),
    Case("optional_given", OptionalArguments, with_keyword("bias", 8, scale=0.5), ("fc1", "fc2")),
    Case("several_inputs", SeveralInputs, gated, ("a", "c")),
    Case("early_outputs", EarlyOutputs, rows(6), ("exit1", "exit2")),
    Case(
        "open_arguments",
        OpenArguments,
        with_keyword("shift", 8, extra=1, negate=True),
        ("fc1", "fc2"),
    ),
    Case("frozen_first_half", frozen_chain(0, 1), rows(6), ("2", "3")),
    Case(
        "frozen_middle",
        frozen_chain(2),
        rows(6),
        ("1", "2"),
        notes="the middle stage has nothing to train",
    ),
    Case(
        "frozen_norm",
        frozen_norm_chain,
        rows(6),
        ("1", "4"),
        notes="BatchNorm in eval mode while training",
    ),
    Case(
        "stochastic_depth",
        stochastic_depth_chain,
        rows(6),
        ("1", "3"),
        notes="`if torch.rand([]) < p`",
    ),
    Case("row_drop", RowDropNet, rows(6), ("layers.0", "layers.1")),
    Case(
        "running_mean",
        buffer_chain,
        rows(6),
        ("1", "3"),
        notes="buffers updated in place in forward",
    ),
    Case(
        "rebound_buffer", rebinding_chain, rows(6), ("1", "3"), notes="buffers replaced in forward"
    ),
    Case("shape_control", ShapeControl, rows(6), ("fc1", "fc2")),
    Case("training_control", TrainingControl, rows(6), ("fc1", "fc2")),
    Case("weight_norm", normed_chain(_weight_norm), rows(6), ("1", "3")),
    Case("spectral_norm", normed_chain(_spectral_norm), rows(6), ("1", "3")),
    Case("weight_norm_hooks", normed_chain(nn.utils.weight_norm), rows(6), ("1", "3")),
    Case("spectral_norm_hooks", normed_chain(nn.utils.spectral_norm), rows(6), ("1", "3")),
    Case("squeeze_excite", SqueezeExcite, rows(2, 6, 6), ("norm", "squeeze")),
    Case("group_norm", GroupNormNet, rows(2, 7), ("gn1", "conv2")),
    Case("routing", Routing, rows(6), ("inp", "norm"), notes="integer and boolean tensors cross"),
    Case("tensor_attribute", TensorAttribute, rows(6), ("fc1", "fc2")),
    Case(
        "hooks",
        hooked_chain,
        rows(6),
        ("1", "3"),
        notes="a forward hook and a forward pre-hook on leaves",
    ),
    Case("factories", Factories, rows(3, 4), ("inp", "mid")),
)
BY_NAME = {case.name: case for case in ZOO}
