"""The search for cuts: exact over topological frontiers, then off the program order where that is
better.

The slowest stage is made as fast as it can be by dynamic programming over pairs of frontiers; of
graphs with too many places for that, some are taken, then more near the cuts that were found. Of
plans whose slowest stage is within one per cent of the best, that is taken which cuts where modules
end, then the one that sends the fewest bytes, then the first in program order: equal costs give
equal plans everywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from ...errors import CutError
from ...plan import SearchReport
from ..cut.cutting import Flow, assign_stages, name_positions
from .bounding import lower_bound
from .chains import SLACK, Answer, Wishes, bottleneck, cheapest, solve
from .closures import Units, closed_sets, find_units, nodes_of
from .costing import Costs
from .frontiers import INFINITE, Frontiers, Pairs, from_masks, prefixes, weigh_pairs
from .loads import Loads, weigh_flow

_DENSE = 1800  # frontiers whose pairs are weighed at once
_WINDOW, _SETS = 64, 300  # nodes around a cut, and frontiers, that are tried off the program order
_LARGEST_UNITS = 20_000  # nodes of a graph that is looked at off the program order


@dataclass(frozen=True)
class Choice:
    """Which node belongs to which stage, and why.

    Attributes:
        stage_of: stage of every computed node.
        cuts: their names, in order.
        free: whether stages are not contiguous in program order.
        costs: of the graph, where they were asked for.
        search: how the cuts were found, where they were searched for.
    """

    stage_of: dict[fx.Node, int]
    cuts: tuple[str, ...]
    free: bool = False
    costs: Costs | None = None
    search: SearchReport | None = None


def search_cuts(flow: Flow, costs: Costs, wishes: Wishes) -> Choice:
    """Find the best cuts, and how far they can be from the best of all partitions.

    Raises:
        CutError: no choice of cuts keeps within the memory cap; by how much, and where.
    """
    loads = weigh_flow(flow, costs, wishes.bandwidth)
    answer = best_positions(loads, wishes)
    if answer is None:
        raise CutError(_too_much(flow, loads, wishes))
    stages = len(answer.path) - 1
    sure = "program order" if len(wishes.allowed) <= _DENSE else ""
    if stages == 1:
        sure = "all partitions"
    elif _may_leave_order(flow, wishes):
        free, whole = _off_program_order(flow, loads, replace(wishes, stages=stages), answer)
        if whole and sure:
            sure = "all partitions"
        if free is not None and free.better(answer, wishes.objective):
            answer = free
        elif whole and free is not None and free.best < answer.best:
            # something is better, but not worth leaving the program order for
            sure = "program order"
    return _describe(flow, costs, loads, wishes, answer, sure)


def _may_leave_order(flow: Flow, wishes: Wishes) -> bool:
    asked = wishes.in_order or wishes.objective == "learnability"
    return not asked and len(flow.nodes) <= _LARGEST_UNITS


def best_positions(loads: Loads, wishes: Wishes) -> Answer | None:
    """The best cuts in program order, or None where the memory cap forbids all.

    Sure to be the best where all places can be weighed in pairs; else the answer over a few places
    tells near which of them all are worth weighing.
    """
    near: Sequence[int] = wishes.allowed
    while len(near) > _DENSE:
        places = _thinned(loads, wishes, near)
        answer = solve(prefixes(loads, places), wishes)
        if answer is None:
            return None
        ends = [0, 0, *places, near[-1] + 1, near[-1] + 1]
        around: set[int] = {*wishes.required, *answer.cuts}
        for cut in answer.cuts:
            at = bisect_left(places, cut) + 2
            low, high = (bisect_left(near, ends[i]) for i in (at - 2, at + 2))
            around.update(near[low:high])
        if len(around) == len(near):
            return answer
        near = sorted(around)
    return solve(prefixes(loads, near), wishes)


def _thinned(loads: Loads, wishes: Wishes, near: Sequence[int]) -> list[int]:
    """The required positions, and the narrowest of each of some hundred neighbourhoods; all of them
    where they are not too many.
    """
    if len(near) <= _DENSE:
        return list(near)
    change = loads.values.new_zeros(len(loads.compute) + 2)
    for ends, nbytes in ((loads.values, loads.nbytes), (loads.last_use, -loads.nbytes)):
        change.index_add_(0, ends + 1, nbytes)
    width = change.cumsum(0).tolist()
    size = -(-len(near) // (_DENSE // 3))
    groups = (near[i : i + size] for i in range(0, len(near), size))
    return sorted({*(min(group, key=width.__getitem__) for group in groups), *wishes.required})


def near_best(flow: Flow, costs: Costs, wishes: Wishes) -> tuple[int, ...]:
    """Positions of plans whose slowest stage is within the slack of the best: those worth a closer
    look.

    Raises:
        CutError: as for :func:`search_cuts`.
    """
    loads = weigh_flow(flow, costs, wishes.bandwidth)
    frontiers, pairs = _weigh_places(loads, wishes)
    seconds = pairs.seconds.masked_fill(pairs.memory > wishes.memory_cap, INFINITE)
    speeds = wishes.speeds or (1.0,) * (wishes.stages or 1)
    bound = SLACK * bottleneck(seconds, speeds)
    if not math.isfinite(bound):
        raise CutError(_too_much(flow, loads, wishes))
    steps = [seconds / speed <= bound for speed in speeds]
    none = torch.zeros(len(seconds), dtype=torch.bool)
    ahead, behind = [none.clone()], [none.clone()]  # what is reached from either end, by steps
    ahead[0][0] = behind[0][-1] = True
    for step, back in zip(steps, reversed(steps), strict=True):
        ahead.append((ahead[-1][:, None] & step).any(0))
        behind.append((back & behind[-1][None]).any(1))
    used = torch.stack([a & b for a, b in zip(ahead, reversed(behind), strict=True)]).any(0)
    return tuple(p for p, u in zip(frontiers.prefix[1:-1], used[1:-1].tolist(), strict=True) if u)


def _weigh_places(loads: Loads, wishes: Wishes) -> tuple[Frontiers, Pairs]:
    frontiers = prefixes(loads, _thinned(loads, wishes, wishes.allowed))
    return frontiers, weigh_pairs(frontiers, wishes.required)


# ---- off the program order -----------------------------------------------------------------------


def _off_program_order(
    flow: Flow, loads: Loads, wishes: Wishes, chain: Answer
) -> tuple[Answer | None, bool]:
    """The best partition over every closed set of units, or over those near the chain's cuts; and
    whether over all.
    """
    computed = sum(1 << i for i, n in enumerate(flow.nodes) if flow.is_computed(n))

    def before(position: int) -> int:
        return computed & ((1 << position) - 1)

    units = find_units(flow, wishes.together)
    sets = closed_sets(units, _DENSE)
    found = sets or [s for position in chain.cuts for s in _near(units, position)]
    masks = [nodes_of(units, s) for s in found]
    stride = max(1, -(-len(wishes.allowed) // max(_DENSE + _DENSE // 2 - len(masks), 1)))
    legal = {before(p) for p in wishes.allowed}
    # positions may be forbidden
    masks = [m for m in masks if m != before(m.bit_length()) or m in legal]
    masks += [before(p) for p in (*wishes.required, *wishes.allowed[::stride], *chain.cuts)]
    whole = sets is not None and stride == 1
    return solve(from_masks(loads, dict.fromkeys(masks), computed), wishes), whole


def _near(units: Units, position: int) -> list[int]:
    """Closed sets that differ from a position's only within a window around it, as wide as their
    number allows.
    """
    window = _WINDOW
    while window >= 2:
        base = 0
        for unit, mask in enumerate(units.masks):
            if mask.bit_length() <= position - window and not units.before[unit] & ~base:
                base |= 1 << unit
        within = sum(
            1 << u for u, m in enumerate(units.masks) if (m & -m).bit_length() <= position + window
        )
        sets = closed_sets(units, _SETS, base, within | base)
        if sets is not None:
            return sets
        window //= 2
    return []


# ---- reports -------------------------------------------------------------------------------------


def _describe(
    flow: Flow, costs: Costs, loads: Loads, wishes: Wishes, answer: Answer, sure: str
) -> Choice:
    free = min(answer.cuts, default=0) < 0
    stage_of = _stages(flow, answer) if free else assign_stages(flow, answer.cuts)
    last = {stage: node for node, stage in stage_of.items()}
    ends = [last[k] for k in range(len(answer.cuts))]
    names = name_positions(flow, tuple(flow.index[n] + 1 for n in ends))
    bound = lower_bound(loads, wishes.speeds or (1.0,) * (len(answer.path) - 1))
    fastest = wishes.objective == "throughput" and wishes.memory_cap == INFINITE
    if sure == "all partitions" and fastest:
        bound = max(bound, answer.best)
    places = zip(names, answer.cuts, strict=True)
    report = SearchReport(
        objective=wishes.objective,
        costs=costs.kind,
        slowest=answer.slowest / 1e9,
        bound=min(bound, answer.slowest) / 1e9,
        frontiers=len(answer.frontiers.prefix) - 2,
        exact=sure,
        reasons=_reasons(names, loads, wishes, answer),
        explained={n: 1 - wishes.unexplained[p] for n, p in places if p in wishes.unexplained},
    )
    return Choice(stage_of, names, free, costs, report)


def _stages(flow: Flow, answer: Answer) -> dict[fx.Node, int]:
    """The stage of every computed node: the first frontier of the chain that holds it."""
    masks = [answer.frontiers.masks[i] for i in answer.path[1:]]
    return {
        node: next(stage for stage, mask in enumerate(masks) if mask >> position & 1)
        for position, node in enumerate(flow.nodes)
        if flow.is_computed(node)
    }


def _reasons(names: Sequence[str], loads: Loads, wishes: Wishes, answer: Answer) -> dict[str, str]:
    """Why each cut is where it is."""
    frontiers, crossing = answer.frontiers, answer.frontiers.crossing
    total = max(float(loads.compute.sum()), 1.0)
    reasons = {}
    for name, i, position in zip(names, answer.path[1:-1], answer.cuts, strict=True):
        asked = "asked for; " if position in wishes.required else ""
        known = wishes.unexplained.get(position)
        learnt = "" if known is None else f"; a source explains {1 - known:.0%} of the gradient"
        count, size = int(crossing[i].sum()), float(frontiers.loads.nbytes[crossing[i]].sum()) / 1e6
        source = float(frontiers.loads.source[crossing[i]].sum()) / 1e6
        reasons[name] = (
            f"{asked}{float(frontiers.compute[i]) / total:.0%} of the work is done; {count} "
            f"value{'s'[: count != 1]} of {size:.2f} MB cross{'es'[: 2 * (count == 1)]}, sources "
            f"take {source:.2f} ms{learnt}"
        )
    return reasons


def _too_much(flow: Flow, loads: Loads, wishes: Wishes) -> str:
    """What the cap would have to be, and which stage is the largest."""
    frontiers, pairs = _weigh_places(loads, wishes)
    count = wishes.stages or min(len(frontiers.prefix) - 1, 64)
    least = bottleneck(pairs.memory, (1.0,) * count)
    path = cheapest(pairs.memory, pairs.memory, (1.0,) * count, least)
    i, j = max(pairwise(path), key=lambda step: float(pairs.memory[step]))
    ends = {0: "the inputs", len(flow.nodes): "the output"}
    start, end = (
        ends.get(p) or repr(name_positions(flow, (p,))[0])
        for p in (frontiers.prefix[k] for k in (i, j))
    )
    return (
        f"memory_cap={wishes.memory_cap:,.0f} bytes cannot be kept with {count} stages: the stage "
        f"from {start} to {end} needs {least:,.0f} bytes at least, "
        f"{least - wishes.memory_cap:,.0f} too many; raise the cap, ask for more stages, or for "
        "smaller sources (gradients=)"
    )
