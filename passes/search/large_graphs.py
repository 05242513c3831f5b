"""Program orders with too many positions to weigh in pairs: bisection with running maxima, and a
choice of places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .loads import Loads


def bisect_positions(
    loads: Loads, allowed: Sequence[int], required: Sequence[int], speeds: Sequence[float]
) -> tuple[int, ...]:
    """Positions whose slowest stage is fastest.

    Exact for costs that fall into parts of the two ends: every value is charged at each frontier
    that it crosses.

    Feasibility of a bound is a scan for each stage: position j can end a stage that begins at a
    feasible i if ``A[j] - B[i] <= bound``, so only the largest B so far matters.
    """
    count = len(loads.compute)
    ends = torch.tensor([0, *allowed, count])
    change = torch.zeros(count + 2, dtype=torch.int64)
    sending, receiving = torch.zeros_like(change), torch.zeros_like(change)
    first, last = loads.values + 1, loads.last_use + 1
    for table, amount in ((sending, loads.source + loads.transfer), (receiving, loads.transfer)):
        table.index_add_(0, first, amount).index_add_(0, last, -amount)
    done = torch.cat([torch.zeros(1, dtype=torch.int64), loads.compute.cumsum(0)])
    after = (done + sending.cumsum(0)[: count + 1])[ends]
    before = (done - receiving.cumsum(0)[: count + 1])[ends]
    forced = torch.searchsorted(ends, torch.tensor(required, dtype=torch.int64)).tolist()
    return _scan(ends, after, before, [0, *forced, len(ends) - 1], speeds)


def _scan(
    ends: Tensor, after: Tensor, before: Tensor, bounds: Sequence[int], speeds: Sequence[float]
) -> tuple[int, ...]:
    lowest = torch.iinfo(torch.int64).min // 4

    def reach(bound: int) -> list[Tensor] | None:
        current = torch.zeros(len(ends), dtype=torch.bool)
        current[0] = True
        levels = [current]
        for speed in speeds:
            furthest = torch.where(current, before, lowest)
            following = torch.zeros_like(current)
            for a, b in pairwise(bounds):  # no stage passes over a required position
                highest = furthest[a:b].cummax(0).values
                following[a + 1 : b + 1] |= highest >= after[a + 1 : b + 1] - math.floor(
                    bound * speed
                )
            current = following
            levels.append(current)
        return levels if bool(current[-1]) else None

    # the slowest stage has at least its share of all work, and rarely much more: close in on it
    # from there
    low = max(0, math.ceil((int(after[-1]) - int(before[0])) / sum(speeds)))
    step = max(1, low // 1000)
    high = low
    while not reach(high):
        low, high, step = high + 1, high + step, 2 * step
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reach(middle) else (middle + 1, high)
    levels = reach(low)
    assert levels is not None
    path = [len(ends) - 1]
    for level, speed in zip(reversed(levels[:-1]), reversed(speeds), strict=True):
        j = path[-1]
        start = max((b for b in bounds if b < j), default=0)
        fits = level[start:j] & (before[start:j] >= after[j] - math.floor(low * speed))
        path.append(start + int(torch.nonzero(fits)[-1]))
    return tuple(int(ends[i]) for i in reversed(path[1:-1]))


def thin_positions(loads: Loads, allowed: Sequence[int], parts: int) -> list[int]:
    """The narrowest position of each of many parts of equal work."""
    count = len(loads.compute)
    ends = torch.tensor(allowed)
    change = torch.zeros(count + 2, dtype=torch.int64)
    change.index_add_(0, loads.values + 1, loads.nbytes).index_add_(
        0, loads.last_use + 1, -loads.nbytes
    )
    width = change.cumsum(0)[ends].tolist()
    done = torch.cat([torch.zeros(1, dtype=torch.int64), loads.compute.cumsum(0)])[ends].double()
    part_of = (done / max(float(done[-1]), 1.0) * parts).floor().tolist()
    best: dict[float, tuple[int, int]] = {}
    for part, place, position in zip(part_of, width, allowed, strict=True):
        best[part] = min(best.get(part, (place, position)), (place, position))
    return [position for _, position in best.values()]
