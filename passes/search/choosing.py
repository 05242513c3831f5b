"""From what a user wishes to a choice of cuts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...errors import CutError, DecouplingError, did_you_mean
from ...plan import CutPlan, TensorSpec
from ...sources import EXACT
from ..cut.cutting import (
    Flow,
    assign_by_name,
    assign_stages,
    cut_names,
    find_cuts,
    legal_positions,
    list_cut_points,
    located_points,
    reason_against,
    refused,
)
from ..cut.insertion import Context, Gradients, infer_context
from ..cut.specs import modules_of, parameters_of
from .chains import OBJECTIVES, Wishes
from .costing import Costs, Seconds, estimate_costs, given_costs, measure_costs
from .learnability import measure_learnability
from .searching import Choice, near_best, search_cuts
from .sizing import AUTO, even_share, size_sources
from .source_costs import Option, OptionOf, estimate_sources, measure_sources

_DEFAULT_STAGES = 4
WITHIN = ("modules", "anything")  # where cuts may lie
_POLISH = 1.05  # how much slower the slowest stage may be for cuts between modules


@dataclass(frozen=True)
class Search:
    """What :func:`dni_fx.plan_cuts` was asked for, checked; its arguments are described there."""

    stages: int | None = None
    objective: str = "throughput"
    costs: str | Mapping[str, Seconds] = "analytic"
    bandwidth: float = 1e10
    speeds: Sequence[float] | None = None
    memory_cap: float | None = None
    keep_together: Sequence[str | Sequence[str]] = ()
    never_cut: Sequence[str] = ()
    must_cut: Sequence[str] = ()
    within: str | None = None
    max_values: int | None = None
    batches: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if problem := next(self._problems(), None):
            raise DecouplingError(problem)

    def _problems(self) -> Iterator[str]:
        """What is wrong with one argument, or with two together."""
        if self.objective not in OBJECTIVES:
            hint = did_you_mean(str(self.objective), OBJECTIVES)
            yield f"objective={self.objective!r}: expected one of {', '.join(OBJECTIVES)}{hint}"
        if not isinstance(self.costs, Mapping) and self.costs not in ("measured", "analytic"):
            yield (
                f"costs={self.costs!r}: expected 'measured', 'analytic', or seconds by node or "
                "module name"
            )
        if not _is_positive(self.bandwidth):
            yield f"bandwidth={self.bandwidth!r}: expected bytes per second, more than 0"
        if self.memory_cap is not None and not _is_positive(self.memory_cap):
            yield f"memory_cap={self.memory_cap!r}: expected bytes, more than 0"
        given: Any = self.speeds
        if not isinstance(given, Collection | None):
            yield f"speeds={given!r}: expected a list of numbers, one for each stage"
        speeds = self.speeds or ()
        if wrong := [s for s in speeds if not _is_positive(s) or not math.isfinite(s)]:
            yield f"speeds={list(speeds)!r}: expected numbers more than 0, found {wrong[0]!r}"
        if self.speeds is not None and self.stages not in (None, len(speeds)):
            yield f"speeds= has {len(speeds)} numbers for stages={self.stages}: one for each"
        if self.objective == "learnability" and (self.batches is None or self.loss is None):
            yield "objective='learnability' needs batches= and loss=, to see true gradients"
        yield from check_within(self.within)
        if self.max_values is not None and (
            type(self.max_values) is not int or self.max_values < 1
        ):
            yield f"max_values={self.max_values!r}: expected a whole number, at least 1"
        for name in ("keep_together", "never_cut", "must_cut"):
            names = getattr(self, name)
            if not _are_names(names, groups=name == "keep_together"):
                yield f"{name}={names!r}: expected a list of names"

    @property
    def count(self) -> int | None:
        """Stages wanted; None for the fewest under a memory cap."""
        if self.stages is not None:
            return self.stages
        if self.speeds is not None:
            return len(self.speeds)
        fewest = self.objective == "memory" and self.memory_cap is not None
        return None if fewest else _DEFAULT_STAGES


def check_within(within: Any) -> Iterator[str]:
    """What is wrong with a ``within=``."""
    if within is not None and within not in WITHIN:
        known = ", ".join(map(repr, WITHIN))
        yield f"within={within!r}: expected {known}{did_you_mean(str(within), WITHIN)}"


def _are_names(value: Any, *, groups: bool = True) -> bool:
    """Whether it is a collection of names, or of groups of names."""
    if isinstance(value, str) or not isinstance(value, Collection):
        return False
    return all(isinstance(n, str) or (groups and _are_names(n, groups=False)) for n in value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def follow(flow: Flow, cuts: tuple[str, ...] | CutPlan, lenient: bool = False) -> Choice:
    """Named cuts, or those of a plan; ``lenient`` leaves out those that a later graph lacks."""
    if isinstance(cuts, CutPlan) and cuts.assignment:
        return Choice(assign_by_name(flow, dict(cuts.assignment)), cuts.cuts, free=True)
    found = find_cuts(flow, cuts.cuts if isinstance(cuts, CutPlan) else cuts, lenient)
    return Choice(assign_stages(flow, tuple(found)), tuple(found.values()))


def choose_best(
    flow: Flow,
    args: Any,
    kwargs: Any,
    gradients: Gradients,
    context: Context | None,
    search: Search,
) -> Choice:
    """Search for the best cuts.

    Raises:
        CutError: names that do not exist, wishes that contradict each other, a memory cap that
            cannot be kept.
        DecouplingError: learnability of exact gradients.
    """
    is_exact = gradients in EXACT
    if is_exact and search.objective == "learnability":
        raise DecouplingError(
            "objective='learnability' asks how well sources predict gradients, but gradients="
            f"{gradients!r} predicts none: leave out one of them"
        )
    costs = weigh_model(flow, args, kwargs, gradients, context, search)
    bound = search.within == "modules" or search.max_values is not None  # to places in that order
    wishes = dataclasses.replace(_resolve(flow, search), in_order=is_exact or bound)
    if wishes.objective == "learnability":
        shares = measure_learnability(
            flow,
            search.batches or (),
            search.loss,
            _option_of(flow, gradients),
            context,
            near_best(flow, costs, wishes),
            progress=search.progress,
        )
        wishes = dataclasses.replace(wishes, unexplained=shares)
    return search_cuts(flow, costs, wishes)


def weigh_model(
    flow: Flow,
    args: Any,
    kwargs: Any,
    gradients: Gradients,
    context: Context | None,
    search: Search,
) -> Costs:
    """Costs of every node and source, as the search asks for them. ``"auto"`` is what it would be
    if all stages took the same time.
    """
    seen = infer_context(context, flow.inputs)
    asked = _option_of(flow, gradients)
    estimated = estimate_costs(flow, args, kwargs, {}, progress=search.progress)
    stage = even_share(flow, estimated, search.count or _DEFAULT_STAGES)

    @functools.cache
    def sized(spec: TensorSpec) -> str:
        return size_sources((spec,), seen, stage)[0].option

    def option_of(node: fx.Node) -> Option:
        option = asked(node)
        return sized(flow.specs[node.name]) if option == AUTO else option

    if search.costs == "measured":
        sources = measure_sources(flow, option_of, seen)
        return measure_costs(flow, args, kwargs, sources, progress=search.progress)
    sources = estimate_sources(flow, option_of, seen)
    if isinstance(search.costs, Mapping):
        return given_costs(flow, search.costs, sources)
    return dataclasses.replace(estimated, sources=sources)


def _option_of(flow: Flow, gradients: Gradients) -> OptionOf:
    if not isinstance(gradients, Mapping):
        return lambda node: gradients
    return lambda node: next(
        (gradients[n] for n in (*flow.names[node], node.name) if n in gradients), "auto"
    )


def _resolve(flow: Flow, search: Search) -> Wishes:
    """Names to positions; every contradiction is gathered into one error."""
    names, legal = cut_names(flow), legal_positions(flow)
    groups, problems = _together(flow, search, names)
    never = {names[n] for n in search.never_cut if n in names}
    problems += [
        f"never_cut: {n!r}: {reason_against(flow, n, names)}"
        for n in search.never_cut
        if n not in names
    ]
    for name in search.must_cut:
        position = names.get(name, 0)
        around = next((g for g in groups if g[0] < position <= g[-1]), None)
        if position in never:
            problems.append(f"must_cut and never_cut both name the place after {name!r}")
        elif around:
            first, last = (flow.nodes[p].name for p in (around[0], around[-1]))
            problems.append(
                f"must_cut: {name!r} lies between nodes that keep_together holds in one stage "
                f"({first!r} and {last!r})"
            )
        elif position not in legal:
            why = reason_against(flow, name, names) or "ends no tensor"
            problems.append(f"must_cut: {name!r}: {why}")
    required = {names[n] for n in search.must_cut if n in names}
    if search.count is not None and len(required) >= search.count:
        problems.append(
            f"must_cut names {len(required)} cuts, which make {len(required) + 1} stages, but "
            f"stages={search.count}"
        )
    if problems:
        raise refused(flow, "these wishes cannot be met", problems)
    torn = {p for g in groups for p in range(g[0] + 1, g[-1] + 1)}
    fit = _fitting(flow, search) | required
    allowed = tuple(p for p in legal if p not in torn and p not in never and p in fit)
    if not allowed and legal:
        raise CutError(_none_left(flow, search))
    count = None if search.count is None else min(search.count, len(allowed) + 1)
    if search.speeds is not None and count != len(search.speeds):
        raise CutError(
            f"speeds= names {len(search.speeds)} stages, but the graph has {len(allowed)} places "
            f"to cut at, for {len(allowed) + 1} stages"
        )
    return Wishes(
        stages=count,
        objective=search.objective,
        bandwidth=search.bandwidth,
        speeds=tuple(search.speeds or ()),
        memory_cap=math.inf if search.memory_cap is None else search.memory_cap,
        allowed=allowed,
        required=tuple(sorted(required)),
        together=tuple(groups),
        tidy=frozenset(names[path] for path, _, _ in flow.trace.calls if path in names),
        polish=1.0 if search.within == "anything" else _POLISH,
    )


def _fitting(flow: Flow, search: Search) -> set[int]:
    """Positions that lie between modules, and where few enough values cross, as it is asked."""
    most = math.inf if search.max_values is None else search.max_values
    return {
        position
        for position, point in located_points(flow)
        if point.interfaces <= most and (point.ends_module or search.within != "modules")
    }


def _none_left(flow: Flow, search: Search) -> str:
    points = [p for p in list_cut_points(flow) if p.legal]
    if search.within == "modules":
        points = [p for p in points if p.ends_module] or points
    narrowest = min(points, key=lambda p: p.interfaces)
    return (
        f"never_cut=, keep_together=, within={search.within!r} and max_values={search.max_values} "
        f"leave no place to cut {type(flow.trace.model).__name__} at: loosen one of them (at the "
        f"narrowest legal place, after {narrowest.name!r}, cross {narrowest.interfaces})"
    )


def _together(
    flow: Flow, search: Search, names: Iterable[str]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Positions of what must stay in one stage, group by group, and what is wrong."""
    known = [*names, *(n for n, _ in flow.trace.model.named_parameters())]
    groups: list[tuple[int, ...]] = []
    problems: list[str] = []
    for item in search.keep_together:
        members = (item,) if isinstance(item, str) else item
        found = {member: _positions_of(flow, member) for member in members}
        problems += [
            f"keep_together: {member!r} is no module, node or parameter of this graph"
            f"{did_you_mean(member, known)}"
            for member, positions in found.items()
            if not positions
        ]
        if group := sorted({p for positions in found.values() for p in positions}):
            groups.append(tuple(group))
    return groups, problems


def _positions_of(flow: Flow, name: str) -> list[int]:
    """Where a module, a node, or a parameter is used."""
    return [
        position
        for position, node in enumerate(flow.nodes)
        if flow.is_computed(node) and name in (node.name, *modules_of(node), *parameters_of(node))
    ]
