"""The course of a training run, kept within bounds, as JSON and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..reports.steps import InterfaceReport, StepReport
from .diagnosis import summarize

# losses that stay on their device before they are read, so that a step seldom waits for it
_PENDING = 100
_MEASURES = ("cosine", "relative_error", "rms_ratio", "sign_agreement")  # the others follow

T = TypeVar("T")


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
            # reports repeat the last measurement
            if not series.points or series.points[-1][0] != measured.step:
                series.add(measured.step, measured)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, counted from 0; steps that left the last stage out have none."""
        self._read()
        return dict(self._losses.points)

    @property
    def interfaces(self) -> dict[str, list[InterfaceReport]]:
        """Measurements of every interface, oldest first."""
        return {name: [r for _, r in series.points] for name, series in self._interfaces.items()}

    @property
    def last(self) -> dict[str, InterfaceReport]:
        """The last measurement of every interface."""
        return {name: reports[-1] for name, reports in self.interfaces.items()}

    def table(self) -> str:
        """The last loss, and of every interface its last measurement and verdict, as aligned
        text.
        """
        head = "no steps yet"
        for step, loss in list(self.losses.items())[-1:]:
            head = f"loss {loss:.4g} after {step + 1} step{'s'[: step != 0]}"
        return f"{head}\n\n{summarize(self.last)}"

    def to_json(self) -> str:
        """All of it as JSON text; what is nan becomes null, what is infinite ``"inf"``."""
        self._read()
        losses = [_encoded(loss) for _, loss in self._losses.points]
        content = {
            "format": "dni_fx history",
            "version": 1,
            "most": self.most,
            "losses": {**self._losses.facts(), "loss": losses},
            "interfaces": {n: {**s.facts(), **_columns(s)} for n, s in self._interfaces.items()},
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
        if (version := content.get("version")) != 1:
            raise DecouplingError(f"this history has version {version!r}; this dni_fx reads 1")
        try:
            history = cls(content["most"])
            losses = [_decoded(loss) for loss in content["losses"]["loss"]]
            history._losses = _Series.restored(history.most, content["losses"], losses)
            history._interfaces = {
                name: _Series.restored(history.most, columns, _reports(columns))
                for name, columns in content["interfaces"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DecouplingError(
                f"this history is damaged: {type(error).__name__}: {error}"
            ) from error
        return history

    def _read(self) -> None:
        """Turn the pending losses into numbers, all at once."""
        if self._pending:
            steps, losses = zip(*self._pending, strict=True)
            device = losses[-1].device
            numbers = torch.stack([loss.reshape(()).to(device) for loss in losses])
            self._pending = []
            for step, loss in zip(steps, numbers.tolist(), strict=True):
                if not math.isnan(loss):  # where the last stage was not run
                    self._losses.add(step, loss)


@dataclass
class _Series(Generic[T]):
    """Points ``(step, value)`` in the order of their steps; of many every n-th, and the last."""

    most: int | None
    points: list[tuple[int, T]] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

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
        points = list(zip(map(int, facts["step"]), values, strict=True))
        series = cls(most, points, int(facts["stride"]), int(facts["seen"]))
        if series.stride < 1 or series.seen < len(series.points):
            raise ValueError("its counts do not fit its points")
        return series


def _columns(series: _Series[InterfaceReport]) -> dict[str, list[Any]]:
    reports = [report for _, report in series.points]
    columns = {name: [_encoded(getattr(report, name)) for report in reports] for name in _MEASURES}
    plain = {name: [getattr(report, name) for report in reports] for name in ("reference", "aims")}
    return {**columns, **plain}


def _reports(columns: Mapping[str, Sequence[Any]]) -> list[InterfaceReport]:
    measures = [columns[name] for name in _MEASURES]
    aimed = columns.get("aims", [True] * len(columns["step"]))  # files of before have none
    facts = columns["step"], columns["reference"], aimed
    reports = []
    for step, kind, aims, *numbers in zip(*facts, *measures, strict=True):
        values = dict(zip(_MEASURES, map(_decoded, numbers), strict=True))
        reports.append(InterfaceReport(reference=kind, step=int(step), aims=bool(aims), **values))
    return reports


def _encoded(number: float) -> float | str | None:
    """JSON knows neither nan nor infinity."""
    return number if math.isfinite(number) else None if math.isnan(number) else str(number)


def _decoded(number: float | str | None) -> float:
    return math.nan if number is None else float(number)
