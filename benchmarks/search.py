"""What the search for cuts costs: its growth with the graph, and beside tracing for a real model.

    python benchmarks/search.py
    python benchmarks/search.py --nodes 1000 10000 --stages 16

Random chains with skips, costs and sizes are searched without a model (weighing and search); for
ResNet-50 tracing, measuring and search are timed apart. The larger graphs have more places than can
be weighed in pairs: some hundred are, then more near the cuts that were found.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable

import torch

import torchvision_cpu  # noqa: F401  (before torchvision)
from dni_fx.graphs.pipeline import trace_model
from dni_fx.passes.cut.cutting import find_flow, legal_positions
from dni_fx.passes.search import bounding, costing, searching, source_costs
from dni_fx.passes.search.chains import Wishes
from dni_fx.passes.search.loads import Loads
from probe import capacity, describe_environment


def random_loads(nodes: int, seed: int = 0) -> Loads:
    """A chain in which three of ten nodes are also used up to 200 nodes later."""
    rng = random.Random(seed)
    value, user = list(range(nodes)), [*range(1, nodes), nodes]
    for node in range(nodes - 2):
        if rng.random() < 0.3:
            value.append(node)
            user.append(min(node + rng.randint(2, 200), nodes - 1))
    generator = torch.Generator().manual_seed(seed)
    some = lambda most: torch.randint(0, most, (nodes,), generator=generator)  # noqa: E731
    ends = torch.tensor(value)
    return Loads(
        compute=torch.cat([some(10**6), torch.zeros(1, dtype=torch.int64)]),
        memory=torch.cat([some(10**6), torch.zeros(1, dtype=torch.int64)]),
        values=torch.arange(nodes),
        total=torch.bincount(ends),
        edge_value=ends,
        edge_user=torch.tensor(user),
        source=some(10**4),
        source_bytes=some(10**4),
        nbytes=some(10**3),
        transfer=some(10**4),
        carries=torch.ones(nodes, dtype=torch.bool),
        attached=torch.zeros(nodes, dtype=torch.bool),
    )


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Seconds and result of one call."""
    gc.collect()
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nodes", type=int, nargs="*", default=[100, 1000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--stages", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_environment()}; {capacity()}; {arguments.stages} stages\n")
    print("| nodes | search, s | µs per node | slowest stage / bound |")
    print("| ---: | ---: | ---: | ---: |")
    for nodes in arguments.nodes:
        loads = random_loads(nodes)
        wishes = Wishes(arguments.stages, allowed=tuple(range(1, nodes)), polish=1.0)
        seconds, answer = timed(
            lambda loads=loads, wishes=wishes: searching.best_positions(loads, wishes)
        )
        bound = bounding.lower_bound(loads, (1.0,) * arguments.stages)
        print(
            f"| {nodes:,} | {seconds:.3f} | {seconds / nodes * 1e6:.1f} | "
            f"{answer.slowest / bound:.4f} |"
        )  # type: ignore[attr-defined]

    from torchvision.models import resnet50

    model, x = resnet50(weights=None), torch.randn(2, 3, 64, 64)
    tracing, flow = min(
        (timed(lambda: find_flow(trace_model(model, (x,), {}))) for _ in range(3)),
        key=lambda t: t[0],
    )
    weighing, costs = timed(
        lambda: costing.measure_costs(
            flow, (x,), {}, source_costs.measure_sources(flow, lambda _: "auto", None)
        )  # type: ignore[arg-type]
    )
    wishes = Wishes(4, allowed=legal_positions(flow))  # type: ignore[arg-type]
    search, _ = min(
        (timed(lambda: searching.search_cuts(flow, costs, wishes)) for _ in range(3)),  # type: ignore[arg-type]
        key=lambda t: t[0],
    )
    print("\n| ResNet-50, 4 stages | seconds | x tracing |\n| --- | ---: | ---: |")
    for name, seconds in (("tracing", tracing), ("measuring", weighing), ("search", search)):
        print(f"| {name} | {seconds:.3f} | {seconds / tracing:.2f} |")


if __name__ == "__main__":
    main()
