"""Describes a split model: its plan, what is known of stages, interfaces, sources and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ...graphs.variants import Variant
from ...plan import (
    CutPlan,
    Interface,
    NodeReport,
    PlanReport,
    SourceReport,
    StageCost,
    StageReport,
)
from ...sources import GradientSource, Served, serve
from ..search.searching import Choice
from ..search.costing import Costs
from .insertion import Inserted


def describe_plan(variant: Variant, inserted: Inserted, wanted: int | None) -> CutPlan:
    """The plan of a split model.

    Args:
        variant: the split model.
        inserted: the sources of its interfaces.
        wanted: stages that a search was asked for; None where cuts were named.
    """
    split, trace, choice = variant.split, variant.trace, variant.choice
    node_of = dict(zip((i.name for i in split.interfaces), split.crossing, strict=True))
    groups = serve(split.interfaces, inserted.gradients)
    modules = dict(trace.model.named_modules(remove_duplicate=False))
    ran = [path for node in trace.graph.nodes for path in _scope(node) if path in modules]
    report = PlanReport(
        rung=trace.rung,
        stages=_stage_reports(variant, node_of),
        interfaces=split.interfaces,
        plain=split.plain,
        sources=_source_reports(inserted.kinds, groups, choice.costs, node_of),
        notes=_notes(variant, inserted, wanted),
        exact=variant.exact,
        nodes=_node_reports(variant),
        kinds={path: type(modules[path]).__name__ for path in ran},
        search=choice.search,
    )
    order = sorted(choice.stage_of.items(), key=lambda pair: pair[1]) if choice.free else ()
    return CutPlan(
        model=type(trace.model).__name__,
        digest=trace.digest,
        cuts=choice.cuts,
        gradients=tuple(inserted.kinds.items()),
        assignment=tuple((node.name, stage) for node, stage in order),
        inputs=tuple(inserted.unlocks.items()),
        report=report,
    )


def _notes(variant: Variant, inserted: Inserted, wanted: int | None) -> tuple[str, ...]:
    """What a reader of the plan should know."""
    split, trace = variant.split, variant.trace
    notes = [f"{path!r} is one opaque node: {why}" for path, why in trace.opaque.items()]
    notes += trace.notes
    notes += [
        f"parameter {n!r} is shared by stages {', '.join(map(str, w))}" for n, _, w in split.shared
    ]
    if wanted is not None and len(split.stages) < wanted:
        notes.append(
            f"{len(split.stages)} stages instead of {wanted}: the graph has no more legal cuts"
        )
    for name, kind in inserted.unlocks.items():
        count = sum(p.numel() for p in inserted.inputs[name].parameters())
        notes.append(f"synthetic input at {name!r}: {kind}, {count:,} parameters")
    if variant.choice.free:
        notes.append(
            "stages are not contiguous in program order: exact mode equals backpropagation within "
            "rounding"
        )
    return tuple(notes)


def _stage_reports(variant: Variant, node_of: Mapping[str, str]) -> tuple[StageReport, ...]:
    split, choice = variant.split, variant.choice
    counts = {n: p.numel() for n, p in variant.trace.model.named_parameters()}
    modules = _whole_modules(variant)
    return tuple(
        StageReport(
            name=f"stage_{s.index}",
            nodes=s.nodes,
            parameters=sum(counts[p] for p in s.parameters),
            cut=variant.cuts[s.index] if s.index < len(variant.cuts) else None,
            inputs=s.inputs,
            modules=modules.get(s.index, ()),
            cost=None
            if choice.costs is None
            else _stage_cost(choice, choice.costs, s.index, split.interfaces, node_of),
        )
        for s in split.stages
    )


def _stage_cost(
    choice: Choice,
    costs: Costs,
    index: int,
    interfaces: Sequence[Interface],
    node_of: Mapping[str, str],
) -> StageCost:
    own = [n.name for n, k in choice.stage_of.items() if k == index]
    total = lambda table: sum(table.get(n, 0) for n in own)  # noqa: E731
    sent = [costs.sources.get(node_of[i.name], (0, 0)) for i in interfaces if i.producer == index]
    received = sum(i.spec.nbytes for i in interfaces if index in i.consumers)
    return StageCost(
        forward=total(costs.forward) / 1e9,
        backward=total(costs.backward) / 1e9,
        update=total(costs.update) / 1e9,
        sources=sum(s for s, _ in sent) / 1e9,
        parameter_bytes=total(costs.parameter_bytes),
        activation_bytes=total(costs.activation_bytes) + received,
        source_bytes=sum(b for _, b in sent),
    )


def _source_reports(
    kinds: Mapping[str, str],
    groups: Sequence[Served],
    costs: Costs | None,
    node_of: Mapping[str, str],
) -> dict[str, SourceReport]:
    """One for each interface; those of a shared source after the first count nothing more."""
    found = {}
    for group in groups:
        found[group.name] = _source_report(
            kinds[group.name], group.source, costs, node_of[group.name]
        )
        for name in group.names[1:]:
            found[name] = SourceReport(f"with {group.name}", 0, 0, None if costs is None else 0.0)
    return found


def _source_report(
    kind: str, source: GradientSource, costs: Costs | None, node: str
) -> SourceReport:
    try:
        flops = source.flops()
    except Exception:  # a source of the user's own that cannot run without data
        flops = None
    seconds = None if costs is None else costs.sources.get(node, (0, 0))[0] / 1e9
    return SourceReport(kind, sum(p.numel() for p in source.parameters()), flops, seconds)


def _scope(node: fx.Node) -> tuple[str, ...]:
    own = (str(node.target),) if node.op == "call_module" else ()
    return tuple(p for p in dict.fromkeys((*node.meta.get("modules", ()), *own)) if p)


def _whole_modules(variant: Variant) -> dict[int, tuple[str, ...]]:
    """The largest modules that lie wholly in one stage, in program order."""
    where: dict[str, set[int]] = {}
    for node, stage in variant.choice.stage_of.items():
        for path in _scope(node):
            where.setdefault(path, set()).add(stage)
    found: dict[int, dict[str, None]] = {}
    for node, stage in variant.choice.stage_of.items():
        largest = next((p for p in _scope(node) if len(where[p]) == 1), None)
        if largest is not None:
            found.setdefault(stage, {})[largest] = None
    return {stage: tuple(paths) for stage, paths in found.items()}


def _node_reports(variant: Variant) -> tuple[NodeReport, ...]:
    costs, trace = variant.choice.costs, variant.trace
    looked_at = {node for node, _ in trace.guards}
    reports = []
    for node in trace.graph.nodes:
        if node.op == "get_attr" or (node in looked_at and not node.users):
            continue
        value = node.meta.get("value")
        operator = {"placeholder": "input", "output": "output"}.get(node.op, "")
        if node.op == "call_module":
            operator = type(trace.attributes[str(node.target)]).__name__
        elif not operator:
            operator = str(getattr(node.target, "__name__", node.target))
        reports.append(
            NodeReport(
                name=node.name,
                operator=operator,
                scope=_scope(node),
                inputs=tuple(i.name for i in node.all_input_nodes if i.op != "get_attr"),
                shape=tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else (),
                stage=variant.choice.stage_of.get(node),
                seconds=None
                if costs is None or node not in variant.choice.stage_of
                else costs.seconds(node.name),
            )
        )
    return tuple(reports)
