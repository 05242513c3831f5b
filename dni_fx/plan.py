"""Plans as frozen values: what crosses a cut, which stages there are, and what was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import DecouplingError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor of the example batch.

    Attributes:
        shape: sizes of the example, batch dimension first unless ``batch_dim`` says otherwise.
        dtype: element type.
        feature_dim: 1 for convolutional maps ``(batch, channels, *space)``, -1 for ``(batch, ...,
            features)``.
        batch_dim: dimension of the batch in the state of a recurrent model; 0 for everything else.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    feature_dim: int = -1
    batch_dim: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Interface:
    """One float tensor on a trainable path that crosses from its producer stage to its consumer
    stages.

    Attributes:
        name: module path where the value is that module's output, else the node's name.
        spec: shape and dtype of the example.
        producer: index of the stage that computes the value.
        consumers: indices of the stages that use it, ascending.
        implied: True where the value crosses a cut that was not named after it.
        aliases: other names of the same value, which mappings may use as well.
        feeds: the model input that takes the value in the next window (the consumers are then
            stages of that one), or ``"another network"``; None for what stays within one call.
    """

    name: str
    spec: TensorSpec
    producer: int
    consumers: tuple[int, ...]
    implied: bool = False
    aliases: tuple[str, ...] = ()
    feeds: str | None = None

    @property
    def leaves(self) -> bool:
        """Whether the value goes to the next window or to another network."""
        return self.feeds is not None


@dataclass(frozen=True)
class CutPoint:
    """A place where a model can be named to be cut.

    Attributes:
        name: what to pass in ``cuts``.
        shape: shape of the example value that the cut is named after (or of the last one that
            crosses).
        nbytes: bytes that would cross, for the example batch.
        crossing: names of all values that would cross.
        interfaces: how many of them carry a gradient.
        legal: whether a cut may be made there.
        reason: why not, else empty.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    crossing: tuple[str, ...]
    interfaces: int
    legal: bool
    reason: str = ""


@dataclass(frozen=True)
class StageCost:
    """What one stage costs for one batch of the example's size, on a device of speed 1.

    Attributes:
        forward: seconds of the stage's own forward.
        backward: seconds of its backward, gradients of parameters included.
        update: seconds of its optimiser.
        sources: seconds of the sources that it asks: prediction, and regression when the target
            arrives.
        parameter_bytes: its parameters, their gradients and Adam's two moments.
        activation_bytes: what its forward keeps for its backward, received values included.
        source_bytes: its sources' parameters, gradients and moments, and what they keep.
    """

    forward: float
    backward: float
    update: float = 0.0
    sources: float = 0.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    source_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Everything that the stage computes in one decoupled step."""
        return self.forward + self.backward + self.update + self.sources

    @property
    def nbytes(self) -> int:
        """All memory that the stage needs in a decoupled step."""
        return self.parameter_bytes + self.activation_bytes + self.source_bytes


@dataclass(frozen=True)
class StageReport:
    """One row of a plan's stages.

    Attributes:
        name: ``stage_0``, ``stage_1``, ...
        nodes: number of graph nodes.
        parameters: number of parameter elements.
        cut: the cut that ends it; None for the last one.
        inputs: names of model inputs and of earlier stages' values that it takes.
        modules: paths of the largest modules that lie wholly in it, in program order.
        cost: seconds and bytes; None where costs were not asked for.
    """

    name: str
    nodes: int
    parameters: int
    cut: str | None
    inputs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    cost: StageCost | None = None


@dataclass(frozen=True)
class SourceReport:
    """The source at one interface.

    Attributes:
        kind: its name.
        parameters: number of parameter elements.
        flops: floating-point operations of one prediction for the example batch; None: unknown.
        seconds: of one prediction and regression; None where costs were not asked for.
    """

    kind: str
    parameters: int
    flops: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class NodeReport:
    """One node of the traced graph, for drawing.

    Attributes:
        name: the node's name; a model input's or the output's for those.
        operator: class of the module or name of the function that it calls; ``"input"`` or
            ``"output"``.
        scope: paths of the modules that it ran in, outermost first, its own path last where it is a
            module.
        inputs: names of the nodes whose values it uses.
        shape: shape of its value; empty where it is no tensor.
        stage: index of its stage; None for inputs, the output, and nodes made again in every stage
            that needs them.
        seconds: forward and backward; None where costs were not asked for.
    """

    name: str
    operator: str
    scope: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    stage: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class SearchReport:
    """How the cuts were found.

    Attributes:
        objective: ``"throughput"``, ``"memory"``, ``"traffic"``, ``"learnability"``.
        costs: ``"measured"``, ``"analytic"`` or ``"given"``.
        slowest: seconds of the slowest stage: its work, its sources, and what it sends and receives
            (which :func:`dni_fx.simulate` takes to overlap with the work).
        bound: no plan with as many stages can have a faster slowest stage; seconds.
        frontiers: number of places that were weighed.
        exact: what the best was sought over without leaving any out: ``"all partitions"`` that keep
            units together, ``"program order"`` where stages are contiguous in it, ``""`` where some
            were left out. The plan may be one per cent slower than that best (5 for traffic and
            learnability).
        reasons: why each cut is where it is, by its name.
        explained: share of the true gradient that a quickly fitted source explained, by cut;
            learnability only.
    """

    objective: str
    costs: str
    slowest: float
    bound: float
    frontiers: int
    exact: str
    reasons: dict[str, str] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the slowest stage is above the bound, as a share of the bound."""
        return self.slowest / self.bound - 1 if self.bound else 0.0


@dataclass(frozen=True)
class PlanReport:
    """What was measured or found while a plan was made. Takes no part in the plan's equality.

    Attributes:
        rung: which tracer made the graph.
        stages: a row for each stage.
        interfaces: values that carry a gradient across.
        plain: other values that cross.
        sources: a row for each interface, by name.
        notes: opaque modules, ties, fewer stages than asked for, and the like.
        exact: whether the self-check found the split model equal bit for bit; None where it was not
            run.
        nodes: the traced graph in program order, for drawing.
        kinds: class of every module that nodes ran in, by path.
        search: how the cuts were found; None where they were given.
    """

    rung: str
    stages: tuple[StageReport, ...]
    interfaces: tuple[Interface, ...]
    plain: tuple[str, ...] = ()
    sources: dict[str, SourceReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact: bool | None = None
    nodes: tuple[NodeReport, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    search: SearchReport | None = None


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
        names, gradients, stages = (
            content.get("cuts"),
            content.get("gradients", {}),
            content.get("stages", []),
        )
        inputs = content.get("inputs", {})
        valid = (
            isinstance(content.get("model"), str)
            and isinstance(content.get("digest"), str)
            and isinstance(names, list)
            and all(isinstance(n, str) for n in names)
            and isinstance(gradients, dict)
            and all(isinstance(v, str) for v in gradients.values())
            and isinstance(inputs, dict)
            and all(isinstance(v, str) for v in inputs.values())
            and isinstance(stages, list)
            and len(stages) in (0, len(names) + 1)
            and all(isinstance(s, list) and all(isinstance(n, str) for n in s) for s in stages)
        )
        if not valid:
            raise DecouplingError(
                "a cut plan needs 'model' and 'digest' (text), 'cuts' (a list of names) and "
                "'gradients' (name: source); where they are there, 'inputs' (name: synthesizer) "
                "and 'stages' (node names for each)"
            )
        assignment = tuple((n, k) for k, stage in enumerate(stages) for n in stage)
        model, digest = content["model"], content["digest"]
        return cls(
            model,
            digest,
            tuple(names or ()),
            tuple(gradients.items()),
            assignment,
            tuple(inputs.items()),
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
        count = len(self.cuts) + 1
        head = f"{self.model}: {count} stage{'s'[: count > 1]}, {count - 1} cut{'s'[: count != 2]}, graph {self.digest}"
        if self.report is None:
            return "\n".join([head, *(f"  after {c}" for c in self.cuts)])
        tables = [*_table(_stage_rows(self.report)), "", *_table(_interface_rows(self.report)), ""]
        return "\n".join([head, "", *tables, *(f"note: {n}" for n in _notes(self.report))])


def _stage_rows(report: PlanReport) -> list[tuple[str, ...]]:
    costs = [s.cost for s in report.stages]
    seconds = sum(c.seconds for c in costs if c is not None) or 1.0
    nodes = sum(s.nodes for s in report.stages) or 1
    measured = all(c is not None for c in costs)
    titles = ["time", "ms", "MB"] if measured else ["share"]
    rows: list[tuple[str, ...]] = [("stage", "nodes", *titles, "parameters", "ends after", "holds")]
    for stage in report.stages:
        share = [f"{stage.nodes / nodes:.0%}"]
        if (cost := stage.cost) is not None and measured:
            share = [
                f"{cost.seconds / seconds:.0%}",
                f"{cost.seconds * 1e3:.2f}",
                f"{cost.nbytes / 1e6:.1f}",
            ]
        rows.append(
            (
                stage.name, str(stage.nodes), *share, f"{stage.parameters:,}", stage.cut or "(output)",
                _shortened(stage.modules),
            )
        )  # fmt: skip
    return rows


def _interface_rows(report: PlanReport) -> list[tuple[str, ...]]:
    measured = any(s.seconds is not None for s in report.sources.values())
    titles = [
        "interface",
        "shape",
        "MB",
        "from",
        "to",
        "source",
        "parameters",
        "MFLOP",
        "ms" if measured else "",
        "",
    ]
    rows = [tuple(titles)]
    for i in report.interfaces:
        source = report.sources.get(i.name, SourceReport("-", 0, 0))
        rows.append(
            (
                i.name, " x ".join(str(n) for n in i.spec.shape), f"{i.spec.nbytes / 1e6:.2f}", str(i.producer),
                _goal(i), source.kind, f"{source.parameters:,}",
                "?" if source.flops is None else f"{source.flops / 1e6:.1f}",
                "" if source.seconds is None else f"{source.seconds * 1e3:.2f}", "implied" if i.implied else "",
            )
        )  # fmt: skip
    return rows


def _goal(interface: Interface) -> str:
    stages = ", ".join(str(c) for c in interface.consumers)
    if interface.feeds is None or not stages:
        return interface.feeds or stages
    return f"{stages} of the next window"


def _notes(report: PlanReport) -> list[str]:
    notes = []
    if (search := report.search) is not None:
        sure = f"; exact over {search.exact}" if search.exact else ""
        notes.append(
            f"found for {search.objective} with {search.costs} costs: slowest stage "
            f"{search.slowest * 1e3:.2f} ms, sources and transfers included; bound "
            f"{search.bound * 1e3:.2f} ms, gap {search.gap:.1%}{sure}"
        )
        notes += [f"cut after {name}: {why}" for name, why in search.reasons.items()]
    if report.plain:
        notes.append(f"crosses without a source: {', '.join(report.plain)}")
    notes += [f"traced by {report.rung}", *report.notes]
    if report.exact is not None:
        notes.append(
            "self-check: equal to the model"
            + (" bit for bit" if report.exact else " within rounding")
        )
    return notes


def _shortened(names: tuple[str, ...]) -> str:
    """A few names; neighbours that are counted are put together: ``layers.0 to layers.3``."""
    groups: list[list[str]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        before = groups[-1][-1].rpartition(".") if groups else ("", "", "")
        if (
            groups
            and last.isdigit()
            and before[2].isdigit()
            and (stem, int(last)) == (before[0], int(before[2]) + 1)
        ):
            groups[-1].append(name)
        else:
            groups.append([name])
    texts = [g[0] if len(g) == 1 else f"{g[0]} to {g[-1].rpartition('.')[2]}" for g in groups]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned text; a rule under the first; columns of numbers to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    right = [
        all(r[i][:1].isdigit() or r[i] == "-" for r in rows[1:]) and len(rows) > 1
        for i in range(len(widths))
    ]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * w for w in widths if w), *lines[1:]]


class CutPointList(tuple[CutPoint, ...]):
    """Cut points in program order; prints as a table."""

    def __str__(self) -> str:
        rows = [("cut after", "shape", "MB", "interfaces", "crosses", "")]
        for p in self:
            crossing = ", ".join(p.crossing[:3]) + (
                f" and {len(p.crossing) - 3} more" if len(p.crossing) > 3 else ""
            )
            shape = " x ".join(str(n) for n in p.shape) or "-"
            note = "" if p.legal else f"illegal: {p.reason}"
            rows.append((p.name, shape, f"{p.nbytes / 1e6:.2f}", str(p.interfaces), crossing, note))
        return "\n".join(_table(rows))
