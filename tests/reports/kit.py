"""Reports made by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dni_fx.reports import InterfaceReport, StepReport

nan, inf = math.nan, math.inf


def pair(
    *shape: int, dtype: torch.dtype = torch.float32, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A prediction and a reference that resemble each other, with zeros in both."""
    reference = torch.randn(shape) * 1e-5
    prediction = reference + noise * torch.randn(shape) * 1e-5
    if reference.numel() > 8:
        reference.view(-1)[::5] = 0.0
        prediction.view(-1)[::7] = 0.0
    return prediction.to(dtype), reference.to(dtype)


def step_report(
    step: int, loss: float | Tensor = 1.0, measured: int | None = None, cosine: float = 0.5
) -> StepReport:
    at = step - 1 if measured is None else measured
    report = InterfaceReport(cosine, 0.5, 0.25, "true", at, 0.75)
    return StepReport(torch.as_tensor(loss), torch.zeros(3), {"cut": report}, step)
