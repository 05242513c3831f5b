"""A language model on characters, its blocks on several processes that do not wait for each other's
gradients.

    torchrun --standalone --nproc-per-node 2 experiments/distributed_text.py [--compare]
    python experiments/distributed_text.py                            # the same in one process

The text is Python's own standard library unless a file is named; the last tenth of it is held out.
With --checkpoint a run that was ended goes on where it was, and ``torchrun --max-restarts 3``
starts it again by itself.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
import ranks
from dni_fx import distributed

SYMBOLS = 128  # ASCII; whatever else is in the text is the last of them
DEPTH = 4
PACKAGES = ("asyncio", "email", "json")  # of the standard library
HELD_OUT_BATCHES = 8


class Embedding(nn.Module):
    """Symbols and positions."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, text: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, width)``."""
        return self.symbols(text) + self.positions[: text.shape[1]]


class Block(nn.Module):
    """Causal attention and a small network, each beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same."""
        query, key, value = (
            self.project(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.network(self.between(x))


class LanguageModel(nn.Module):
    """Embedding, ``blocks.0`` to ``blocks.3``, and logits of the next symbol."""

    def __init__(self, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))

    def forward(self, text: Tensor) -> Tensor:
        """``(batch, length)``, integers, to ``(batch, length, SYMBOLS)``."""
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def cut_names(stages: int) -> list[str]:
    """Cuts that share the blocks out."""
    return [f"blocks.{i * DEPTH // stages - 1}" for i in range(1, stages)]


def loss_of(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def read(path: Path | None) -> tuple[Tensor, Tensor]:
    """A file, or Python's own sources, as integers: to train on, and held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (
        [path] if path else [f for name in PACKAGES for f in sorted((library / name).rglob("*.py"))]
    )
    raw = b"\n".join(file.read_bytes() for file in files)
    symbols = torch.frombuffer(bytearray(raw), dtype=torch.uint8).clamp(max=SYMBOLS - 1).long()
    border = len(symbols) * 9 // 10
    return symbols[:border], symbols[border:]


def draw(symbols: Tensor, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows and the symbols that follow: the same in every process, and after a restart."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(len(symbols) - length, (size, 1), generator=generator)
    window = symbols[begin + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


def bits(
    trainer: distributed.Trainer, model: nn.Module, held_out: Tensor, args: argparse.Namespace
) -> float:
    """Bits per character of text that is never trained on; each process evaluates its own
    stages.
    """
    model.eval()
    total = 0.0
    for number in range(HELD_OUT_BATCHES):
        text, following = draw(held_out, args.batch, args.length, number)
        logits = trainer.forward(text)  # None where the last stage is not
        total += math.nan if logits is None else float(loss_of(logits, following))
    model.train()
    return trainer.mean(total / HELD_OUT_BATCHES / math.log(2))  # known to all


def train(method: str, symbols: Tensor, held_out: Tensor, args: argparse.Namespace) -> float:
    """Train with one source of gradients. Returns bits per character."""
    torch.manual_seed(args.seed)
    model = LanguageModel(args.length, args.width, args.heads)
    decoupled = distributed.decouple(
        model,
        cut_names(args.stages),
        example_inputs=(draw(symbols, args.batch, args.length, 0)[0],),
        gradients=method,
        context=dni_fx.one_hot(SYMBOLS, positions=1),  # the sources see the next symbols
    )
    directory, reached = ranks.folder(args, method), math.nan
    with distributed.Trainer(
        decoupled,
        loss=loss_of,
        optimizer=partial(torch.optim.Adam, lr=args.lr),
        synthesizer_optimizer=partial(torch.optim.Adam, lr=args.source_lr),
        clip_norm=1.0,
        **ranks.flow(args),
    ) as trainer:
        if directory:
            reached = trainer.resume(directory) or reached
            if trainer.steps:
                ranks.say(f"{method}: goes on after step {trainer.steps}")
        for step in range(trainer.steps, args.steps):
            text, following = draw(symbols, args.batch, args.length, 1_000_003 * args.seed + step)
            report = trainer.step(text, target=following)
            if (step + 1) % args.every and step + 1 < args.steps:
                continue
            if step + 1 == args.steps:
                trainer.drain()  # what is under way belongs to the run
            own = float(report.loss) if report.outputs is not None else math.nan
            loss, reached = trainer.mean(own), bits(trainer, model, held_out, args)
            words = f"loss {loss:.3f}  held out {reached:.3f} bits per character"
            ranks.say(f"{method:>8}  step {step + 1:5}  {words}")
            if directory:
                trainer.save(directory, extra=reached)
        ranks.finish(trainer, args, method)
    return reached


def main() -> None:
    """Train by the source asked for, and by the controls."""
    parser = ranks.options(
        __doc__, steps=1000, batch=16, every=100, stages=2, most=DEPTH, source="local"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="(default: Python's standard library)"
    )
    parser.add_argument("--length", type=int, default=64, help="of a window (default: 64)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: 128)")
    parser.add_argument("--heads", type=int, default=4, help="of attention (default: 4)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument(
        "--source-lr", type=float, default=3e-3, help="that of the sources (default: 3e-3)"
    )
    args = ranks.parse(parser)
    try:
        symbols, held_out = read(args.text)
    except OSError as error:
        parser.error(f"--text: {error}")
    if len(held_out) <= args.length:
        parser.error(
            f"--text: {len(symbols) + len(held_out)} characters are too few for windows of "
            f"{args.length}"
        )
    with ranks.processes() as count:
        shape = f"{args.stages} stages, {count} process{'es' if count > 1 else ''}"
        ranks.say(f"{len(symbols) + len(held_out):,} characters: {shape}")
        found = {method: train(method, symbols, held_out, args) for method in args.methods}
        for method, reached in found.items():
            ranks.say(f"{method:>8}: {reached:.3f} bits per character")


if __name__ == "__main__":
    main()
