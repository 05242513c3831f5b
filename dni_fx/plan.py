"""Plans: where to cut which graph, and which sources to put there.

What is known about a plan's graph, its ``report``, consists of the values of
:mod:`dni_fx.reports.plans`, which can be imported from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from .errors import DecouplingError
from .reports import plan_tables
from .reports.plans import CutPoint as CutPoint
from .reports.plans import Interface as Interface
from .reports.plans import NodeReport as NodeReport
from .reports.plans import PlanReport as PlanReport
from .reports.plans import SearchReport as SearchReport
from .reports.plans import SourceReport as SourceReport
from .reports.plans import StageCost as StageCost
from .reports.plans import StageReport as StageReport
from .reports.plans import TensorSpec as TensorSpec
from .reports.tables import table


@dataclass(frozen=True)
class CutPlan:
    """Where to cut which graph, and which sources to put there: names and options only.

    Attributes:
        model: class name of the model.
        digest: hash of the traced graph's nodes, operators and edges.
        cuts: names of the cuts in program order; n cuts make n + 1 stages.
        gradients: source name by interface name (the name of the class for a factory).
        assignment: the stage of every node by name, where stages are not contiguous in program
            order; else empty.
        inputs: name of the synthetic input by interface name, where one was asked for.
        report: what is known about the plan's graph; None for a plan read from JSON.
    """

    model: str
    digest: str
    cuts: tuple[str, ...]
    gradients: tuple[tuple[str, str], ...] = ()
    assignment: tuple[tuple[str, int], ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    report: PlanReport | None = field(default=None, compare=False, repr=False)

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """Values that carry a gradient across a cut."""
        return self._report.interfaces

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """A row for each stage."""
        return self._report.stages

    @property
    def _report(self) -> PlanReport:
        if self.report is None:
            raise DecouplingError(
                "this plan was read from JSON and holds names only; pass it to decouple(cuts=plan)"
            )
        return self.report

    def to_json(self) -> str:
        """The plan as readable JSON text."""
        content = {
            "format": "dni_fx cut plan",
            "version": 1,
            "model": self.model,
            "digest": self.digest,
            "cuts": list(self.cuts),
            "gradients": dict(self.gradients),
        }
        if self.inputs:
            content["inputs"] = dict(self.inputs)
        if self.assignment:
            content["stages"] = [
                [n for n, k in self.assignment if k == s] for s in range(len(self.cuts) + 1)
            ]
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CutPlan:
        """Read what ``to_json`` wrote.

        Raises:
            DecouplingError: no JSON, another format or version, or fields of the wrong type.
        """
        try:
            content = json.loads(text)
        except (ValueError, TypeError) as error:
            raise DecouplingError(f"a cut plan must be JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != "dni_fx cut plan":
            raise DecouplingError(
                "this JSON is no dni_fx cut plan: its 'format' is not 'dni_fx cut plan'"
            )
        if content.get("version") != 1:
            raise DecouplingError(
                f"this cut plan has version {content.get('version')!r}; this dni_fx reads version 1"
            )
        if not _is_valid(content):
            raise DecouplingError(
                "a cut plan needs 'model' and 'digest' (text), 'cuts' (a list of names) and "
                "'gradients' (name: source); where they are there, 'inputs' (name: synthesizer) "
                "and 'stages' (node names for each)"
            )
        stages = enumerate(content.get("stages", []))
        return cls(
            model=content["model"],
            digest=content["digest"],
            cuts=tuple(content["cuts"]),
            gradients=tuple(content.get("gradients", {}).items()),
            assignment=tuple((name, k) for k, names in stages for name in names),
            inputs=tuple(content.get("inputs", {}).items()),
        )

    def draw(self, path: str | Path) -> Path:
        """Draw the graph: modules coloured by stage, cuts as thick labelled edges.

        Args:
            path: file to write, ``.html`` (one page that needs nothing else, with tables) or
                ``.svg``.

        Returns:
            The path.

        Raises:
            DecouplingError: a plan read from JSON, another suffix, or a folder that does not exist.
        """
        from .drawing import draw_plan

        return draw_plan(self, path)

    def __str__(self) -> str:
        cuts = len(self.cuts)
        size = f"{cuts + 1} stage{'s'[: cuts > 0]}, {cuts} cut{'s'[: cuts != 1]}"
        head = f"{self.model}: {size}, graph {self.digest}"
        if self.report is None:
            return "\n".join([head, *(f"  after {c}" for c in self.cuts)])
        stages = table(plan_tables.stage_rows(self.report))
        interfaces = table(plan_tables.interface_rows(self.report))
        lines = plan_tables.notes(self.report)
        notes = [n if n.startswith("baked in: ") else f"note: {n}" for n in lines]
        return "\n".join([head, "", *stages, "", *interfaces, "", *notes])


def _is_valid(content: dict[str, Any]) -> bool:
    """Whether a plan's JSON has every field, each of its type."""
    cuts, stages = content.get("cuts"), content.get("stages", [])
    return (
        isinstance(content.get("model"), str)
        and isinstance(content.get("digest"), str)
        and _are_texts(cuts)
        and _are_named(content.get("gradients", {}))
        and _are_named(content.get("inputs", {}))
        and isinstance(stages, list)
        and len(stages) in (0, len(cuts) + 1)
        and all(_are_texts(names) for names in stages)
    )


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


class CutPointList(tuple[CutPoint, ...]):
    """Cut points in program order; prints as a table."""

    def __str__(self) -> str:
        rows = [("cut after", "shape", "MB", "interfaces", "crosses", "")]
        for point in self:
            more = len(point.crossing) - 3
            crossing = ", ".join(point.crossing[:3]) + (f" and {more} more" if more > 0 else "")
            shape = " x ".join(str(size) for size in point.shape) or "-"
            note = "" if point.legal else f"illegal: {point.reason}"
            size, interfaces = f"{point.nbytes / 1e6:.2f}", str(point.interfaces)
            rows.append((point.name, shape, size, interfaces, crossing, note))
        return "\n".join(table(rows))
