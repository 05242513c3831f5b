"""The search for cuts: exact over topological frontiers, then off the program order where that is
better.

The slowest stage is made as fast as it can be by dynamic programming over pairs of frontiers;
graphs with too many places for that are first solved by bisection, with costs that fall into a part
of each frontier. Of plans whose slowest stage is within one per cent of the best, that is taken
which cuts where modules end, then the one that sends the fewest bytes, then the first in program
order: equal costs give equal plans everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from ...errors import CutError
from ...plan import SearchReport
from ..cut.cutting import Flow, name_positions
from .bounding import lower_bound
from .chains import SLACK, Answer, Wishes, bottleneck, cheapest, restricted, solve
from .closures import Units, closed_sets, find_units, nodes_of
from .costing import Costs
from .frontiers import INFINITE, from_masks, prefixes, weigh_pairs
from .large_graphs import bisect_positions, thin_positions
from .loads import Loads, weigh_flow

DENSE = 1800  # frontiers whose pairs are weighed at once
_WINDOW, _SETS = 64, 300  # nodes around a cut, and frontiers, that are tried off the program order
_LARGEST_UNITS = 20_000  # nodes of a graph that is looked at off the program order


@dataclass(frozen=True)
class Found:
    """Where to cut.

    Attributes:
        stage_of: stage of every computed node.
        positions: ascending, one for each cut; empty where stages are not contiguous in program
            order.
        names: of the cuts, in order.
        report: how they were found.
    """

    stage_of: dict[fx.Node, int]
    positions: tuple[int, ...]
    names: tuple[str, ...]
    report: SearchReport


def search_cuts(flow: Flow, costs: Costs, wishes: Wishes) -> Found:
    """Find the best cuts.

    Args:
        flow: facts of a traced model.
        costs: of its nodes and of the sources.
        wishes: what is asked for; ``stages - 1`` is at most the number of allowed positions.

    Returns:
        A partition into stages, its cuts, and how far it can be from the best.

    Raises:
        CutError: no choice of cuts keeps within the memory cap; by how much, and where.
    """
    loads = weigh_flow(flow, costs, wishes.bandwidth)
    answer, sure = best_positions(loads, wishes)
    if answer is None:
        raise CutError(_too_much(flow, loads, wishes))
    if len(answer.path) == 2:
        sure = "all partitions"
    computed = sum(1 << i for i, n in enumerate(flow.nodes) if flow.is_computed(n))
    small = len(flow.nodes) <= _LARGEST_UNITS
    if wishes.objective != "learnability" and small and len(answer.path) > 2:
        fixed = replace(wishes, stages=len(answer.path) - 1)
        free, whole = _off_program_order(flow, loads, fixed, answer, computed)
        if whole and sure:
            sure = "all partitions"
        if free is not None and free.better(answer, wishes.objective):
            answer = free
        elif whole and free is not None and free.best < answer.best:
            # something is better, but not worth leaving the program order for
            sure = "program order"
    return _describe(flow, costs, loads, wishes, answer, sure)


def best_positions(loads: Loads, wishes: Wishes) -> tuple[Answer | None, str]:
    """The best cuts in program order; whether they are sure to be: ``"program order"`` or ``""``.

    None where the memory cap forbids all.
    """
    positions = _places(loads, wishes)
    near = loads.crossing(torch.tensor(positions)) if positions else loads
    sure = "program order" if len(positions) == len(wishes.allowed) else ""
    return solve(near, prefixes(near, positions), wishes), sure


def near_best(flow: Flow, costs: Costs, wishes: Wishes) -> tuple[int, ...]:
    """Positions of plans whose slowest stage is within the slack of the best: those worth a closer
    look.

    Args:
        flow: facts of a traced model.
        costs: of its nodes and of the sources.
        wishes: what is asked for.
    """
    loads = weigh_flow(flow, costs, wishes.bandwidth)
    positions = _places(loads, wishes)
    loads = loads.crossing(torch.tensor(positions)) if positions else loads
    frontiers = prefixes(loads, positions)
    pairs = restricted(weigh_pairs(loads, frontiers), loads, frontiers, wishes)
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


def _places(loads: Loads, wishes: Wishes) -> tuple[int, ...]:
    """All allowed positions, or those that are worth weighing in pairs where there are too many."""
    if len(wishes.allowed) <= DENSE:
        return wishes.allowed
    chain: tuple[int, ...] = ()
    if wishes.objective != "memory" and wishes.memory_cap == INFINITE and wishes.stages is not None:
        speeds = wishes.speeds or (1.0,) * wishes.stages
        chain = bisect_positions(loads, wishes.allowed, wishes.required, speeds)
    thin = thin_positions(loads, wishes.allowed, DENSE // 3)
    return tuple(sorted({*thin, *chain, *wishes.required}))


# ---- off the program order -----------------------------------------------------------------------


def _off_program_order(
    flow: Flow, loads: Loads, wishes: Wishes, chain: Answer, computed: int
) -> tuple[Answer | None, bool]:
    """The best partition over every closed set of units, or over those near the chain's cuts; and
    whether over all.
    """
    units = find_units(flow, wishes.together)
    required = [computed & ((1 << p) - 1) for p in wishes.required]
    sets = closed_sets(units, DENSE)
    whole = sets is not None
    masks = [nodes_of(units, s) for s in sets or ()]
    if not whole:
        for position in (chain.frontiers.prefix[i] for i in chain.path[1:-1]):
            masks += [nodes_of(units, s) for s in _near(units, position)]
    stride = max(1, -(-len(wishes.allowed) // max(DENSE + DENSE // 2 - len(masks), 1)))
    whole = whole and stride == 1
    allowed = [*wishes.allowed[::stride], *(chain.frontiers.prefix[i] for i in chain.path[1:-1])]
    legal = {computed & ((1 << p) - 1) for p in wishes.allowed}
    prefix = [computed & ((1 << m.bit_length()) - 1) for m in masks]
    # positions may be forbidden
    masks = [m for m, p in zip(masks, prefix, strict=True) if m != p or m in legal]
    masks = list(dict.fromkeys([*masks, *required, *(computed & ((1 << p) - 1) for p in allowed)]))
    return solve(loads, from_masks(loads, masks, computed), wishes), whole


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
) -> Found:
    stage_of = _stages(flow, answer)
    last = {stage: node for node, stage in stage_of.items()}
    cuts = [last[k] for k in range(len(answer.path) - 2)]
    names = name_positions(flow, tuple(flow.index[n] + 1 for n in cuts))
    places = tuple(answer.frontiers.prefix[i] for i in answer.path[1:-1])
    speeds = wishes.speeds or (1.0,) * (len(answer.path) - 1)
    bound = lower_bound(loads, speeds)
    fastest = wishes.objective == "throughput" and wishes.memory_cap == INFINITE
    if sure == "all partitions" and fastest:
        bound = max(bound, answer.best)
    known = {n: p for n, p in zip(names, places, strict=True) if p in wishes.unexplained}
    report = SearchReport(
        objective=wishes.objective,
        costs=costs.kind,
        slowest=answer.slowest / 1e9,
        bound=min(bound, answer.slowest) / 1e9,
        frontiers=len(answer.frontiers.prefix) - 2,
        exact=sure,
        reasons=_reasons(names, loads, wishes, answer),
        explained={name: 1 - wishes.unexplained[place] for name, place in known.items()},
    )
    return Found(stage_of, places if min(places, default=0) >= 0 else (), names, report)


def _stages(flow: Flow, answer: Answer) -> dict[fx.Node, int]:
    """The stage of every computed node: the first frontier of the chain that holds it."""
    masks = answer.frontiers.masks
    ends = [answer.frontiers.prefix[i] for i in answer.path]
    contiguous = all(end >= 0 for end in ends)
    stage_of: dict[fx.Node, int] = {}
    for position, node in enumerate(flow.nodes):
        if flow.is_computed(node):
            inside = [
                position < end if contiguous else masks[i] >> position & 1
                for end, i in zip(ends, answer.path, strict=True)
            ]
            stage_of[node] = inside.index(True) - 1
    return stage_of


def _reasons(names: Sequence[str], loads: Loads, wishes: Wishes, answer: Answer) -> dict[str, str]:
    """Why each cut is where it is."""
    frontiers = answer.frontiers
    total = max(float(loads.compute.sum()), 1.0)
    reasons = {}
    for name, i in zip(names, answer.path[1:-1], strict=True):
        asked = "asked for; " if frontiers.prefix[i] in wishes.required else ""
        known = wishes.unexplained.get(frontiers.prefix[i])
        learnt = "" if known is None else f"; a source explains {1 - known:.0%} of the gradient"
        crossing = frontiers.member[i] & (frontiers.used[i] < answer.loads.total)
        count, size = int(crossing.sum()), float(answer.loads.nbytes[crossing].sum()) / 1e6
        source = float(answer.loads.source[crossing].sum()) / 1e6
        reasons[name] = (
            f"{asked}{float(frontiers.compute[i]) / total:.0%} of the work is done; {count} "
            f"value{'s'[: count != 1]} of {size:.2f} MB cross{'es'[: 2 * (count == 1)]}, sources "
            f"take {source:.2f} ms{learnt}"
        )
    return reasons


def _too_much(flow: Flow, loads: Loads, wishes: Wishes) -> str:
    """What the cap would have to be, and which stage is the largest."""
    positions = _places(loads, wishes)
    loads = loads.crossing(torch.tensor(positions)) if positions else loads
    frontiers = prefixes(loads, positions)
    pairs = restricted(weigh_pairs(loads, frontiers), loads, frontiers, wishes)
    count = wishes.stages or min(len(frontiers.prefix) - 1, 64)
    least = bottleneck(pairs.memory, (1.0,) * count)
    path = cheapest(pairs.memory, pairs.memory, (1.0,) * count, least)
    i, j = max(pairwise(path), key=lambda step: float(pairs.memory[step]))
    last = len(flow.nodes)
    at = [frontiers.prefix[k] for k in (i, j)]
    start, end = (
        {0: "the inputs", last: "the output"}.get(p) or repr(name_positions(flow, (p,))[0])
        for p in at
    )
    return (
        f"memory_cap={wishes.memory_cap:,.0f} bytes cannot be kept with {count} stages: the stage "
        f"from {start} to {end} needs {least:,.0f} bytes at least, "
        f"{least - wishes.memory_cap:,.0f} too many; raise the cap, ask for more stages, or for "
        "smaller sources (gradients=)"
    )
