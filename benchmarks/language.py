"""A small language model and real text for it, the same in every process that asks.

A causal transformer on characters, of which any run of blocks can be a stage. The text is Python's
own sources, which every machine with Python has, or a file.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 128  # bytes; all above ASCII are one symbol
PACKAGES = ("asyncio", "email", "json")  # of the standard library: English and Python
HELD_OUT, HELD_OUT_BATCHES = 0.1, 8
SEED, LEARNING_RATE = 0, 1e-3


class Embedding(nn.Module):
    """Tokens and positions."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, width)``; always the full length."""
        return self.tokens(tokens) + self.positions


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same."""
        q, k, v = (
            self.qkv(self.norm1(x))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Embedding, ``blocks.0`` to ``blocks.{depth - 1}``, norm and head."""

    def __init__(self, depth: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, length)``, int64, to logits ``(batch, length, vocabulary)``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model(depth: int, width: int, heads: int, vocabulary: int, length: int) -> LanguageModel:
    """The model with the weights of `SEED`: the same on every rank. The caller's random state is
    left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LanguageModel(depth, width, heads, vocabulary, length)


def part(whole: LanguageModel, first: int, last: int) -> nn.Sequential:
    """Blocks ``first`` to ``last - 1`` of a model, with what comes before the first or after the
    last; no copies.
    """
    layers: list[nn.Module] = list(whole.blocks)[first:last]
    if first == 0:
        layers.insert(0, whole.embedding)
    if last == len(whole.blocks):
        layers += [whole.norm, whole.head]
    return nn.Sequential(*layers)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """The optimizer of every method."""
    return torch.optim.Adam(parameters, LEARNING_RATE)


def library_sources() -> bytes:
    """Python's own sources of `PACKAGES`, one after the other."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(
        path.read_bytes() for name in PACKAGES for path in sorted((root / name).rglob("*.py"))
    )


@dataclass(frozen=True)
class Work:
    """What is trained, and on what; equal on all ranks.

    Attributes:
        characters: the text, int64 codes below `VOCABULARY`; its last tenth is held out.
    """

    depth: int
    width: int
    heads: int
    length: int
    batch: int
    characters: Tensor

    @staticmethod
    def read(path: Path | None) -> Tensor:
        """The characters of a file, or of `library_sources`."""
        raw = path.read_bytes() if path else library_sources()
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).clamp(max=VOCABULARY - 1).long()

    def model(self) -> LanguageModel:
        """A fresh model, as every method starts from."""
        return model(self.depth, self.width, self.heads, VOCABULARY, self.length)

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of a step, ``(batch, length)`` each: the same whenever and
        wherever asked.
        """
        return self._draw(self.characters[: self._border], step)

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of text that is never trained on."""
        return [self._draw(self.characters[self._border :], k) for k in range(HELD_OUT_BATCHES)]

    @property
    def _border(self) -> int:
        return int(len(self.characters) * (1 - HELD_OUT))

    def _draw(self, text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        begin = torch.randint(len(text) - self.length, (self.batch, 1), generator=generator)
        window = text[begin + torch.arange(self.length + 1)]
        return window[:, :-1], window[:, 1:]
