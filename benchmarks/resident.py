"""Training larger than memory: peak memory and time of a step, by how much of the model is in it.

    python benchmarks/resident.py
    python benchmarks/resident.py --width 2048 --batches 64

Eight stages of a residual MLP, local heads, Adam, one thread. Every row is a process of its own;
its peak is what the system counted (``ru_maxrss``) above what torch and the library take before a
model is made. ``mapped`` starts from weights that lie in a file and are never in memory together.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dni_fx
from probe import capacity, describe_environment

STAGES, LAYERS, CLASSES, ROWS = 8, 4, 16, 128
ROWS_OF_TABLE: dict[str, dict[str, Any]] = {
    "backprop": {},
    "backprop, checkpoints": {},
    "in memory": {},
    "in memory, at once": {"update": "at_once"},
    "resident 2, sweep 1": {"resident": 2},
    "resident 2, sweep 4": {"resident": 2, "sweep": 4},
    "resident 2, sweep 16": {"resident": 2, "sweep": 16},
    "resident 1, sweep 16": {"resident": 1, "sweep": 16},
    "mapped, resident 2, sweep 16": {"resident": 2, "sweep": 16},
}


class Block(nn.Module):
    """Some residual layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to the same."""
        for layer in self.layers:
            x = x + F.gelu(layer(x)) * 0.1
        return x


class Network(nn.Module):
    """Blocks, one for each stage, and a head."""

    def __init__(self, width: int, checkpoints: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(STAGES))
        self.head = nn.Linear(width, CLASSES)
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to ``(batch, 16)`` logits."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x)


def batches(width: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Random rows and labels of one seed."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, width, generator=generator),
            torch.randint(CLASSES, (ROWS,), generator=generator),
        )
        for _ in range(count)
    ]


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The same everywhere."""
    return torch.optim.Adam(parameters, 1e-3)


def mapped_network(width: int, folder: str) -> Network:
    """A network whose weights lie in a file, made there a block at a time."""
    with torch.device("meta"):
        model = Network(width)
    found: dict[str, Tensor] = {}
    for index in range(STAGES):
        part = Block(width).state_dict()
        path = Path(folder) / f"block_{index}.pt"
        torch.save(part, path)
        mapped = torch.load(path, mmap=True)
        found |= {f"blocks.{index}.{name}": tensor for name, tensor in mapped.items()}
    found |= {f"head.{name}": t for name, t in nn.Linear(width, CLASSES).state_dict().items()}
    model.load_state_dict(found, assign=True)
    return model


def run(row: str, width: int, count: int, folder: str) -> dict[str, Any]:
    """Train, and tell peak and time."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    mapped = row.startswith("mapped")
    model = mapped_network(width, folder) if mapped else Network(width, "checkpoints" in row)
    data = batches(width, count)
    if row.startswith("backprop"):
        optimizer = adam(model.parameters())

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    else:
        decoupled = dni_fx.decouple(
            model,
            cuts=[f"blocks.{k}" for k in range(STAGES - 1)],
            example_inputs=(data[0][0],),
            gradients="local",
            context=dni_fx.one_hot(CLASSES),
            check=False,
        )
        trainer = dni_fx.Trainer(
            decoupled,
            F.cross_entropy,
            optimizer=adam,
            metrics_every=10**9,
            store=folder,
            **ROWS_OF_TABLE[row],
        )

        def step(x: Tensor, y: Tensor) -> None:
            trainer.step(x, target=y)

    half = count // 2
    for x, y in data[:half]:
        step(x, y)
    start = time.perf_counter()
    for x, y in data[half:]:
        step(x, y)
    seconds = (time.perf_counter() - start) / (count - half)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "mb": (peak - before) / 1024, "parameters": parameters}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=64, help="half of them are timed")
    parser.add_argument("--row", choices=ROWS_OF_TABLE, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=None, help="for the files; a temporary one by default")
    arguments = parser.parse_args()
    if arguments.row:
        found = run(arguments.row, arguments.width, arguments.batches, arguments.folder)
        print(json.dumps(found))
        return
    print(f"{describe_environment()}; {capacity()}\n")
    results: dict[str, dict[str, Any]] = {}
    for row in ROWS_OF_TABLE:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            options = ["--width", str(arguments.width), "--batches", str(arguments.batches)]
            command = [sys.executable, __file__, "--row", row, "--folder", folder, *options]
            made = subprocess.run(command, check=True, capture_output=True, text=True)
        results[row] = json.loads(made.stdout.splitlines()[-1])
    count = results["in memory"]["parameters"]
    whole = count * 16 / 2**20
    print(
        f"{count / 1e6:.0f} M parameters; with gradients and Adam's moments {whole:.0f} MB, as a "
        "process that holds everything.\n"
    )
    print("| step | peak, MB | x everything | time of a step, x in memory |")
    print("| --- | ---: | ---: | ---: |")
    for row, found in results.items():
        ratio = found["seconds"] / results["in memory"]["seconds"]
        print(f"| {row} | {found['mb']:.0f} | {found['mb'] / whole:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
