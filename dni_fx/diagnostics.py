"""Do the cuts help? Histories, tables and pictures of how near the predicted gradients come to what
they predict.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import DecouplingError
from .reports.steps import NOTHING, InterfaceReport, StepReport, as_share, as_size, compare

METRICS = ("cosine", "relative_error", "rms_ratio", "sign_agreement", "explained")
"""What is logged of an :class:`~dni_fx.reports.InterfaceReport`."""

_PENDING = (
    100  # losses that stay on their device before they are read, so that a step seldom waits for it
)
_CLOSE = 0.02  # cosines nearer to each other than this are as good as equal

T = TypeVar("T")


class ScalarWriter(Protocol):
    """What is needed of ``torch.utils.tensorboard.SummaryWriter``, or of anything that logs like
    it.
    """

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Log one number."""


@dataclass(frozen=True)
class Diagnosis(Mapping[str, InterfaceReport]):
    """How good every prediction is on one batch, and whether a control would do as well; prints as
    a table.

    It is a mapping from interface name to report.

    Attributes:
        interfaces: the report of every interface, by name.
        controls: the same for controls on the same batch, by the control's name (``"stale"``: the
            gradient of another batch) and interface name. The control ``zero`` needs no row: it
            explains 0 % everywhere.
        of: what the names are those of, ``"interface"``, or ``"stage"`` where gradients of
            parameters are compared.
    """

    interfaces: Mapping[str, InterfaceReport]
    controls: Mapping[str, Mapping[str, InterfaceReport]] = field(default_factory=dict)
    of: str = "interface"

    @classmethod
    def measure(
        cls,
        predictions: Mapping[str, Tensor | None],
        references: Mapping[str, Tensor],
        *,
        step: int,
        kind: str = "true",
        controls: Mapping[str, Mapping[str, Tensor | None]] | None = None,
    ) -> Diagnosis:
        """Compare predictions and controls with one set of references.

        Args:
            predictions: predicted gradients by interface name; None, from sources that wait, are
                left out.
            references: gradients of the same shapes; those without a prediction are left out.
            step: number of steps made before.
            kind: of the references, ``"true"`` or ``"bootstrapped"``.
            controls: what each control would have said, in the same form; of other shapes (another
                batch size): left out.

        Raises:
            DecouplingError: a prediction without a reference, or of another shape.
        """
        missing = [name for name in predictions if name not in references]
        if missing:
            raise DecouplingError(
                f"no reference for interface {missing[0]!r}; there are some for "
                f"{sorted(references)}"
            )
        found = {
            n: compare(p, references[n], kind, step)
            for n, p in predictions.items()
            if p is not None
        }
        beside = {
            control: {
                n: compare(said, references[n], kind, step)
                for n in found
                if (said := given.get(n)) is not None and said.shape == references[n].shape
            }
            for control, given in (controls or {}).items()
        }
        return cls(found, {control: reports for control, reports in beside.items() if reports})

    def verdict(self, name: str) -> str:
        """The report's verdict, and what the controls say to it.

        Args:
            name: of the interface.
        """
        report, words = self.interfaces[name], []
        for control, reports in self.controls.items():
            if (other := reports.get(name)) is not None:
                words.append(_against(report, other, control))
        return "; ".join([report.verdict, *filter(None, words)])

    def __getitem__(self, name: str) -> InterfaceReport:
        return self.interfaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.interfaces)

    def __len__(self) -> int:
        return len(self.interfaces)

    def __str__(self) -> str:
        return _described(
            self.interfaces, {n: self.verdict(n) for n in self.interfaces}, self.controls, self.of
        )


class History:
    """The course of a training run: its losses, and every measurement of every interface, once.

    ``trainer.fit(loader, on_step=history.add)`` fills it. A run that goes on from an earlier state
    overwrites what came after it.

    Args:
        most: points that are kept of each series. Where there are more every second is dropped, and
            from then on only every second kept (then every fourth, and so on), but always the last:
            the memory is bounded and the whole run is still there. None keeps all.

    Attributes:
        most: as given.

    Raises:
        DecouplingError: ``most`` is less than 2 or no whole number.

    Example:
        >>> import torch
        >>> from dni_fx.diagnostics import History
        >>> from dni_fx.reports import InterfaceReport, StepReport
        >>> history = History()
        >>> report = InterfaceReport(0.85, 0.54, 0.98, "true", step=0, sign_agreement=0.81)
        >>> history.add(StepReport(torch.tensor(2.5), None, {"layer2": report}, step=1))
        >>> print(history.table())
        loss 2.5 after 1 step
        <BLANKLINE>
        interface  cosine  error    size  signs  explained  reference  step
        ---------  ------  -----  ------  -----  ---------  ---------  ----
        layer2       0.85   0.54  0.98 x   81 %       71 %  true          0
        <BLANKLINE>
        layer2  explains 71 % of the gradient (cosine 0.85, size 0.98 x)
    """

    def __init__(self, most: int | None = 10_000) -> None:
        if most is not None and not (type(most) is int and most >= 2):
            raise DecouplingError(
                f"History keeps most= points of a series: a number from 2, or None, not {most!r}"
            )
        self.most = most
        self._pending: list[tuple[int, Tensor]] = []
        self._losses: _Series[float] = _Series(most)
        self._interfaces: dict[str, _Series[InterfaceReport]] = {}

    def add(self, report: StepReport) -> None:
        """Take over a step's loss, and what was measured in it.

        Args:
            report: of ``Trainer.step``. Its outputs are not kept, and its loss is read some steps
                later, so that the host does not wait for the device.
        """
        self._pending.append((report.step - 1, report.loss.detach()))
        if len(self._pending) >= _PENDING:
            self._read()
        for name, measured in report.interfaces.items():
            series = self._interfaces.setdefault(name, _Series(self.most))
            if (
                not series.points or series.points[-1][0] != measured.step
            ):  # reports repeat the last measurement
                series.add(measured.step, measured)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, counted from 0; steps that left the last stage out have none."""
        self._read()
        return dict(self._losses.points)

    @property
    def interfaces(self) -> dict[str, list[InterfaceReport]]:
        """Measurements of every interface, oldest first."""
        return {
            name: [report for _, report in series.points]
            for name, series in self._interfaces.items()
        }

    @property
    def last(self) -> dict[str, InterfaceReport]:
        """The last measurement of every interface."""
        return {name: reports[-1] for name, reports in self.interfaces.items()}

    def table(self) -> str:
        """The last loss, and of every interface its last measurement and verdict, as aligned text."""
        losses = list(self.losses.items())
        steps = losses[-1][0] + 1 if losses else 0
        head = (
            f"loss {losses[-1][1]:.4g} after {steps} step{'s'[: steps != 1]}"
            if losses
            else "no steps yet"
        )
        return "\n\n".join([head, summarize(self.last)])

    def to_json(self) -> str:
        """All of it as JSON text; what is nan becomes null, what is infinite ``"inf"``."""
        self._read()
        content = {
            "format": "dni_fx history",
            "version": 1,
            "most": self.most,
            "losses": {
                **self._losses.facts(),
                "loss": [_encoded(loss) for _, loss in self._losses.points],
            },
            "interfaces": {
                name: {**s.facts(), **_columns(s.points)} for name, s in self._interfaces.items()
            },
        }
        return json.dumps(content, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> History:
        """Read what ``to_json`` wrote; further steps can be added.

        Raises:
            DecouplingError: no JSON, another format or version, or parts that are missing or of the
                wrong type.
        """
        try:
            content = json.loads(text)
        except (ValueError, TypeError) as error:
            raise DecouplingError(f"a history must be JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != "dni_fx history":
            raise DecouplingError(
                "this JSON is no dni_fx history: its 'format' is not 'dni_fx history'"
            )
        if content.get("version") != 1:
            raise DecouplingError(
                f"this history has version {content.get('version')!r}, but this version of dni_fx "
                "reads version 1"
            )
        try:
            history = cls(content["most"])
            losses = [_decoded(loss) for loss in content["losses"]["loss"]]
            history._losses = _Series.restored(history.most, content["losses"], losses)
            for name, columns in content["interfaces"].items():
                series = _Series.restored(history.most, columns, _reports(columns))
                history._interfaces[name] = series
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DecouplingError(
                f"this history is damaged: {type(error).__name__}: {error}"
            ) from error
        return history

    def _read(self) -> None:
        """Turn the pending losses into numbers, all at once."""
        if self._pending:
            steps, losses = zip(*self._pending, strict=True)
            numbers = torch.stack(
                [loss.reshape(()).to(losses[-1].device) for loss in losses]
            ).tolist()
            self._pending = []
            for step, loss in zip(steps, numbers, strict=True):
                if not math.isnan(loss):  # where the last stage was not run
                    self._losses.add(step, loss)


def summarize(reports: Mapping[str, InterfaceReport]) -> str:
    """The reports of some interfaces as aligned text, and a verdict for each.

    Args:
        reports: by interface name, such as ``StepReport.interfaces``; a :class:`Diagnosis` keeps
            its controls.
    """
    if isinstance(reports, Diagnosis):
        return str(reports)
    return _described(reports, {name: report.verdict for name, report in reports.items()}, {})


def write_tensorboard(
    writer: ScalarWriter, report: StepReport, *, prefix: str = "dni", fresh: bool = True
) -> None:
    """Log a step's loss and what was measured in it, under tags such as ``dni/loss`` and
    ``dni/layer2/cosine``.

    Steps are counted from 0. What is nan is left out. Reading the loss waits for the device.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with ``add_scalar(tag,
            value, step)``.
        report: of ``Trainer.step``.
        prefix: first part of the tags.
        fresh: log measurements in the step that they were made in only, which is right when every
            step is logged; False logs those that the report has, whenever they were made, for
            callers that log seldom.
    """
    scalars = [(f"{prefix}/loss", float(report.loss), report.step - 1)]
    for name, measured in report.interfaces.items():
        if not fresh or measured.step == report.step - 1:
            scalars += [
                (f"{prefix}/{name}/{metric}", getattr(measured, metric), measured.step)
                for metric in METRICS
            ]
    for tag, value, step in scalars:
        if not math.isnan(value):
            writer.add_scalar(tag, value, step)


def plot(history: History, path: str | Path) -> Path:
    """Draw the loss, and cosine, relative error and size ratio of every interface, over the steps.

    Args:
        history: what to draw.
        path: file to write; its suffix says how, one of those that matplotlib knows (``.png``,
            ``.svg``, ``.pdf``).

    Returns:
        The path.

    Raises:
        DecouplingError: matplotlib is not installed; an unknown suffix; a file that cannot be
            written.
    """
    path = Path(path)
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise DecouplingError(
            f"plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib. "
            "history.table() and history.to_json() need nothing."
        ) from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    suffixes = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in suffixes:
        raise DecouplingError(
            f"cannot draw to {str(path)!r}: its name must end in one of .{', .'.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise DecouplingError(
            f"cannot draw to {str(path)!r}: there is no folder {str(path.parent)!r}"
        )
    axes: list[Any] = list(figure.subplots(2, 2, sharex=True).flat)
    axes[0].plot(list(history.losses), list(history.losses.values()), color="0.3", linewidth=1)
    axes[0].set_ylabel("loss")
    lines: dict[str, Any] = {}
    every = history.interfaces
    for axis, metric, title, nothing in zip(
        axes[1:],
        METRICS,
        ("cosine", "relative error (1: no better than zero)", "size ratio"),
        (0, 1, 1),
        strict=False,
    ):
        axis.axhline(nothing, color="0.7", linewidth=1)
        positive = metric != "cosine"
        for index, (name, reports) in enumerate(every.items()):
            values = [getattr(r, metric) for r in reports]
            values = [
                v if math.isfinite(v) and (v > 0 or not positive) else math.nan for v in values
            ]
            colour = colormaps["viridis"](
                0.9 * index / max(len(every) - 1, 1)
            )  # from first to last cut
            (line,) = axis.plot(
                [r.step for r in reports], values, ".-", color=colour, linewidth=1, markersize=4
            )
            lines[f" {name} ({reports[-1].reference})"] = (
                line  # names that start with _ would be left out
            )
        axis.set_ylabel(title)
        if positive:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis in axes[2:]:
        axis.set_xlabel("step")
    if lines:
        figure.legend(
            list(lines.values()), list(lines), loc="outside right upper", fontsize="small"
        )
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure.savefig(part, dpi=120)
        part.replace(path)
    except OSError as error:
        raise DecouplingError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name another file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


class _Series(Generic[T]):
    """Points ``(step, value)`` in the order of their steps; of many every n-th, and the last."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.points: list[tuple[int, T]] = []
        self.stride, self.seen = 1, 0

    def add(self, step: int, value: T) -> None:
        if self.points and self.points[-1][0] >= step:  # the run goes on from an earlier state
            self.points = [point for point in self.points if point[0] < step]
            self.seen = (len(self.points) - 1) * self.stride + 1 if self.points else 0
        if self.points and (self.seen - 1) % self.stride:  # the last one was there as the last only
            self.points.pop()
        self.points.append((step, value))
        self.seen += 1
        if self.most is not None and len(self.points) > self.most:
            self.points = [*self.points[:-1:2], self.points[-1]]
            self.stride *= 2

    def facts(self) -> dict[str, Any]:
        """All but the values."""
        return {"stride": self.stride, "seen": self.seen, "step": [step for step, _ in self.points]}

    @classmethod
    def restored(cls, most: int | None, facts: dict[str, Any], values: Sequence[T]) -> _Series[T]:
        series = cls(most)
        series.stride, series.seen = int(facts["stride"]), int(facts["seen"])
        series.points = [
            (int(step), value) for step, value in zip(facts["step"], values, strict=True)
        ]
        if series.stride < 1 or series.seen < len(series.points):
            raise ValueError("its counts do not fit its points")
        return series


_MEASURES = (
    "cosine",
    "relative_error",
    "rms_ratio",
    "sign_agreement",
)  # the others follow from these


def _columns(points: Iterable[tuple[int, InterfaceReport]]) -> dict[str, list[Any]]:
    reports = [report for _, report in points]
    columns = {name: [_encoded(getattr(report, name)) for report in reports] for name in _MEASURES}
    return {**columns, "reference": [report.reference for report in reports]}


def _reports(columns: Mapping[str, Sequence[Any]]) -> list[InterfaceReport]:
    rows = zip(
        columns["step"], columns["reference"], *(columns[name] for name in _MEASURES), strict=True
    )
    return [
        InterfaceReport(
            reference=str(reference),
            step=int(step),
            **dict(zip(_MEASURES, map(_decoded, numbers), strict=True)),
        )
        for step, reference, *numbers in rows
    ]


def _encoded(number: float) -> float | str | None:
    """JSON knows neither nan nor infinity."""
    return number if math.isfinite(number) else None if math.isnan(number) else str(number)


def _decoded(number: float | str | None) -> float:
    return math.nan if number is None else float(number)


def _against(report: InterfaceReport, other: InterfaceReport, control: str) -> str:
    """What a control's direction says about a prediction's; nothing where neither has one."""
    ours = 0.0 if math.isnan(report.cosine) else report.cosine
    theirs = other.cosine
    if (
        not math.isfinite(report.relative_error)
        or math.isnan(theirs)
        or max(ours, theirs) < NOTHING
    ):
        return ""
    if theirs < ours - _CLOSE:
        return f"better than the {control} control (cosine {theirs:.2f})"
    return f"the {control} control would do {'as well' if theirs <= ours + _CLOSE else 'better'} (cosine {theirs:.2f})"


def _described(
    reports: Mapping[str, InterfaceReport],
    verdicts: Mapping[str, str],
    controls: Mapping[str, Mapping[str, InterfaceReport]],
    of: str = "interface",
) -> str:
    """A table of numbers, and under it a line of words for every interface."""
    if not reports:
        return "nothing measured: no source predicted a gradient"
    titles = [
        of,
        "cosine",
        "error",
        "size",
        "signs",
        "explained",
        *(f"{c}: cosine" for c in controls),
    ]
    rows = [[*titles, "reference", "step"]]
    for name, r in reports.items():
        others = [
            others[name].cosine if name in others else math.nan for others in controls.values()
        ]
        numbers = [
            _number(r.cosine),
            _number(r.relative_error),
            as_size(r.rms_ratio),
            as_share(r.sign_agreement),
        ]
        rows.append(
            [name, *numbers, as_share(r.explained), *map(_number, others), r.reference, str(r.step)]
        )
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        left = index in (0, len(rows[0]) - 2)
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell in column]
        columns.append([cells[0], "-" * width, *cells[1:]])
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    width = max(map(len, verdicts))
    return "\n".join(
        [*lines, "", *(f"{name.ljust(width)}  {verdict}" for name, verdict in verdicts.items())]
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.1e}"
