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
    figure, path = _new_figure(path, (11, 7))
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
    return _save(figure, path)


def plot_runs(
    runs: Mapping[str, History | Sequence[History]], path: str | Path, smooth: float = 0.02
) -> Path:
    """Compare runs: loss, and cosine over all interfaces, a colour for each method.

    The mean over a method's seeds is a strong line, each seed a faint one.

    Args:
        runs: by the name of a method its history, or those of several seeds.
        path: as for :func:`plot`.
        smooth: share of a run that each drawn loss is a mean over.

    Returns:
        The path.

    Raises:
        DecouplingError: as for :func:`plot`; no runs; seeds of one method that were not noted at
            the same steps.
    """
    if not runs:
        raise DecouplingError("there are no runs to draw: pass {'method': history, ...}")
    figure, path = _new_figure(path, (11, 4))
    axes: list[Any] = list(figure.subplots(1, 2, sharex=True))
    for axis, title in zip(axes, ("loss", "cosine, mean over interfaces"), strict=True):
        axis.set_ylabel(title)
        axis.set_xlabel("step")
    for index, (name, given) in enumerate(runs.items()):
        seeds = [given] if isinstance(given, History) else list(given)
        losses = [_smoothed(history.losses, smooth) for history in seeds]
        for axis, series in zip(axes, (losses, [_cosines(h) for h in seeds]), strict=True):
            steps, mean = _mean_of(name, series)
            for each in series if len(series) > 1 else ():
                axis.plot(list(each), list(each.values()), f"C{index}", linewidth=0.5, alpha=0.5)
            axis.plot(steps, mean, f"C{index}", linewidth=1.5, label=f" {name}")
    axes[0].legend(fontsize="small")
    return _save(figure, path)


def _smoothed(losses: Mapping[int, float], share: float) -> dict[int, float]:
    """Of each step the mean over those before it, as many as a share of all."""
    steps, values = list(losses), list(losses.values())
    width = max(1, round(share * len(values)))
    return {
        step: sum(part) / len(part)
        for k, step in enumerate(steps)
        if (part := values[max(0, k + 1 - width) : k + 1])
    }


def _cosines(history: History) -> dict[int, float]:
    """By step, the mean cosine of the interfaces that have one."""
    found: dict[int, list[float]] = {}
    for reports in history.interfaces.values():
        for report in reports:
            if math.isfinite(report.cosine):
                found.setdefault(report.step, []).append(report.cosine)
    return {step: sum(cosines) / len(cosines) for step, cosines in sorted(found.items())}


def _mean_of(name: str, seeds: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float]]:
    """Steps, and the mean over seeds at each."""
    steps = [list(series) for series in seeds]
    if not steps or any(each != steps[0] for each in steps):
        found = [len(each) for each in steps]
        raise DecouplingError(
            f"the runs of {name!r} were noted at different steps ({found} of them): pass runs of "
            "one length, made with the same metrics_every=, under one name"
        )
    return steps[0], [sum(at) / len(at) for at in zip(*(s.values() for s in seeds), strict=True)]


def _new_figure(path: str | Path, size: tuple[float, float]) -> tuple[Any, Path]:
    """A figure that can be saved there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DecouplingError(
            f"plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib. "
            "history.table() and history.to_json() need nothing."
        ) from error
    path = Path(path)
    figure = Figure(figsize=size, layout="constrained")
    kind = path.suffix[1:].lower()
    suffixes = sorted(figure.canvas.get_supported_filetypes())
    if kind not in suffixes:
        raise DecouplingError(
            f"cannot draw to {str(path)!r}: its name must end in one of .{', .'.join(suffixes)}"
        )
    return figure, path


def _save(figure: Any, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=path.suffix[1:].lower())
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
