"""Which process runs which stage, or which rows of a batch of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DecouplingError, did_you_mean
from ..graphs.nested import map_tensors
from .mailbox import Letter

Placement = Sequence[int | Sequence[int]] | Mapping[str, int | Sequence[int]]


class Part(NamedTuple):
    """A process's share of a letter."""

    place: int  # among the processes of the sender that have something for this taker
    total: int  # number of those
    rows: int  # 0: not divided


@dataclass
class Places:
    """The ranks of every stage, and the batch sizes of what is under way.

    A stage on R ranks works on a R-th of every batch on each of them: rank number i on rows ``n i
    // R`` to ``n (i + 1) // R``.

    Attributes:
        ranks: of every stage, in order.
        sizes: of batches, by step.
    """

    ranks: tuple[tuple[int, ...], ...]
    sizes: dict[int, int] = field(default_factory=dict)

    def stages_of(self, rank: int) -> list[int]:
        """Stages that a rank runs, ascending."""
        return [k for k, ranks in enumerate(self.ranks) if rank in ranks]

    def rows(self, stage: int, rank: int, size: int) -> tuple[int, int]:
        """First row of a rank, and first of the next."""
        ranks = self.ranks[stage]
        place = ranks.index(rank)
        return size * place // len(ranks), size * (place + 1) // len(ranks)

    @property
    def divided(self) -> list[int]:
        """Stages that several ranks share."""
        return [k for k, ranks in enumerate(self.ranks) if len(ranks) > 1]

    def divide(
        self, sender: int, taker: int, rank: int, letter: Letter
    ) -> Iterator[tuple[int, Part, Any]]:
        """A letter's parts, with the rank that each is for."""
        if len(self.ranks[sender]) == len(self.ranks[taker]) == 1 or letter.step not in self.sizes:
            yield from ((r, Part(0, 1, 0), letter.payload) for r in self.ranks[taker])
            return
        size = self.sizes[letter.step]
        first, end = self.rows(sender, rank, size)
        for r in self.ranks[taker]:
            low, high = self.rows(taker, r, size)
            senders = [
                s for s in self.ranks[sender] if _overlap(self.rows(sender, s, size), (low, high))
            ]
            if rank in senders:
                start, stop = max(first, low) - first, min(end, high) - first
                part = Part(senders.index(rank), len(senders), stop - start)
                yield r, part, slice_rows(letter.payload, start, stop, end - first)


def slice_rows(value: Any, start: int, stop: int, count: int) -> Any:
    """Some rows of every tensor whose first dimension is the batch's; others whole."""
    if stop - start == count:
        return value
    return map_tensors(lambda t: t[start:stop] if t.dim() and t.shape[0] == count else t, value)


def join(parts: list[tuple[Part, Any]], add: bool) -> Any:
    """One letter's payload from its parts, in the order of their rows.

    Args:
        parts: what each process sent.
        add: whether what has no rows is summed, as gradients are; else all have sent the same.
    """
    payloads = [payload for _, payload in parts]
    if any(payload is None for payload in payloads):
        return None
    return _joined(payloads, [part.rows for part, _ in parts], add)


def _joined(values: list[Any], rows: list[int], add: bool) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _joined([v.get(key) for v in values], rows, add) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        tables = [{n: getattr(v, n) for n in names} for v in values]
        return dataclasses.replace(first, **_joined(tables, rows, add))
    known = [v for v in values if isinstance(v, Tensor)]
    if not known:
        return values[0]
    pairs = zip(values, rows, strict=True)
    if any(not isinstance(v, Tensor) or not v.dim() or v.shape[0] != n for v, n in pairs):
        return torch.stack(known).sum(0) if add and len(known) > 1 else known[0]
    return torch.cat(known)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def place_stages(placement: Placement | None, stages: Sequence[str], world: int) -> Places:
    """Check a placement, or make one: stages in order, as many on each rank.

    Args:
        placement: a rank, or several that share its batches, for every stage: in order, or by name.
        stages: names.
        world: number of ranks.

    Raises:
        DecouplingError: stages left out or unknown, ranks that do not exist or have nothing to do.
    """
    count = len(stages)
    if placement is None:
        if count < world:
            raise DecouplingError(
                f"there are {world} processes, but only {count} stages: cut into more stages, "
                "start fewer processes, or pass placement= to let several share a stage's batches, "
                "such as placement=[0, [1, 2]]"
            )
        return Places(tuple((k * world // count,) for k in range(count)))
    if isinstance(placement, Mapping):
        if unknown := [n for n in placement if n not in stages]:
            raise DecouplingError(
                f"placement names no stage: {unknown[0]!r}{did_you_mean(unknown[0], list(stages))}"
            )
        if missing := [n for n in stages if n not in placement]:
            raise DecouplingError(f"placement leaves out {', '.join(missing)}")
        placement = [placement[n] for n in stages]
    if len(placement) != count:
        raise DecouplingError(f"placement has {len(placement)} entries for {count} stages")
    ranks = tuple((r,) if isinstance(r, int) else tuple(r) for r in placement)
    used = {r for group in ranks for r in group}
    if bad := [r for r in sorted(used, key=str) if type(r) is not int or not 0 <= r < world]:
        raise DecouplingError(
            f"placement names rank {bad[0]!r}, but there are ranks 0 to {world - 1}"
        )
    if any(not group or len(set(group)) < len(group) for group in ranks):
        raise DecouplingError("placement needs at least one rank for each stage, and none twice")
    if idle := [r for r in range(world) if r not in used]:
        raise DecouplingError(f"placement gives rank {idle[0]} nothing to do")
    return Places(ranks)
