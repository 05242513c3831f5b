"""Tensors that objects hold which are no modules: noise schedules, tables of constants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.trace import tracing

from ..helpers.comparing import assert_bits_equal


class Schedule:
    """A noise schedule that is no module."""

    def __init__(self) -> None:
        self.kept, self.deep = torch.linspace(0.9, 0.1, 5), {"rest": [torch.linspace(0.1, 0.9, 5)]}

    def add_noise(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        self.kept = self.kept.to(x.device)
        rest = self.deep["rest"][0]
        return self.kept[steps][:, None] * x + rest[steps][:, None] * noise


class Denoised(nn.Module):
    """Asks its schedule at the top level."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.schedule = nn.Linear(4, 4), nn.Linear(4, 4), Schedule()

    def forward(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        noisy = self.schedule.add_noise(x, noise, steps)
        return nn.functional.mse_loss(self.b(torch.tanh(self.a(noisy))), noise)


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, 4), torch.randn(size, 4), torch.randint(5, (size,))


@pytest.mark.parametrize("size", ["small", "large"])
def test_tensors_of_a_helper_object_are_constants(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setattr(tracing, "SMALL", 0)
    model = Denoised()
    stages = dni_fx.decouple(model, ["a"], example_inputs=batch(3), gradients="exact")
    assert "traced by calls" in str(stages.plan)

    def compare(what: str) -> None:
        x = batch(4)
        assert_bits_equal(stages(*x), model(*x), what)

    compare("as traced")
    model.schedule.kept[1:3] = 0.5
    compare("written to")
    model.schedule.kept = torch.linspace(0.8, 0.2, 5)
    compare("another attribute")
    model.schedule.deep["rest"][0] = torch.linspace(0.2, 0.8, 5)
    compare("another in a list")
