"""How long the transform takes (trace, split and emit), next to `torch.export.export` alone on the
same model.

    python benchmarks/transform.py
    python benchmarks/transform.py --nodes 100 1000 --export-limit 1000 --models resnet50

The chains grow by powers of ten to show that time per node stays the same. The self-check runs the
model and is left out (``check=False``); so is building the model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchvision_cpu  # noqa: F401  (before torchvision)
from probe import capacity, describe_environment

WIDTH = 4
NODES_PER_BLOCK = 3
SHORT = 1.0  # measurements below this many seconds are repeated, and the least of them counts
REPEATS = 3


class Chain(nn.Module):
    """``h -> relu(linear(h)) + (the value one block earlier)``: three nodes a block, two values at
    any cut.
    """

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH) for _ in range(max(1, nodes // NODES_PER_BLOCK))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 4)`` to ``(batch, 4)``."""
        earlier = x
        for layer in self.layers:
            x, earlier = torch.relu(layer(x)) + earlier, x
        return x


class Block(nn.Module):
    """One pre-norm transformer layer on ``(batch, time, features)``."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query_key_value = nn.Linear(features, 3 * features)
        self.project = nn.Linear(features, features)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added to what came in."""
        batch, length, features = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(
            batch, length, 3, self.heads, features // self.heads
        )
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, features))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Twelve layers between an embedding and a head."""

    def __init__(
        self, layers: int = 12, features: int = 128, heads: int = 4, tokens: int = 100
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, features)
        self.blocks = nn.ModuleList(Block(features, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, time)`` token numbers to ``(batch, time, tokens)`` logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Case:
    """One row: a name, and what builds the model and its example input."""

    name: str
    build: Callable[[], tuple[nn.Module, Tensor]]
    with_export: bool = True


@dataclass(frozen=True)
class Cost:
    """Seconds, and nodes of the graph that came out."""

    seconds: float
    nodes: int


def image_model(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A torchvision classifier without trained weights on two images of 64 pixels."""

    def build() -> tuple[nn.Module, Tensor]:
        from torchvision.models import get_model

        return get_model(name, weights=None), torch.randn(2, 3, 64, 64)

    return build


MODELS = {
    "resnet50": Case("ResNet-50", image_model("resnet50")),
    "transformer": Case(
        "transformer, 12 layers", lambda: (Transformer(), torch.randint(100, (2, 32)))
    ),
    "densenet201": Case("DenseNet-201", image_model("densenet201")),
}


def chain(nodes: int, export_limit: int) -> Case:
    """The synthetic case of about ``nodes`` nodes."""
    name = f"chain with skips, {nodes:,} nodes"
    return Case(name, lambda: (Chain(nodes), torch.randn(2, WIDTH)), nodes <= export_limit)


def transform(model: nn.Module, x: Tensor, stages: int) -> int:
    """Trace, split and emit; return the nodes of the traced graph."""
    import dni_fx

    layers = [
        name
        for name, module in model.named_modules()
        if name and list(module.parameters(recurse=False))
    ]
    cuts = [
        layers[k * len(layers) // stages] for k in range(1, stages)
    ]  # named: the search has its own benchmark
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(x,), check=False)
    report = decoupled.plan.report
    assert report is not None
    return sum(stage.nodes for stage in report.stages)


def export(model: nn.Module, x: Tensor) -> int:
    """`torch.export` with the same flag that the transform's ladder uses; return the nodes of its
    graph.
    """
    return len(torch.export.export(model, (x,), strict=False).graph.nodes)


def measure(
    build: Callable[[], tuple[nn.Module, Tensor]], run: Callable[[nn.Module, Tensor], int]
) -> Cost:
    """Seconds of ``run`` on a fresh model, the least of a few where it is quick."""
    seconds: list[float] = []
    nodes = 0
    while not seconds or (len(seconds) < REPEATS and seconds[-1] < SHORT):
        torch.manual_seed(0)
        model, x = build()
        gc.collect()
        begin = time.perf_counter()
        nodes = run(model, x)
        seconds.append(time.perf_counter() - begin)
    return Cost(min(seconds), nodes)


def row(case: Case, stages: int) -> str:
    """Measure one case and write it as a row of the table."""
    ours = measure(case.build, lambda model, x: transform(model, x, stages))
    cells = [
        case.name,
        f"{ours.nodes}",
        f"{ours.seconds:.3f}",
        f"{ours.seconds / ours.nodes * 1e6:.0f}",
    ]
    if case.with_export:
        other = measure(case.build, export)
        cells += [f"{other.nodes}", f"{other.seconds:.3f}", f"{ours.seconds / other.seconds:.2f}"]
    else:
        cells += ["", "not run", ""]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the environment and the table, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nodes", type=int, nargs="*", default=[100, 1000, 10_000, 100_000], help="of the chains"
    )
    parser.add_argument(
        "--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="real models"
    )
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument(
        "--export-limit", type=int, default=10_000, help="largest chain that torch.export is given"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"{describe_environment()}; {capacity()}; {arguments.stages} stages\n")
    print(
        "| graph | nodes | dni_fx, s | µs per node | nodes of export | export, s | dni_fx / export "
        "|"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    warm_up = Case("warm-up", lambda: (Chain(10), torch.randn(2, WIDTH)))
    with contextlib.redirect_stdout(None):
        row(warm_up, 2)  # imports and caches that the first transform and the first export pay for
    chains = [chain(nodes, arguments.export_limit) for nodes in arguments.nodes]
    for case in chains + [MODELS[name] for name in arguments.models]:
        print(row(case, arguments.stages), flush=True)
    skipped = [nodes for nodes in arguments.nodes if nodes > arguments.export_limit]
    if skipped:
        print(
            f"\ntorch.export was not given chains above {arguments.export_limit} nodes: it takes "
            "too long."
        )


if __name__ == "__main__":
    main()
