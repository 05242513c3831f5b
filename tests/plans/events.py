"""An event simulator that knows only who waits for whom, and plans for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from dni_fx.plan import CutPlan, Interface, PlanReport, StageCost, StageReport, TensorSpec

PIPELINES = ("GPipe", "1F1B", "zero-bubble")


Links = dict[tuple[int, int], int]  # bytes by (producer, consumer)


def make_plan(
    costs: list[StageCost], links: Links | None = None, parameters: Sequence[int] = (10,)
) -> CutPlan:
    """A plan with these costs; a chain without bytes where no links are given."""
    links = {(k, k + 1): 0 for k in range(len(costs) - 1)} if links is None else links
    stages = [
        StageReport(f"stage_{k}", 1, parameters[k % len(parameters)], None, cost=c)
        for k, c in enumerate(costs)
    ]
    interfaces = [
        Interface(f"v{k}_{to}", TensorSpec((size,), torch.uint8), k, (to,))
        for (k, to), size in links.items()
    ]
    cuts = tuple(f"layer{k}" for k in range(len(costs) - 1))
    return CutPlan(
        "Net", "0" * 16, cuts, report=PlanReport("trace", tuple(stages), tuple(interfaces))
    )


def random_costs(rng: random.Random, count: int, spread: float = 20.0) -> list[StageCost]:
    """Stages whose forwards and backwards differ by up to so many times."""

    def seconds() -> float:
        return spread ** rng.random()

    return [
        StageCost(seconds(), seconds(), rng.uniform(0, 5), rng.uniform(0, 5)) for _ in range(count)
    ]


def balanced(
    count: int, forward: float = 1.0, backward: float = 2.0, **rest: Any
) -> list[StageCost]:
    return [StageCost(forward, backward, **rest)] * count


def random_graph(rng: random.Random, count: int) -> Links:
    """Stages that are no chain: skips and towers."""
    links = {(rng.randrange(k), k): rng.randrange(1000) for k in range(1, count)}
    for _ in range(rng.randrange(count)):
        k, to = sorted(rng.sample(range(count), 2))
        links[k, to] = rng.randrange(1000)
    return links
