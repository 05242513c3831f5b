"""Optimisers that are alike are stepped by one call: the numbers, and everybody's state, are those
of one call each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dni_fx.runtime.joint import KINDS, JointStep

from ..helpers.comparing import assert_bits_equal

SHAPES = [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
Step = Callable[[list[Optimizer]], None]


def apart(optimizers: list[Optimizer]) -> None:
    """The reference."""
    for optimizer in optimizers:
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    """The same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def trained(
    make: Callable[[int, list[nn.Parameter]], Optimizer],
    step: Step,
    between: Callable[[int, list[Optimizer], list[nn.Parameter]], None] = lambda *_: None,
) -> Any:
    """Weights, states and settings after six steps of three optimisers."""
    every = parameters()
    optimizers = [make(k, every[2 * k : 2 * k + 2]) for k in range(3)]
    generator = torch.Generator().manual_seed(1)
    for count in range(6):
        between(count, optimizers, every)
        for group in (g for o in optimizers for g in o.param_groups):
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        step(optimizers)
    states = [o.state_dict() for o in optimizers]
    return {"weights": [p.detach() for p in every], "states": states}


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda k: k.__name__))
@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.1), (0.1, 0.2, 0.1)])
def test_every_kind_steps_as_if_apart(kind: type[Optimizer], rates: tuple[float, ...]) -> None:
    def make(k: int, mine: list[nn.Parameter]) -> Optimizer:
        return kind(mine, lr=rates[k], weight_decay=0.01)  # type: ignore[call-arg]

    assert_bits_equal(trained(make, JointStep()), trained(make, apart), kind.__name__)


def test_different_rates_are_told_apart() -> None:
    """The control: with one rate for all the comparison above fails."""
    same = trained(lambda k, mine: torch.optim.Adam(mine, lr=0.1), JointStep())
    other = trained(lambda k, mine: torch.optim.Adam(mine, lr=(0.1, 0.2, 0.1)[k]), apart)
    with pytest.raises(AssertionError):
        assert_bits_equal(same, other, "rates")


def change_rates(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
    """As a scheduler does; in one step for one of them only."""
    for k, optimizer in enumerate(optimizers):
        optimizer.param_groups[0]["lr"] = 0.1 / (count + 1) * (2 if count == k == 2 else 1)


def add_group(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
    """A parameter that is found later."""
    if count == 3:
        every.append(nn.Parameter(torch.ones(3)))
        optimizers[1].add_param_group({"params": [every[-1]], "lr": 0.3})


def replace(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
    """A head that is exchanged for one of the same size."""
    if count == 2:
        optimizers[2].state.pop(every[4])
        every[4] = optimizers[2].param_groups[0]["params"][0] = nn.Parameter(torch.ones(2, 4))


def freeze(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
    """No gradient of one parameter for two steps: its state is made later."""
    held = every[2]
    optimizers[1].param_groups[0]["params"] = [every[3]] if count < 2 else [held, every[3]]


def load(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
    """States are put back."""
    if count == 4:
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("between", [change_rates, add_group, replace, freeze, load])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_what_changes_between_steps(kind: type[Optimizer], between: Any) -> None:
    more: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def make(k: int, mine: list[nn.Parameter]) -> Optimizer:
        return kind(mine, lr=0.1, **more)  # type: ignore[call-arg]

    found = trained(make, JointStep(), between)
    assert_bits_equal(found, trained(make, apart, between), between.__name__)


class Counting(torch.optim.Adam):
    """Somebody's own."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        """As its base, counted."""
        self.calls += 1
        return super().step(closure)


def test_foreign_code_is_called_for_each() -> None:
    counted: list[Optimizer] = []
    heard: list[Optimizer] = []

    def make(k: int, mine: list[nn.Parameter]) -> Optimizer:
        counted.append((Counting, torch.optim.Adam, torch.optim.Adam)[k](mine, lr=0.1))
        counted[-1].register_step_post_hook(lambda o, *_: heard.append(o)) if k == 1 else None
        return counted[-1]

    found = trained(make, JointStep())
    assert counted[0].calls == 6  # type: ignore[attr-defined]
    assert heard == [counted[1]] * 6
    assert_bits_equal(found, trained(make, apart), "with foreign code")


def test_schedulers_see_that_all_have_stepped(recwarn: pytest.WarningsRecorder) -> None:
    def make(k: int, mine: list[nn.Parameter]) -> Optimizer:
        optimizer = torch.optim.Adam(mine, lr=0.1)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1))
        return optimizer

    def between(count: int, optimizers: list[Optimizer], every: list[nn.Parameter]) -> None:
        for scheduler in schedulers if count else ():
            scheduler.step()

    schedulers: list[torch.optim.lr_scheduler.StepLR] = []
    found = trained(make, JointStep(), between)
    schedulers = []
    assert_bits_equal(found, trained(make, apart, between), "with schedulers")
    assert not recwarn.list
