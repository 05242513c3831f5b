"""Frontiers: sets of nodes that may all be done before the rest begins, and what the stage between
two of them costs.

A partition into stages whose quotient graph is acyclic is a chain of frontiers, each within the
next. In program order a frontier is a position, and everything before it is done. Off the program
order every set that is closed under predecessors is one; nodes that must not be parted (members of
containers, memory that is written to) are one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .loads import Loads, integers

INFINITE = float("inf")


@dataclass(frozen=True)
class Frontiers:
    """Some frontiers of one graph; the first is empty and the last holds everything.

    Attributes:
        loads: the graph; values that cross none of them may be left out.
        masks: the positions of each one's nodes, as the bits of an integer; empty for prefixes of
            the program order.
        compute: time of the nodes of each.
        memory: bytes of the nodes of each.
        member: which values are computed in it.
        used: how many users of each value are in it.
        below: ``below[i, j]``: whether frontier i is a proper part of frontier j.
        prefix: the position that each ends at in program order; -1 for those that are no prefix of
            it.
    """

    loads: Loads
    masks: tuple[int, ...]
    compute: Tensor
    memory: Tensor
    member: Tensor
    used: Tensor
    below: Tensor
    prefix: tuple[int, ...]

    @property
    def crossing(self) -> Tensor:
        """Which values cross each frontier."""
        return self.member & (self.used < self.loads.total)


def prefixes(loads: Loads, positions: Sequence[int]) -> Frontiers:
    """The frontiers of some ascending positions of the program order."""
    loads = loads.crossing(positions)
    ends = integers([0, *positions, len(loads.compute)])
    return Frontiers(
        loads=loads,
        masks=(),
        compute=_sums_before(loads.compute)[ends],
        memory=_sums_before(loads.memory)[ends],
        member=loads.values[None] < ends[:, None],
        used=_counts(loads, loads.edge_user[None] < ends[:, None]),
        below=ends[:, None] < ends[None],
        prefix=tuple(ends.tolist()),
    )


def _sums_before(amounts: Tensor) -> Tensor:
    """At each position, the sum of what is before it."""
    return torch.cat([amounts.new_zeros(1), amounts.cumsum(0)])


def from_masks(loads: Loads, masks: Iterable[int], everything: int) -> Frontiers:
    """Frontiers given as sets of positions of computed nodes, as bits; the empty set and
    ``everything`` are added, the order is by size.
    """
    count = len(loads.compute)
    full = everything | 1 << (count - 1)  # the output is computed with the last stage
    ordered = sorted({0, full, *masks} - {everything}, key=lambda m: (m.bit_count(), m))
    inside = bit_rows(ordered, count)
    sets, exact = inside.to(torch.float32), inside.double()
    sizes = sets.sum(1)
    return Frontiers(
        loads=loads,
        masks=tuple(ordered),
        compute=(exact @ loads.compute.double()).round().long(),
        memory=(exact @ loads.memory.double()).round().long(),
        member=inside[:, loads.values].bool(),
        used=_counts(loads, inside[:, loads.edge_user].bool()),
        below=(sets @ sets.T == sizes[:, None]) & (sizes[:, None] < sizes[None]),
        prefix=tuple(
            m.bit_length() if m == full or m == everything & ((1 << m.bit_length()) - 1) else -1
            for m in ordered
        ),
    )


def bit_rows(masks: Sequence[int], count: int) -> Tensor:
    """The bits of each number as a row of zeros and ones, lowest first."""
    size = -(-count // 8)
    text = bytearray(b"".join(m.to_bytes(size, "little") for m in masks))
    rows = torch.frombuffer(text, dtype=torch.uint8).view(len(masks), size, 1)
    bits = (rows >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :count]


def _counts(loads: Loads, done: Tensor) -> Tensor:
    counts = torch.zeros(len(done), len(loads.values), dtype=torch.int32)
    return counts.index_add_(1, loads.edge_value, done.to(torch.int32))


@dataclass(frozen=True)
class Pairs:
    """What the stage between two frontiers costs, ``[i, j]``; infinite where there is none.

    Attributes:
        seconds: nanoseconds: its nodes, the sources of what it sends, sending and receiving.
        memory: bytes: its nodes, its sources, what it receives.
        traffic: bytes that it receives.
    """

    seconds: Tensor
    memory: Tensor
    traffic: Tensor


def weigh_pairs(frontiers: Frontiers, required: Sequence[int] = ()) -> Pairs:
    """Cost of every possible stage. A value is sent once by its producer and received by every
    stage that uses it.

    No stage ends where nothing trainable crosses, or passes over a required position.
    """
    loads, member, used = frontiers.loads, frontiers.member, frontiers.used
    waiting = used < loads.total

    def own(amount: Tensor) -> Tensor:
        """What is done between the two."""
        return (amount[None] - amount[:, None]).double()

    def sent(weight: Tensor) -> Tensor:
        """What is made between the two and used later."""
        waits = (member & waiting).double() @ weight.double()
        return waits[None] - (member.double() * weight) @ waiting.double().T

    received = torch.zeros(2, len(member), len(member), dtype=torch.float64)
    weights = torch.stack([loads.transfer, loads.nbytes]).double()
    for i, crosses in enumerate(frontiers.crossing):
        live = torch.nonzero(crosses).flatten()
        if len(live):
            arrives = (used[:, live] > used[i, live]).double()
            received[:, i] = weights[:, live] @ arrives.T
    seconds = own(frontiers.compute) + sent(loads.source + loads.transfer) + received[0]
    memory = own(frontiers.memory) + sent(loads.source_bytes) + received[1]
    forbidden = ~frontiers.below | _unwanted(frontiers, required)
    return Pairs(*(m.masked_fill(forbidden, INFINITE) for m in (seconds, memory, received[1])))


def _unwanted(frontiers: Frontiers, required: Sequence[int]) -> Tensor:
    """Ends that nothing trainable crosses, and stages that pass over a required position."""
    usable = (frontiers.crossing & frontiers.loads.carries).any(1)
    usable[0] = usable[-1] = True
    for position in required:
        at = frontiers.prefix.index(position)
        comparable = frontiers.below[:, at] | frontiers.below[at]
        comparable[at] = True
        usable &= comparable
    unwanted = ~(usable[:, None] & usable[None])
    for position in required:
        at = frontiers.prefix.index(position)
        unwanted |= frontiers.below[:, at][:, None] & frontiers.below[at][None]
    return unwanted
