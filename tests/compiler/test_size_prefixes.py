"""Values that follow from sizes within the model: code may decide by them, as masks do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.trace import tracing

from ..helpers.comparing import assert_bits_equal


class Positions(nn.Module):
    """Makes positions of the size of an embedding, and asks for their values."""

    def __init__(self, numel: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.numel = numel

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        h = self.embed(tokens)
        length = h[0].numel() // 8 if self.numel else h.shape[1]
        positions = torch.arange(length, device=h.device)
        if starts is not None:
            positions = positions + starts
        if (positions > 5).any():
            h = h + positions[:, None] / 10
        return self.head(torch.tanh(self.mix(h)))


def tokens(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(9, (batch, length), generator=generator)


def cut(model: nn.Module, *inputs: Any) -> dni_fx.Decoupled:
    return dni_fx.decouple(model, ["mix"], example_inputs=inputs, gradients="exact")


@pytest.mark.parametrize("numel", [False, True])
def test_both_ways_are_taken(numel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = []
    original = tracing.record

    def record(recorder: Any, *args: Any) -> Any:
        rungs.append(recorder.fake is None)
        return original(recorder, *args)

    monkeypatch.setattr(tracing, "record", record)
    torch.manual_seed(0)
    model = Positions(numel)
    stages = cut(model, tokens(4))
    for length, batch in ((4, 2), (5, 3), (8, 2), (6, 2), (7, 1), (3, 2)):
        x = tokens(length, batch)
        assert_bits_equal(stages(x), model(x), f"{length} tokens")
    assert len(rungs) <= 4  # two ways, each in two modes at most
    assert all(rungs)  # on fake tensors nobody could be asked


def test_values_of_inputs_and_sizes_together() -> None:
    torch.manual_seed(0)
    model = Positions(False)
    near, far = torch.zeros(1, dtype=torch.long), torch.full((1,), 4)
    stages = cut(model, tokens(4), near)
    for length, start in ((4, near), (4, far), (8, near), (3, near), (3, far)):
        x = tokens(length)
        assert_bits_equal(stages(x, start), model(x, start), f"{length} tokens")


def test_control_sizes_that_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Positions(False)
    stages = cut(model, tokens(4))
    trace = stages.graphs.variant.trace
    (size,) = trace.guarded_sizes
    for length in (4, 8):
        trace.known_sizes[(torch.Size([2, length]),)] = {size: 4}
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(stages(tokens(8)), model(tokens(8)), "8 tokens")


class Selected(nn.Module):
    """The size of what is selected by values that depend on parameters is no matter of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        positions = torch.arange(h[h > 0].shape[0])
        if (positions > 8).any():
            h = h * 2
        return self.b(h)


def test_sizes_that_depend_on_values_are_refused() -> None:
    with pytest.raises(dni_fx.DecouplingError, match="value"):
        dni_fx.decouple(Selected(), ["a"], example_inputs=(torch.randn(4, 6),))
