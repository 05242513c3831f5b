"""Describes a split model: its plan, what is known of stages, interfaces, sources and nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from ..passes.cut.insertion import Inserted
from ..passes.cut.specs import infer_specs, modules_of
from ..passes.search.costing import Costs
from ..plan import CutPlan, Interface, NodeReport, PlanReport, SourceReport, StageCost, StageReport
from ..sources import serve
from .variants import Variant


def describe_plan(
    variant: Variant, inserted: Inserted, wanted: int | None, remarks: Iterable[str] = ()
) -> CutPlan:
    """The plan of a split model.

    Args:
        variant: the split model.
        inserted: the sources of its interfaces.
        wanted: stages that a search was asked for; None where cuts were named.
        remarks: what there is to say of the sources.
    """
    split, trace, choice = variant.split, variant.trace, variant.choice
    modules = dict(trace.model.named_modules(remove_duplicate=False))
    ran = [path for node in trace.graph.nodes for path in modules_of(node) if path in modules]
    report = PlanReport(
        rung=trace.rung,
        stages=_stage_reports(variant),
        interfaces=split.interfaces,
        plain=split.plain,
        sources=_source_reports(variant, inserted),
        notes=(*_notes(variant, inserted, wanted), *remarks),
        exact=variant.exact,
        nodes=_node_reports(variant),
        kinds={path: type(modules[path]).__name__ for path in ran},
        search=choice.search,
        input_bytes=_input_bytes(variant),
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


def weighed(plan: CutPlan, variant: Variant, costs: Costs) -> CutPlan:
    """The same plan, with what its stages cost for the batch that the variant was made for."""
    report = plan.report
    assert report is not None
    rows = [
        dataclasses.replace(row, cost=_stage_cost(variant, costs, k))
        for k, row in enumerate(report.stages)
    ]
    found = dataclasses.replace(report, stages=tuple(rows), input_bytes=_input_bytes(variant))
    return dataclasses.replace(plan, report=found)


def _input_bytes(variant: Variant) -> int:
    specs = infer_specs(variant.trace)
    return sum(specs[n].nbytes for n in variant.split.model_inputs if n in specs)


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


def _stage_reports(variant: Variant) -> tuple[StageReport, ...]:
    costs = variant.choice.costs
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
            cost=None if costs is None else _stage_cost(variant, costs, s.index),
        )
        for s in variant.split.stages
    )


def _stage_cost(variant: Variant, costs: Costs, index: int) -> StageCost:
    own = [n.name for n, k in variant.choice.stage_of.items() if k == index]
    total = lambda table: sum(table.get(n, 0) for n in own)  # noqa: E731
    sent = [costs.sources.get(n, (0, 0)) for n, i in _crossing(variant) if i.producer == index]
    received = sum(i.spec.nbytes for i in variant.split.interfaces if index in i.consumers)
    return StageCost(
        forward=total(costs.forward) / 1e9,
        backward=total(costs.backward) / 1e9,
        update=total(costs.update) / 1e9,
        sources=sum(s for s, _ in sent) / 1e9,
        parameter_bytes=total(costs.parameter_bytes),
        activation_bytes=total(costs.activation_bytes) + received,
        source_bytes=sum(b for _, b in sent),
        frozen_bytes=total(costs.frozen_bytes),
    )


def _crossing(variant: Variant) -> Iterable[tuple[str, Interface]]:
    """Every interface, with its node's name."""
    return zip(variant.split.crossing, variant.split.interfaces, strict=True)


def _source_reports(variant: Variant, inserted: Inserted) -> dict[str, SourceReport]:
    """One for each interface; those of a shared source after the first count nothing more."""
    costs = variant.choice.costs
    node_of = {interface.name: node for node, interface in _crossing(variant)}
    found = {}
    for group in serve(variant.split.interfaces, inserted.gradients):
        first, others = group.names[0], group.names[1:]
        try:
            flops = group.source.flops()
        except Exception:  # a source of the user's own that cannot run without data
            flops = None
        seconds = None if costs is None else costs.sources.get(node_of[first], (0, 0))[0] / 1e9
        count = sum(p.numel() for p in group.source.parameters())
        found[first] = SourceReport(inserted.kinds[first], count, flops, seconds)
        nothing = SourceReport(f"with {first}", 0, 0, None if costs is None else 0.0)
        found.update(dict.fromkeys(others, nothing))
    return found


def _whole_modules(variant: Variant) -> dict[int, tuple[str, ...]]:
    """The largest modules that lie wholly in one stage, in program order."""
    stage_of = variant.choice.stage_of
    where: dict[str, set[int]] = {}
    for node, stage in stage_of.items():
        for path in modules_of(node):
            where.setdefault(path, set()).add(stage)
    found: dict[int, dict[str, None]] = {}
    for node, stage in stage_of.items():
        largest = next((p for p in modules_of(node) if len(where[p]) == 1), None)
        if largest is not None:
            found.setdefault(stage, {})[largest] = None
    return {stage: tuple(paths) for stage, paths in found.items()}


def _node_reports(variant: Variant) -> tuple[NodeReport, ...]:
    trace, choice = variant.trace, variant.choice
    looked_at = {node for node, _ in trace.guards}
    reports = []
    for node in trace.graph.nodes:
        if node.op == "get_attr" or (node in looked_at and not node.users):
            continue
        value = node.meta.get("value")
        operator = {"placeholder": "input", "output": "output"}.get(node.op, "")
        if node.op == "call_module":
            operator = type(trace.attributes[str(node.target)]).__name__
        weighed = choice.costs if node in choice.stage_of else None
        reports.append(
            NodeReport(
                name=node.name,
                operator=operator or str(getattr(node.target, "__name__", node.target)),
                scope=modules_of(node),
                inputs=tuple(i.name for i in node.all_input_nodes if i.op != "get_attr"),
                shape=tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else (),
                stage=choice.stage_of.get(node),
                seconds=None if weighed is None else weighed.seconds(node.name),
            )
        )
    return tuple(reports)
