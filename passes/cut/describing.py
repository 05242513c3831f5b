"""Describes a split model: its plan, with what is known of stages, interfaces, sources and nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...plan import (
    CutPlan,
    Interface,
    NodeReport,
    PlanReport,
    SourceReport,
    StageCost,
    StageReport,
    TensorSpec,
)
from ...sources import SOURCES, GradientSource, InputSource, Served, auto_name, serve
from ..search.choosing import Choice, Context
from ..search.costing import Costs
from .insertion import (
    Gradients,
    Inputs,
    chosen_inputs,
    infer_context,
    make_inputs,
    make_sources,
    resolve_gradients,
)
from .specs import infer_specs

if TYPE_CHECKING:
    from ...graphs.variants import Variant


@dataclass(frozen=True)
class Leaving:
    """How values that leave the graph are served.

    Attributes:
        serve: from an interface and what was asked for to the source that is made.
        context: what those sources see besides.
    """

    serve: Callable[[Interface, Any], Any]
    context: TensorSpec | None


def describe_plan(
    variant: Variant,
    gradients: Gradients,
    inputs: Inputs | None,
    context: Context | None,
    wanted: int | None,
    leaving: Leaving | None = None,
) -> tuple[CutPlan, dict[str, GradientSource], dict[str, InputSource]]:
    """The plan of a split model, the sources of its interfaces, and its synthetic inputs.

    Args:
        variant: the split model.
        gradients: what was asked for.
        inputs: synthetic inputs asked for.
        context: what turns targets into what the sources see.
        wanted: stages that a search was asked for; None where cuts were named.
        leaving: how values that leave the graph are served; None where there are none.
    """
    split, trace, choice = variant.split, variant.trace, variant.choice
    interfaces = split.interfaces
    chosen = resolve_gradients(interfaces, gradients)
    shapes = next(iter(variant.shapes))
    batch = shapes[0][0] if shapes and len(shapes[0]) else 1
    seen = None if leaving is not None else infer_context(context, batch)
    devices = {i.name: variant.parameters[0].device for i in interfaces}
    within = tuple(i for i in interfaces if not i.leaves)
    sources = make_sources(within, chosen, seen, devices)
    if leaving is not None:
        outward = tuple(i for i in interfaces if i.leaves)
        options = {i.name: leaving.serve(i, chosen[i.name]) for i in outward}
        sources = make_sources(outward, options, leaving.context, devices) | sources
    placeholders = [n for n in trace.graph.nodes if n.op == "placeholder"]
    specs = infer_specs(trace)
    predicted = make_inputs(interfaces, inputs, tuple(specs[n.name] for n in placeholders), devices)
    kinds = {n: c if isinstance(c, str) else _own_name(c) for n, c in chosen.items()}
    kinds.update({i.name: auto_name(i.spec, seen) for i in within if kinds[i.name] == "auto"})
    asked = chosen_inputs(interfaces, inputs)
    unlocks = tuple((n, c if isinstance(c, str) else _own_name(c)) for n, c in asked.items())
    notes = [f"{path!r} is one opaque node: {why}" for path, why in trace.opaque.items()]
    notes += trace.notes
    notes += [
        f"parameter {n!r} is shared by stages {', '.join(map(str, w))}" for n, _, w in split.shared
    ]
    if wanted is not None and len(split.stages) < wanted:
        notes.append(
            f"{len(split.stages)} stages instead of {wanted}: the graph has no more legal cuts"
        )
    for name, kind in unlocks:
        count = sum(p.numel() for p in predicted[name].parameters())
        notes.append(f"synthetic input at {name!r}: {kind}, {count:,} parameters")
    if choice.free:
        notes.append(
            "stages are not contiguous in program order: exact mode equals backpropagation within "
            "rounding"
        )
    modules = dict(trace.model.named_modules(remove_duplicate=False))
    served = dict(zip((i.name for i in interfaces), split.crossing, strict=True))
    report = PlanReport(
        rung=trace.rung,
        stages=_stage_reports(variant, served),
        interfaces=interfaces,
        plain=split.plain,
        sources=_source_reports(kinds, serve(interfaces, sources), choice.costs, served),
        notes=tuple(notes),
        exact=variant.exact,
        nodes=_node_reports(variant),
        kinds={
            p: type(modules[p]).__name__
            for n in trace.graph.nodes
            for p in _scope(n)
            if p in modules
        },
        search=choice.search,
    )
    order = sorted(choice.stage_of.items(), key=lambda pair: pair[1]) if choice.free else ()
    assignment = tuple((n.name, k) for n, k in order)
    plan = CutPlan(
        type(trace.model).__name__,
        trace.digest,
        variant.cuts,
        tuple(kinds.items()),
        assignment,
        unlocks,
        report,
    )
    return plan, sources, predicted


def _stage_reports(variant: Variant, served: Mapping[str, str]) -> tuple[StageReport, ...]:
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
            else _stage_cost(choice, choice.costs, s.index, split.interfaces, served),
        )
        for s in split.stages
    )


def _stage_cost(
    choice: Choice,
    costs: Costs,
    index: int,
    interfaces: Sequence[Interface],
    served: Mapping[str, str],
) -> StageCost:
    own = [n.name for n, k in choice.stage_of.items() if k == index]
    total = lambda table: sum(table.get(n, 0) for n in own)  # noqa: E731
    sent = [costs.sources.get(served[i.name], (0, 0)) for i in interfaces if i.producer == index]
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
    served: Mapping[str, str],
) -> dict[str, SourceReport]:
    """One for each interface; those of a shared source after the first count nothing more."""
    found = {}
    for group in groups:
        found[group.name] = _source_report(
            kinds[group.name], group.source, costs, served[group.name]
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


def _own_name(factory: object) -> str:
    """Name of a factory of the user's, which is never that of a built-in source."""
    name = getattr(factory, "__name__", type(factory).__name__)
    return f"{factory.__module__}.{name}" if name in SOURCES else name
