"""From what a user wishes to a choice of cuts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from ...errors import CutError, DecouplingError, did_you_mean
from ...graphs.nested import flatten, unpack_batch
from ...plan import CutPlan, SearchReport
from ...sources import SourceFactory
from ..cut.cutting import Flow, assign_by_name, assign_stages, cut_names, find_cuts, legal_positions
from ..cut.insertion import Context, Gradients, infer_context
from .chains import OBJECTIVES, Wishes
from .costing import Costs, Seconds, estimate_costs, given_costs, measure_costs
from .learnability import measure_learnability
from .searching import near_best, search_cuts
from .source_costs import estimate_sources, measure_sources

DEFAULT_STAGES = 4


@dataclass(frozen=True)
class Search:
    """What :func:`dni_fx.plan_cuts` was asked for, checked; its arguments are described there."""

    stages: int | None = None
    objective: str = "throughput"
    costs: str | Mapping[str, Seconds] = "measured"
    bandwidth: float = 1e10
    speeds: Sequence[float] | None = None
    memory_cap: float | None = None
    keep_together: Sequence[str | Sequence[str]] = ()
    never_cut: Sequence[str] = ()
    must_cut: Sequence[str] = ()
    batches: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            hint = did_you_mean(str(self.objective), OBJECTIVES)
            raise DecouplingError(
                f"objective={self.objective!r}: expected one of {', '.join(OBJECTIVES)}{hint}"
            )
        if not isinstance(self.costs, Mapping) and self.costs not in ("measured", "analytic"):
            raise DecouplingError(
                f"costs={self.costs!r}: expected 'measured', 'analytic', or seconds by node or "
                "module name"
            )
        if not _is_positive(self.bandwidth):
            raise DecouplingError(
                f"bandwidth={self.bandwidth!r}: expected bytes per second, more than 0"
            )
        if self.memory_cap is not None and not _is_positive(self.memory_cap):
            raise DecouplingError(f"memory_cap={self.memory_cap!r}: expected bytes, more than 0")
        if self.speeds is not None:
            wrong = [s for s in self.speeds if not _is_positive(s) or not math.isfinite(s)]
            if wrong:
                raise DecouplingError(
                    f"speeds={list(self.speeds)!r}: expected numbers more than 0, found "
                    f"{wrong[0]!r}"
                )
            if self.stages is not None and len(self.speeds) != self.stages:
                raise DecouplingError(
                    f"speeds= has {len(self.speeds)} numbers for stages={self.stages}: one for each"
                )
        if self.objective == "learnability" and (self.batches is None or self.loss is None):
            raise DecouplingError(
                "objective='learnability' needs batches= and loss=, to see true gradients"
            )
        for name in ("keep_together", "never_cut", "must_cut"):
            if isinstance(getattr(self, name), str):
                raise DecouplingError(f"{name}={getattr(self, name)!r}: expected a list of names")

    @property
    def count(self) -> int | None:
        """Stages wanted; None for the fewest under a memory cap."""
        if self.stages is not None:
            return self.stages
        if self.speeds is not None:
            return len(self.speeds)
        fewest = self.objective == "memory" and self.memory_cap is not None
        return None if fewest else DEFAULT_STAGES


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


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


def choose_named(flow: Flow, cuts: tuple[str, ...], lenient: bool = False) -> Choice:
    """Cuts that the user or a plan names; ``lenient`` leaves out those that a later graph lacks."""
    found = find_cuts(flow, cuts, lenient)
    return Choice(assign_stages(flow, tuple(found)), tuple(found.values()))


def choose_assigned(flow: Flow, plan: CutPlan) -> Choice:
    """Stages of a plan that names every node."""
    return Choice(assign_by_name(flow, dict(plan.assignment)), plan.cuts, free=True)


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
    """
    costs = weigh_model(flow, args, kwargs, gradients, context, search)
    wishes = _resolve(flow, search)
    if wishes.objective == "learnability":
        shares = measure_learnability(
            flow,
            search.batches or (),
            search.loss,
            _option_of(flow, gradients),
            context,
            near_best(flow, costs, wishes),
            unpack=unpack_batch,
            watch=_watch(search, "probing gradients"),
        )
        wishes = dataclasses.replace(wishes, unexplained=shares)
    found = search_cuts(flow, costs, wishes)
    free = not found.positions and bool(found.names)
    return Choice(found.stage_of, found.names, free, costs, found.report)


def weigh_model(
    flow: Flow,
    args: Any,
    kwargs: Any,
    gradients: Gradients,
    context: Context | None,
    search: Search,
) -> Costs:
    """Costs of every node and source, as the search asks for them."""
    leaves = flatten((args, kwargs))[0]
    seen = infer_context(context, leaves[0].shape[0] if leaves and leaves[0].dim() else 1)
    option_of = _option_of(flow, gradients)
    if search.costs == "measured":
        sources = measure_sources(flow, option_of, seen)
        return measure_costs(flow, args, kwargs, sources, watch=_watch(search, "measuring"))
    sources = estimate_sources(flow, option_of, seen)
    if isinstance(search.costs, Mapping):
        return given_costs(flow, search.costs, sources)
    return estimate_costs(flow, args, kwargs, sources)


def _watch(search: Search, label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return lambda items: tqdm(items, desc=label, leave=False, disable=not search.progress)


def _option_of(flow: Flow, gradients: Gradients) -> Callable[[fx.Node], str | SourceFactory]:
    if not isinstance(gradients, Mapping):
        return lambda node: gradients
    return lambda node: next(
        (gradients[n] for n in (*flow.names[node], node.name) if n in gradients), "auto"
    )


def _resolve(flow: Flow, search: Search) -> Wishes:
    """Names to positions; every contradiction is gathered into one error."""
    names = cut_names(flow)
    groups, problems = _groups(flow, search, names)
    problems += [
        f"{label}: {n!r}: no module or node of this graph has that name{did_you_mean(n, names)}"
        for label in ("must_cut", "never_cut")
        for n in getattr(search, label)
        if n not in names
    ]
    never = {names[n] for n in search.never_cut if n in names}
    must = {n: names[n] for n in search.must_cut if n in names}
    legal = legal_positions(flow)
    for name, position in must.items():
        problems += _must_problems(flow, name, position, groups, never, legal)
    required = set(must.values())
    if search.count is not None and len(required) >= search.count:
        problems.append(
            f"must_cut names {len(required)} cuts, which make {len(required) + 1} stages, but "
            f"stages={search.count}"
        )
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise CutError(
            f"these wishes cannot be met in {type(flow.trace.model).__name__}:\n{lines}\n"
            "print(dni_fx.list_cut_points(model, example_inputs)) shows the places where it can be "
            "cut"
        )
    torn = {p for g in groups for p in range(g[0] + 1, g[-1] + 1)}
    allowed = tuple(p for p in legal if p not in torn and p not in never)
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
    )


def _groups(
    flow: Flow, search: Search, names: Iterable[str]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Positions of what must stay together, group by group, and what is wrong."""
    groups: list[tuple[int, ...]] = []
    problems: list[str] = []
    known = [*names, *(n for n, _ in flow.trace.model.named_parameters())]
    for item in search.keep_together:
        group: set[int] = set()
        for member in (item,) if isinstance(item, str) else item:
            if not (found := _positions_of(flow, member)):
                problems.append(
                    f"keep_together: {member!r} is no module, node or parameter of this "
                    f"graph{did_you_mean(member, known)}"
                )
            group.update(found)
        if group:
            groups.append(tuple(sorted(group)))
    return groups, problems


def _must_problems(
    flow: Flow,
    name: str,
    position: int,
    groups: Sequence[tuple[int, ...]],
    never: Set[int],
    legal: Sequence[int],
) -> list[str]:
    """Why a cut that must be made cannot be made."""
    if position in never:
        return [f"must_cut and never_cut both name the place after {name!r}"]
    for group in groups:
        if group[0] < position <= group[-1]:
            ends = [flow.nodes[p].name for p in (group[0], group[-1])]
            return [
                f"must_cut: {name!r} lies between nodes that keep_together holds in one stage "
                f"({ends[0]!r} and {ends[1]!r})"
            ]
    return [] if position in legal else [f"must_cut: {e}" for e in _why_not(flow, name)]


def _positions_of(flow: Flow, name: str) -> list[int]:
    """Where a module, a node, or a parameter is used."""
    found = []
    for position, node in enumerate(flow.nodes):
        if flow.is_computed(node):
            fetched = [i for i in node.all_input_nodes if i.op == "get_attr"]
            direct = [p for i in fetched for p in i.meta["parameters"]]
            path = [str(node.target)] if node.op == "call_module" else []
            around = (*node.meta.get("modules", ()), *node.meta.get("parameters", ()))
            if name in (node.name, *path, *around, *direct):
                found.append(position)
    return found


def _why_not(flow: Flow, name: str) -> list[str]:
    try:
        find_cuts(flow, (name,))
    except CutError as error:
        lines = str(error).splitlines()
        return [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    return [f"{name!r} ends no tensor"]
