"""Training runs as pictures, and as single numbers for TensorBoard and its like."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import DecouplingError
from ..reports.files import write_atomically
from ..reports.steps import InterfaceReport, StepReport
from .history import History

METRICS = ("cosine", "relative_error", "rms_ratio", "sign_agreement", "explained")
"""What is logged of an :class:`~dni_fx.reports.InterfaceReport`."""

_PANELS = (  # metric, its name, what it is where nothing is learnt
    ("cosine", "cosine", 0),
    ("relative_error", "relative error (1: no better than zero)", 1),
    ("rms_ratio", "size ratio", 1),
)


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DecouplingError(
            f"plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib. "
            "history.table() and history.to_json() need nothing."
        ) from error
    path = Path(path)
    figure = Figure(figsize=(11, 7), layout="constrained")
    kind = path.suffix[1:].lower()
    suffixes = sorted(figure.canvas.get_supported_filetypes())
    if kind not in suffixes:
        raise DecouplingError(
            f"cannot draw to {str(path)!r}: its name must end in one of .{', .'.join(suffixes)}"
        )
    axes: list[Any] = list(figure.subplots(2, 2, sharex=True).flat)
    axes[0].plot(list(history.losses), list(history.losses.values()), color="0.3", linewidth=1)
    axes[0].set_ylabel("loss")
    lines: dict[str, Any] = {}
    for axis, (metric, title, nothing) in zip(axes[1:], _PANELS, strict=True):
        axis.axhline(nothing, color="0.7", linewidth=1)
        axis.set_ylabel(title)
        lines = _draw_lines(axis, metric, history.interfaces)
    for axis in axes[2:]:
        axis.set_xlabel("step")
    if lines:
        figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=kind)
    return write_atomically(path, drawn.getvalue())


def _draw_lines(
    axis: Any, metric: str, interfaces: Mapping[str, Sequence[InterfaceReport]]
) -> dict[str, Any]:
    """Draw a line for each interface, from the first cut's colour to the last one's; the lines by
    their names in the legend.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    lines, signed = {}, metric == "cosine"
    for index, (name, reports) in enumerate(interfaces.items()):
        values = (getattr(report, metric) for report in reports)
        shown = [v if math.isfinite(v) and (v > 0 or signed) else math.nan for v in values]
        colour = colormaps["viridis"](0.9 * index / max(len(interfaces) - 1, 1))
        look = {"color": colour, "linewidth": 1, "markersize": 4}
        (line,) = axis.plot([report.step for report in reports], shown, ".-", **look)
        # the space: names that start with _ would be left out
        lines[f" {name} ({reports[-1].reference})"] = line
    if not signed:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    return lines


class ScalarWriter(Protocol):
    """What is needed of ``torch.utils.tensorboard.SummaryWriter``, or of anything that logs like
    it.
    """

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Log one number."""


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
