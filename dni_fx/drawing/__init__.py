"""Draws a plan: modules as boxes, stages side by side, interfaces as thick labelled lines between
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..errors import DecouplingError
from ..reports.files import write_atomically
from ..reports.plan_tables import interface_rows, notes, stage_rows
from ..reports.plans import PlanReport
from .boxes import Box
from .page import render
from .routing import route
from .shapes import COLOURS, PLAIN, colour_of
from .views import View, Views


class Plan(Protocol):
    """What is drawn of a :class:`dni_fx.CutPlan`."""

    @property
    def model(self) -> str:
        """Class name of the model."""

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the cuts."""

    @property
    def report(self) -> PlanReport | None:
        """What is known about the plan's graph."""


def draw_plan(plan: Plan, path: str | Path) -> Path:
    """Draw a plan: the graph's modules coloured by stage, and what crosses between the stages.

    As many levels of modules are shown as give at most about 60 boxes; on a page the others open at
    a click.

    Args:
        plan: from ``plan_cuts`` or ``Decoupled.plan``.
        path: file to write, ``.html`` (one page that needs nothing else, with tables) or ``.svg``.

    Returns:
        The path.

    Raises:
        DecouplingError: a plan without its graph, such as one read from JSON; another suffix, or a
            file that cannot be written; Jinja is not installed.
    """
    path = Path(path)
    if plan.report is None or not plan.report.nodes:
        raise DecouplingError(
            "this plan holds names only, as after from_json, so there is no graph to draw; make it "
            "anew with dni_fx.plan_cuts, or decouple the model with it and draw decoupled.plan"
        )
    if path.suffix not in (".html", ".svg"):
        raise DecouplingError(f"cannot draw to {str(path)!r}: its name must end in .html or .svg")
    pieces = render(**_facts(plan, plan.report, path.suffix == ".html"))
    return write_atomically(path, "".join(pieces))


def _facts(plan: Plan, report: PlanReport, page: bool) -> dict[str, Any]:
    """What the templates need."""
    views = Views(report)
    whole = views.whole()
    items = [i for p in whole.panels for i in p.items]
    facts: dict[str, Any] = {
        "page": page,
        "main": route(whole.panels, whole.links),
        "most": max((i.share or 0.0 for i in items), default=0.0),
        "head": _head(plan, report),
        "legend": _legend(report, whole, page),
    }
    if page:
        stages, interfaces = stage_rows(report), interface_rows(report)
        producers = [i.producer for i in report.interfaces]
        facts["stages"] = stages[0], list(enumerate(stages[1:]))
        facts["interfaces"] = interfaces[0], list(zip(producers, interfaces[1:], strict=True))
        facts["notes"] = notes(report)
        facts["folded"] = [_folded(views, anchor, box) for anchor, box in whole.folded]
    return facts


def _folded(views: Views, anchor: str, box: Box) -> dict[str, Any]:
    """A box that opens: its own picture, and the boxes in it that open."""
    view = views.inside(box)
    kind, stage = views.nodes.kind(box), views.report.stages[box.stage].name
    return {
        "anchor": anchor,
        "title": f"{box.name}: {kind}, {len(box.nodes)} nodes, {stage}",
        "stage": box.stage,
        "picture": route(view.panels, ()),
        "inner": [_folded(views, name, part) for name, part in view.folded],
    }


def _head(plan: Plan, report: PlanReport) -> list[str]:
    stages, cuts = len(report.stages), len(plan.cuts)
    lines = [f"{plan.model}: {stages} stage{'s'[: stages > 1]}, {cuts} cut{'s'[: cuts != 1]}"]
    costs = [s.cost.seconds for s in report.stages if s.cost is not None]
    if (search := report.search) is not None:
        lines.append(
            f"cut for {search.objective} with {search.costs} costs; slowest stage "
            f"{search.slowest * 1e3:.3g} ms, bound {search.bound * 1e3:.3g} ms, gap "
            f"{search.gap:.1%}"
        )
    elif costs:
        slowest = costs.index(max(costs))
        lines.append(
            f"cuts as given; slowest stage {report.stages[slowest].name}, "
            f"{costs[slowest] * 1e3:.3g} ms"
        )
    else:
        lines.append("cuts as given; costs not asked for")
    return lines


def _legend(report: PlanReport, whole: View, page: bool) -> list[dict[str, str]]:
    entries = [
        {"kind": "stage", "colour": colour_of(k), "text": s.name}
        for k, s in enumerate(report.stages)
    ]
    if any(link.label for link in whole.links):
        text = "interface, in its stage's colour"
        entries.append({"kind": "link", "colour": COLOURS[0], "text": text})
    if any(not link.label for link in whole.links):
        entries.append({"kind": "plain", "colour": PLAIN, "text": "crosses without gradient"})
    entries.append({"kind": "thread", "colour": PLAIN, "text": "value inside a stage"})
    if whole.folded:
        text = "several nodes" + (": click to open" if page else "")
        entries.append({"kind": "folded", "text": text})
    if any(i.share is not None for p in whole.panels for i in p.items):
        entries.append({"kind": "share", "text": "%: share of the time of all nodes"})
    return entries
