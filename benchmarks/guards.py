"""What it costs to ask, before each call, whether the graph at hand is still valid: modes, plain
attributes, hooks, shapes and strides of inputs, and values of inputs that the model decides by.

    python benchmarks/guards.py

Beside it the time of one training step, exact gradients, plain SGD, one thread. Aims: at most 60 us
for three layers, at most 5 % of a step for the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
import torchvision_cpu  # noqa: F401  (before torchvision)
from language import loss_of
from language import model as language_model
from probe import describe_environment

CALLS = 300  # of the guards; the least of five rounds counts


class Masked(nn.Module):
    """Decides by the values of its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
        self.scale = 1.0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x).relu() * self.scale
        result: Tensor = self.last(h if mask.all() else h * mask)
        return result


Case = tuple[nn.Module, list[str], tuple[Tensor, ...], Tensor, Callable[[Tensor, Tensor], Tensor]]


def cases(depth: int) -> dict[str, Case]:
    """Models with cuts, inputs, targets and losses."""
    from torchvision.models import resnet18

    mlp = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    ten = torch.randint(10, (8,))
    mask = torch.ones(8, 1, dtype=torch.bool)
    language = language_model(depth, 768, 12, 1000, 128)
    tokens = torch.randint(1000, (8, 128))
    blocks = [n for n, m in language.named_modules() if type(m).__name__ == "Block"]
    return {
        "MLP, 3 layers": (mlp, ["1", "3"], (torch.randn(8, 64),), ten, F.cross_entropy),
        "mask.all()": (Masked(), ["first"], (torch.randn(8, 64), mask), ten, F.cross_entropy),
        "ResNet-18, 8 x 64 px": (
            resnet18(num_classes=10),
            ["layer2", "layer3"],
            (torch.randn(8, 3, 64, 64),),
            ten,
            F.cross_entropy,
        ),
        f"GPT-2, {depth} layers, 8 x 128": (
            language,
            [blocks[len(blocks) // 2]],
            (tokens,),
            torch.randint(1000, (8, 128)),
            loss_of,
        ),
    }


def least(call: Callable[[], object], rounds: int, calls: int) -> float:
    """Seconds of one call."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return min(found)


def measure(
    model: nn.Module, cuts: list[str], inputs: tuple[Tensor, ...], target: Tensor, loss: Any
) -> tuple[float, float]:
    """Seconds of the guards of one call, and of one step."""
    decoupled = dni_fx.decouple(model, cuts, example_inputs=inputs, gradients="exact")
    trainer = dni_fx.Trainer(decoupled, loss, optimizer=lambda p: torch.optim.SGD(p, 1e-3))
    trainer.step(*inputs, target=target)
    guards = least(lambda: decoupled.bind(*inputs), 5, CALLS)
    return guards, least(lambda: trainer.step(*inputs, target=target), 3, 3)


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=12, help="blocks of the transformer")
    depth = parser.parse_args().depth
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe_environment())
    print(f"\n{'model':32}{'guards us':>12}{'step ms':>12}{'%':>8}")
    for name, case in cases(depth).items():
        guards, step = measure(*case)
        print(f"{name:32}{guards * 1e6:12.1f}{step * 1e3:12.2f}{100 * guards / step:8.2f}")


if __name__ == "__main__":
    main()
