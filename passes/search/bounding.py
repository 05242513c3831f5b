"""A bound that no partition into stages can beat."""

from __future__ import annotations

from collections.abc import Sequence

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
    price = (loads.source + loads.transfer).double().masked_fill(loads.attached, INFINITE)

    def possible(bound: float) -> bool:
        furthest = 0.0
        for speed in speeds[:-1]:
            reach = furthest + bound * speed - price
            fits = reach >= done
            if not bool(fits.any()):
                return False
            furthest = float(torch.minimum(reach, work - left)[fits].max())
        return work - furthest <= bound * speeds[-1]

    low, high = floor, floor + float((loads.source + loads.transfer).max()) / min(speeds) + work
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def _work_around(loads: Loads) -> tuple[Tensor, Tensor]:
    """For each value, the work that must be done when it crosses, and the least that must still be
    left.
    """
    count = len(loads.compute)
    before: list[list[int]] = [[] for _ in range(count)]
    after: list[list[int]] = [[] for _ in range(count)]
    values = loads.values.tolist()
    for value, user in zip(loads.edge_value.tolist(), loads.edge_user.tolist(), strict=True):
        before[user].append(values[value])
        after[values[value]].append(user)
    work = loads.compute.tolist()
    if count <= _CLOSURE:
        done, left = (
            _closure_sums(before, loads.compute),
            _closure_sums(after[::-1], loads.compute, reverse=True),
        )
    else:  # the longest way instead of everything on any way
        done, left = list(work), list(work)
        for p in range(count):
            done[p] += max((done[q] for q in before[p]), default=0)
        for p in reversed(range(count)):
            left[p] += max((left[q] for q in after[p]), default=0)
    least = [min(left[u] for u in after[v]) for v in values]
    return torch.tensor([done[v] for v in values], dtype=torch.float64), torch.tensor(
        least, dtype=torch.float64
    )


def _closure_sums(needs: list[list[int]], compute: Tensor, reverse: bool = False) -> list[float]:
    """Work of every node together with all that it needs, directly or not."""
    count = len(needs)
    masks: list[int] = []
    for number, direct in enumerate(needs):
        mask = 1 << number
        for other in direct:
            mask |= masks[count - 1 - other if reverse else other]
        masks.append(mask)
    weights = compute.flip(0) if reverse else compute
    sums = bit_rows(masks, count).double() @ weights.double()
    return (sums.flip(0) if reverse else sums).tolist()
