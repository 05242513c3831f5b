"""What a training step tells: loss, outputs, and how near the predictions were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class InterfaceReport:
    """A predicted gradient against its reference, over all elements of the batch.

    Attributes:
        cosine: cosine of the angle between them; nan where either is zero.
        relative_error: norm of the difference over the norm of the reference; nan where the reference is zero.
        rms_ratio: size of the prediction over that of the reference.
        reference: ``"true"`` where the reference is the loss's own gradient, ``"bootstrapped"`` where it comes from
            stages that are themselves trained on predictions.
        step: when it was measured, counted from 0.
    """

    cosine: float
    relative_error: float
    rms_ratio: float
    reference: str
    step: int


@dataclass(frozen=True)
class StepReport:
    """Result of one training step.

    Attributes:
        loss: the loss, a detached scalar tensor.
        outputs: the model's output, detached, in its own structure.
        interfaces: the last measured comparison of every interface, by name.
        step: number of steps made so far.
    """

    loss: torch.Tensor
    outputs: Any
    interfaces: dict[str, InterfaceReport] = field(default_factory=dict)
    step: int = 0


def compare(prediction: torch.Tensor, reference: torch.Tensor, kind: str, step: int) -> InterfaceReport:
    """Compare two gradients of the same shape."""
    a, b = prediction.detach().double().flatten(), reference.detach().double().flatten()
    length, truth = float(a.norm()), float(b.norm())
    nan = float("nan")
    return InterfaceReport(
        cosine=float(a @ b) / (length * truth) if length and truth else nan,
        relative_error=float((a - b).norm()) / truth if truth else nan,
        rms_ratio=length / truth if truth else nan,
        reference=kind,
        step=step,
    )
