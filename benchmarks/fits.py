"""What fits where: the largest transformer that each way to train has room for, computed.

    python benchmarks/fits.py
    python benchmarks/fits.py --rows 4 --length 2048

Nothing is trained and no weight exists: encoders of several sizes are traced on ``meta``, a stage
for each block, and ``dni_fx.simulation.forecast`` says what their tensors take. Single precision,
Adam, local heads; a tenth of the memory is left for what is not counted, as ``memory_cap=`` does.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.simulation import Forecast, forecast

SIZES = ((1024, 24), (2048, 24), (2560, 32), (4096, 32), (5120, 40), (8192, 48))  # width, blocks
VOCABULARY, CLASSES, HEAD = 32000, 16, 128
GIGABYTES = (8, 16, 24, 80)
WAYS = (
    "backprop",
    "checkpoints",
    "drop-in, 8 stages",
    'update="at_once"',
    "resident=2, sweep=1",
    "resident=2, sweep=4",
    "resident=1, sweep=4",
)


class Encoder(nn.Module):
    """Blocks between an embedding and a classifier of the mean position."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCABULARY, width)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, **options)
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, classes)``."""
        x = self.first(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def forecast_of(width: int, blocks: int, rows: int, length: int) -> tuple[float, Forecast]:
    """Parameters of one size, and what training it takes."""
    with torch.device("meta"):
        model, tokens = Encoder(width, blocks), torch.zeros(rows, length, dtype=torch.int64)
        plan = dni_fx.plan_cuts(
            model,
            (tokens,),
            cuts=[f"blocks.{k}" for k in range(blocks - 1)],
            gradients="local",
            context=dni_fx.one_hot(CLASSES),
        )
    return sum(p.numel() for p in model.parameters()), forecast(plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    told = parser.parse_args()
    found = [forecast_of(*size, told.rows, told.length) for size in SIZES]
    names = [f"{parameters / 1e9:.1f} B" for parameters, _ in found]
    print(f"Computed: {told.rows} sequences of {told.length} tokens, GB of tensors\n")
    print("| | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for way in WAYS:
        cells = [f"{one[way].memory / 1e9:,.1f}" for _, one in found]
        print(f"| `{way}` | " + " | ".join(cells) + " |")
    print("\nComputed: the largest of these that fits\n")
    print("| | " + " | ".join(f"{size} GB" for size in GIGABYTES) + " |")
    print("| --- |" + " --- |" * len(GIGABYTES))
    for way in WAYS:
        cells = []
        for size in GIGABYTES:
            fits = [n for n, (_, one) in zip(names, found, strict=True) if _fits(one, way, size)]
            cells.append(fits[-1] if fits else "-")
        print(f"| `{way}` | " + " | ".join(cells) + " |")


def _fits(found: Forecast, way: str, gigabytes: int) -> bool:
    """Whether a way has room."""
    return Forecast((), gigabytes * 1e9, found.moments, found.store_bandwidth).fits(found[way])


if __name__ == "__main__":
    main()
