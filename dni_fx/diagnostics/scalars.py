"""Measurements as single numbers, for TensorBoard and its like."""

from __future__ import annotations

import math
from typing import Protocol

from ..reports.steps import StepReport

METRICS = ("cosine", "relative_error", "rms_ratio", "sign_agreement", "explained")
"""What is logged of an :class:`~dni_fx.reports.InterfaceReport`."""


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
