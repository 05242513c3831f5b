"""Models to search, and plans of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dni_fx
from dni_fx.plan import CutPlan


class Towers(nn.Module):
    """Two towers, the first written out before the second, that meet in a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU())  # noqa: E731
        self.left = nn.Sequential(*(layer() for _ in range(3)))
        self.right = nn.Sequential(*(layer() for _ in range(3)))
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


X = torch.randn(6, 8)


def plan(model: nn.Module, x: torch.Tensor = X, **options: Any) -> CutPlan:
    options.setdefault("costs", "analytic")
    return dni_fx.plan_cuts(model, (x,), **options)


def chain(layers: int = 8, width: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def search_of(found: CutPlan) -> dni_fx.plan.SearchReport:
    assert found.report is not None
    assert found.report.search is not None
    return found.report.search
