"""A bound that no partition into stages can beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .frontiers import INFINITE, bit_rows
from .loads import Loads

_CLOSURE = 4000  # nodes of a graph for whose bound everything before and after each node is summed


def lower_bound(loads: Loads, speeds: Sequence[float]) -> float:
    """No partition into as many stages can have a faster slowest stage; nanoseconds.

    Every stage but the last sends a value of its own, whose source it pays. When that value
    crosses, all that it needs is done, and all that needs its user is not: so it can be sent only
    at some amounts of work done. The bound is the best that could be had if work could be split
    anywhere between. What is made of parameters alone is taken to stay with its user.
    """
    work = float(loads.compute.sum())
    floor = max(work / sum(speeds), float(loads.compute.max()) / max(speeds))
    if len(speeds) < 2 or not len(loads.values):
        return floor
    done, left = _work_around(loads)
    sending = (loads.source + loads.transfer).double()
    price = sending.masked_fill(loads.attached, INFINITE)

    def possible(bound: float) -> bool:
        furthest = 0.0
        for speed in speeds[:-1]:
            reach = furthest + bound * speed - price
            fits = reach >= done
            if not bool(fits.any()):
                return False
            furthest = float(torch.minimum(reach, work - left)[fits].max())
        return work - furthest <= bound * speeds[-1]

    low, high = floor, floor + float(sending.max()) / min(speeds) + work
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def _work_around(loads: Loads) -> tuple[Tensor, Tensor]:
    """For each value, the work that must be done when it crosses, and the least that must still be
    left.
    """
    positions = range(len(loads.compute))
    before: list[list[int]] = [[] for _ in positions]
    after: list[list[int]] = [[] for _ in positions]
    values = loads.values.tolist()
    for value, user in zip(loads.edge_value.tolist(), loads.edge_user.tolist(), strict=True):
        before[user].append(values[value])
        after[values[value]].append(user)
    done = _work_with(before, positions, loads.compute)
    left = _work_with(after, reversed(positions), loads.compute).tolist()
    least = [min(left[u] for u in after[v]) for v in values]
    return done[loads.values], torch.tensor(least, dtype=torch.float64)


def _work_with(needs: list[list[int]], order: Iterable[int], compute: Tensor) -> Tensor:
    """Work of every node together with all that it needs, directly or not; in large graphs with
    the longest way instead.
    """
    count = len(needs)
    if count > _CLOSURE:
        work = compute.tolist()
        for node in order:
            work[node] += max((work[other] for other in needs[node]), default=0)
        return torch.tensor(work, dtype=torch.float64)
    masks = [1 << node for node in range(count)]
    for node in order:
        for other in needs[node]:
            masks[node] |= masks[other]
    return bit_rows(masks, count).double() @ compute.double()
