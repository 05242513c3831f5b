"""The best chain of frontiers: dynamic programming over pairs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .frontiers import INFINITE, Frontiers, Pairs, weigh_pairs

OBJECTIVES = ("throughput", "memory", "traffic", "learnability")
SLACK = 1.05  # how much slower than the best the secondary objectives may be
# stages that are not contiguous in program order are taken if they are this much better
_WORTH = 0.98


@dataclass(frozen=True)
class Wishes:
    """What a search is asked for.

    Attributes:
        stages: how many; None only for the fewest under a memory cap.
        objective: one of ``OBJECTIVES``.
        bandwidth: bytes per second between stages.
        speeds: of the stages, in order; empty for equal ones.
        memory_cap: bytes that no stage may exceed.
        allowed: legal positions, ascending.
        required: positions that must be cut at.
        together: positions of nodes that must share a stage, group by group.
        unexplained: for each position, the share of the true gradient that a source there does not
            explain.
        tidy: positions where modules end.
        polish: how much slower the slowest stage may be, as a factor, for cuts at such places.
        in_order: whether stages must be contiguous in program order.
    """

    stages: int | None
    objective: str = "throughput"
    bandwidth: float = 1e10
    speeds: tuple[float, ...] = ()
    memory_cap: float = INFINITE
    allowed: tuple[int, ...] = ()
    required: tuple[int, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    unexplained: dict[int, float] = field(default_factory=dict)
    tidy: frozenset[int] = frozenset()
    polish: float = 1.01
    in_order: bool = False


@dataclass(frozen=True)
class Answer:
    """The best chain of some frontiers.

    Attributes:
        frontiers: that were weighed.
        path: of frontiers, the empty and the whole one included.
        best: the least possible slowest stage over these frontiers.
        slowest: nanoseconds of the chain's slowest stage.
        memory: bytes of its largest stage.
        traffic: bytes that its stages receive.
    """

    frontiers: Frontiers
    path: tuple[int, ...]
    best: float
    slowest: float
    memory: float
    traffic: float

    @property
    def cuts(self) -> tuple[int, ...]:
        """The position of each cut; -1 off the program order."""
        return tuple(self.frontiers.prefix[i] for i in self.path[1:-1])

    def better(self, other: Answer, objective: str) -> bool:
        """Whether it is so much better that stages may leave the program order for it."""
        if objective == "memory":
            return self.memory < _WORTH * other.memory
        if objective == "traffic":
            return self.traffic < _WORTH * other.traffic and self.slowest <= SLACK * other.slowest
        return self.slowest < _WORTH * other.slowest


def solve(frontiers: Frontiers, wishes: Wishes) -> Answer | None:
    """The best chain of frontiers, or None where the memory cap forbids all."""
    pairs = weigh_pairs(frontiers, wishes.required)
    counts = [wishes.stages] if wishes.stages is not None else range(1, len(frontiers.prefix))
    for count in counts:
        speeds = wishes.speeds or (1.0,) * count
        cap = wishes.memory_cap
        if wishes.objective == "memory" and wishes.stages is not None:
            cap = min(cap, bottleneck(pairs.memory, (1.0,) * count))
        capped = pairs.seconds.masked_fill(pairs.memory > cap, INFINITE)
        best = bottleneck(capped, speeds)
        if math.isfinite(best):
            break
    else:
        return None
    loose = SLACK if wishes.objective in ("traffic", "learnability") else wishes.polish
    weight = _second_wish(pairs, frontiers, wishes, len(speeds))
    path = cheapest(capped, weight, speeds, best * loose)
    steps = list(pairwise(path))
    return Answer(
        frontiers=frontiers,
        path=path,
        best=best,
        slowest=max(float(pairs.seconds[k]) / s for k, s in zip(steps, speeds, strict=True)),
        memory=max(float(pairs.memory[k]) for k in steps),
        traffic=sum(float(pairs.traffic[k]) for k in steps),
    )


def _second_wish(pairs: Pairs, frontiers: Frontiers, wishes: Wishes, stages: int) -> Tensor:
    """What is kept small among chains that are fast enough: the gradient that sources do not
    explain, else cuts where no module ends, and the bytes that cross.
    """
    weight = pairs.traffic
    most = float(frontiers.loads.nbytes.sum() + 1)
    if wishes.objective == "throughput" and wishes.polish > 1.0:
        untidy = [p not in wishes.tidy for p in frontiers.prefix[:-1]] + [False]
        weight = weight + torch.tensor(untidy, dtype=torch.float64)[None] * most * stages
    if wishes.unexplained:
        shares = [wishes.unexplained.get(p, 0.0) for p in frontiers.prefix]
        weight = torch.tensor(shares, dtype=torch.float64)[None] + weight / (1e6 * most)
    return weight


def bottleneck(cost: Tensor, speeds: Sequence[float]) -> float:
    """The least possible largest cost of a chain from the first frontier to the last, one step for
    each speed.

    Args:
        cost: ``[i, j]``, infinite where j cannot follow i.
        speeds: what the cost of each step is divided by.
    """
    reached = torch.full((len(cost),), INFINITE, dtype=torch.float64)
    reached[0] = 0.0
    for speed in speeds:
        reached = torch.maximum(reached[:, None], cost / speed).amin(0)
    return float(reached[-1])


def cheapest(
    cost: Tensor, weight: Tensor, speeds: Sequence[float], bound: float
) -> tuple[int, ...]:
    """The chain of least total weight among those whose steps all cost at most ``bound``; the first
    of equal ones.
    """
    total = torch.full((len(cost),), INFINITE, dtype=torch.float64)
    total[0] = 0.0
    came_from = []
    for speed in speeds:
        step = weight.masked_fill(cost / speed > bound, INFINITE)
        total, best = (total[:, None] + step).min(0)
        came_from.append(best)
    path = [len(cost) - 1]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return tuple(reversed(path))
