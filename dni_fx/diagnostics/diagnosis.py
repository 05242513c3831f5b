"""How near predictions come to their references on one batch, beside controls, in numbers and
words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import DecouplingError
from ..reports.steps import NOTHING, InterfaceReport, as_share, as_size, compare
from ..reports.tables import table

_CLOSE = 0.02  # cosines nearer to each other than this are as good as equal


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
        own: Collection[str] = (),
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
            own: interfaces whose sources follow a loss of their own.

        Raises:
            DecouplingError: a prediction without a reference, or of another shape.
        """
        for name in predictions:
            if name not in references:
                raise DecouplingError(
                    f"no reference for interface {name!r}; there are some for {sorted(references)}"
                )
        found = {
            name: compare(predicted, references[name], kind, step, name not in own)
            for name, predicted in predictions.items()
            if predicted is not None
        }
        beside = {
            control: {
                name: compare(said, references[name], kind, step)
                for name in found
                if (said := given.get(name)) is not None and said.shape == references[name].shape
            }
            for control, given in (controls or {}).items()
        }
        return cls(found, {control: reports for control, reports in beside.items() if reports})

    def verdict(self, name: str) -> str:
        """The verdict of an interface's report, and what the controls say to it."""
        report = self.interfaces[name]
        if not report.aims:
            return report.verdict
        words = [_against(report, r[name], c) for c, r in self.controls.items() if name in r]
        return "; ".join([report.verdict, *filter(None, words)])

    def __getitem__(self, name: str) -> InterfaceReport:
        return self.interfaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.interfaces)

    def __len__(self) -> int:
        return len(self.interfaces)

    def __str__(self) -> str:
        if not self.interfaces:
            return "nothing measured: no source predicted a gradient"
        measures = (self.of, "cosine", "error", "size", "signs", "explained")
        rows = [[*measures, *(f"{c}: cosine" for c in self.controls), "reference", "step"]]
        for name, report in self.interfaces.items():
            numbers = [_number(report.cosine), _number(report.relative_error)]
            shares = [as_share(report.sign_agreement), as_share(report.explained)]
            beside = [_number(r[name].cosine) if name in r else "-" for r in self.controls.values()]
            origin = [report.reference, str(report.step)]
            rows.append([name, *numbers, as_size(report.rms_ratio), *shares, *beside, *origin])
        width = max(map(len, self.interfaces))
        words = [f"{name.ljust(width)}  {self.verdict(name)}" for name in self.interfaces]
        return "\n".join([*table(rows, left=(0, len(rows[0]) - 2)), "", *words])


def summarize(reports: Mapping[str, InterfaceReport]) -> str:
    """The reports of some interfaces as aligned text, and a verdict for each.

    Args:
        reports: by interface name, such as ``StepReport.interfaces``; a :class:`Diagnosis` keeps
            its controls.
    """
    return str(reports if isinstance(reports, Diagnosis) else Diagnosis(reports))


def _against(report: InterfaceReport, other: InterfaceReport, control: str) -> str:
    """What a control's direction says about a prediction's; nothing where neither has one."""
    ours, theirs = 0.0 if math.isnan(report.cosine) else report.cosine, other.cosine
    known = math.isfinite(report.relative_error) and not math.isnan(theirs)
    if not known or max(ours, theirs) < NOTHING:
        return ""
    if theirs < ours - _CLOSE:
        return f"better than the {control} control (cosine {theirs:.2f})"
    how = "as well" if theirs <= ours + _CLOSE else "better"
    return f"the {control} control would do {how} (cosine {theirs:.2f})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.1e}"
