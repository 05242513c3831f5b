"""What forward writes into other modules, and flags that its first call sets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx

from ..helpers.comparing import assert_bits_equal

READY = False


class Inner(nn.Module):
    """Uses what others may have left in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.level, self.seen = nn.Linear(4, 4), 0, [0]
        self.kept = torch.zeros(4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)) + self.kept + self.mean
        return h * (1 + self.level) + len(self.seen)


class Writes(nn.Module):
    """Does something to its inner module, before or after it is called."""

    def __init__(self, act: Callable[[Inner, Tensor], None], first: bool) -> None:
        super().__init__()
        self.inner, self.act, self.first = Inner(), act, first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.act(self.inner, x)
        y = self.inner(x)
        if not self.first:
            self.act(self.inner, x)
        return y


def grown(inner: Inner, x: Tensor) -> None:
    inner.seen.append(1)


def counted(inner: Inner, x: Tensor) -> None:
    inner.level = inner.level + 1


def stored(inner: Inner, x: Tensor) -> None:
    inner.kept = x.detach().mean(0)


def rebound(inner: Inner, x: Tensor) -> None:
    inner.mean = x.detach().mean(0)


def around(inner: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))


def batches() -> list[Tensor]:
    return list(torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1)))


def outputs(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [model(x).detach() for x in batches()]


def decoupled(model: nn.Module) -> Any:
    cut = "0" if isinstance(model, nn.Sequential) else "first"
    return dni_fx.decouple(model, [cut], example_inputs=(batches()[0],), gradients="exact")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("act", [grown, counted, stored, rebound])
def test_writes_into_another_module_happen_in_every_call(act: Any, first: bool) -> None:
    model = around(Writes(act, first))
    plain = copy.deepcopy(model)
    expected = outputs(plain)
    stages = decoupled(model)
    for number, (out, right) in enumerate(zip(outputs(stages), expected, strict=True)):
        assert_bits_equal(out, right, f"output {number}")
    assert "opaque" in str(stages.plan)


class Top(nn.Module):
    """Writes at the top level."""

    def __init__(self, act: Callable[[Inner, Tensor], None]) -> None:
        super().__init__()
        self.first, self.inner, self.act = nn.Linear(4, 4), Inner(), act

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.inner(h)
        self.act(self.inner, h)
        return y


@pytest.mark.parametrize("act", [grown, counted, stored, rebound])
def test_at_the_top_level_writes_into_another_module_are_refused(act: Any) -> None:
    with pytest.raises(dni_fx.DecouplingError, match=r"forward changes .* of 'inner'"):
        decoupled(Top(act))


class Helper:
    """Is ready after its first use."""

    def __init__(self) -> None:
        self.ready, self.scale, self.kind = False, None, None

    def flag(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            return x * 2
        return x

    def number(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = 3.0
            return x
        return x * self.scale

    def later(self, x: Tensor) -> Tensor:
        if not hasattr(self, "name"):
            self.name = "x"
            return x + 1
        return x


def of_module(x: Tensor) -> Tensor:
    global READY
    if not READY:
        READY = True
        return x * 2
    return x


class Uses(nn.Module):
    """Passes a layer's output through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


FLAGS = {
    "flag": lambda: Helper().flag,
    "number": lambda: Helper().number,
    "attribute": lambda: Helper().later,
    "global": lambda: of_module,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", FLAGS)
def test_a_flag_that_the_first_call_sets_is_set(kind: str, inside: bool) -> None:
    global READY
    READY = False
    torch.manual_seed(0)
    model: nn.Module = Uses(FLAGS[kind]())
    if inside:
        model = nn.Sequential(nn.Linear(4, 4), model)
    expected = outputs(copy.deepcopy(model))
    READY = False
    stages = decoupled(model)
    assert not READY
    for number, (out, right) in enumerate(zip(outputs(stages), expected, strict=True)):
        assert_bits_equal(out, right, f"output {number}")
