"""Which process runs which stage, or which rows of a batch of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError, did_you_mean
from ..graphs.nested import map_tensors
from ..schedules import Flow
from .executors import shared_state
from .job import Answer, Values
from .mailbox import Letter

Placement = Sequence[int | Sequence[int]] | Mapping[str, int | Sequence[int]]


class Part(NamedTuple):
    """Which rows of a letter a process has sent."""

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
        rank: of this process.
        size: of the newest batch.
    """

    ranks: tuple[tuple[int, ...], ...]
    sizes: dict[int, int] = field(default_factory=dict)
    rank: int = 0
    size: int = 0

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

    def note_size(self, step: int, values: Values, queue: int) -> None:
        """Remember how many rows the first input that has any has, if a stage works on part of
        them; of batches that cannot be under way any more forget it.
        """
        if not self.divided:
            return
        tensors = (v for v in values.values() if isinstance(v, Tensor) and v.dim())
        self.size = next((t.shape[0] for t in tensors), 0)
        least = max(len(ranks) for ranks in self.ranks)
        if self.size < least:
            raise DecouplingError(
                f"a batch of {self.size} has no row for each of {least} ranks that share a stage"
            )
        self.sizes[step] = self.size
        self.sizes.pop(step - 4 * queue - 64, None)

    def fraction(self, stage: int) -> float:
        """Of the newest batch's rows, those that a stage works on here."""
        if stage not in self.divided:
            return 1.0
        first, end = self.rows(stage, self.rank, self.size)
        return (end - first) / self.size

    def rows_of(self, stage: int, values: Values, target: Any) -> tuple[Values, Any]:
        """The newest batch's inputs and target, of the rows that a stage works on here."""
        if stage not in self.divided:
            return values, target
        first, end = self.rows(stage, self.rank, self.size)
        values, target = (slice_rows(v, first, end, self.size) for v in (values, target))
        return values, target

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
            spans = {s: self.rows(sender, s, size) for s in self.ranks[sender]}
            senders = [s for s, (a, b) in spans.items() if max(a, low) < min(b, high)]
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
    """One letter's payload from its parts, in the order of their rows; what has no rows is summed
    where ``add`` says so, as gradients are, else all have sent the same.
    """
    payloads = [payload for _, payload in parts]
    if any(payload is None for payload in payloads):
        return None
    return _joined(payloads, [part.rows for part, _ in parts], add)


def _joined(values: list[Any], rows: list[int], add: bool) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _joined([v.get(key) for v in values], rows, add) for key in first}
    if isinstance(first, Answer):
        return Answer(**_joined(list(map(vars, values)), rows, add))
    known = [v for v in values if isinstance(v, Tensor)]
    if not known:
        return values[0]
    pairs = zip(values, rows, strict=True)
    if any(not isinstance(v, Tensor) or not v.dim() or v.shape[0] != n for v, n in pairs):
        return torch.stack(known).sum(0) if add and len(known) > 1 else known[0]
    return torch.cat(known)


def find_places(
    decoupled: Decoupled, placement: Placement | None, rank: int, world: int, flow: Flow
) -> Places:
    """As :func:`place_stages`, for this rank of so many, where stages can be placed so.

    Raises:
        DecouplingError: they share state, or need a fixed staleness.
    """
    places = place_stages(placement, [s.name for s in decoupled.stages], world)
    places.rank = rank
    for name, where in shared_state(decoupled):
        if len({places.ranks[k] for k in where}) > 1:
            stages = ", ".join(f"stage_{k}" for k in where)
            raise DecouplingError(
                f"{name!r} is used by {stages}, which are placed on different ranks: put them "
                "on one (placement=), or keep them in one stage "
                "(dni_fx.plan_cuts(keep_together=...))"
            )
    if places.divided and flow.staleness is None:
        shared = places.divided[0]
        raise DecouplingError(
            f"stage_{shared} is shared by ranks {list(places.ranks[shared])}, which must update in "
            "step: pass staleness=, say 2"
        )
    return places


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
