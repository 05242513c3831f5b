"""Reports made by hand, and a short run to report on."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
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


def chain() -> nn.Module:
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    model.add_module("layer2", nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model.add_module("head", nn.Linear(8, 3))
    return model


def trainer_of(gradients: Any = "linear", **options: Any) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        chain(), ["layer1", "layer2"], example_inputs=(torch.randn(4, 6),), gradients=gradients,
        context=dni_fx.one_hot(3),
    )  # fmt: skip
    return dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1), **options
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(count)]


def step_report(
    step: int, loss: float | Tensor = 1.0, measured: int | None = None, cosine: float = 0.5
) -> StepReport:
    at = step - 1 if measured is None else measured
    report = InterfaceReport(cosine, 0.5, 0.25, "true", at, 0.75)
    return StepReport(torch.as_tensor(loss), torch.zeros(3), {"cut": report}, step)
