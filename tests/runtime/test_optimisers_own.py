"""A stage's optimiser owns that stage's parameters and no other's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError

X, Y = torch.randn(6, 4), torch.arange(6) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def trainer(model: nn.Module, **options: Any) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(model, ["1", "3"], example_inputs=(X,), gradients="linear")
    return dni_fx.Trainer(decoupled, F.cross_entropy, **options)


@pytest.mark.parametrize("shared", [True, False], ids=["one for all", "ignores its argument"])
def test_an_optimiser_of_all_parameters_is_refused(shared: bool) -> None:
    model = net()
    one = torch.optim.SGD(model.parameters(), 0.1)
    make: Callable[[Any], Any] = lambda _: one  # noqa: E731
    if not shared:
        make = lambda _: torch.optim.SGD(model.parameters(), 0.1)  # noqa: E731
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DecouplingError, match="for stage_0 that steps 4 parameters of others"):
        trainer(model, optimizer=make)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_source_optimiser_of_the_model_is_refused() -> None:
    model = net()
    with pytest.raises(DecouplingError, match="synthesizer_optimizer= returned an optimiser for"):
        trainer(
            model,
            optimizer=torch.optim.SGD,
            synthesizer_optimizer=lambda _: torch.optim.SGD(model.parameters(), 0.1),
        )


def test_one_that_takes_what_it_is_given_is_not() -> None:
    """Control; some of the parameters may be left out, too."""
    made = trainer(net(), optimizer=lambda named: torch.optim.SGD(list(named)[:1], 0.1))
    made.step(X, target=Y)
    assert {n: len(o.param_groups[0]["params"]) for n, o in made.optimizers.items()} == {
        "stage_0": 1, "stage_1": 1, "stage_2": 1
    }  # fmt: skip


def test_schedulers_before_the_model_is_traced() -> None:
    """There are no optimisers to schedule: said, instead of an empty dict."""
    trainer = dni_fx.Trainer(
        dni_fx.decouple(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), ["0"]),
        F.cross_entropy,
        optimizer=torch.optim.Adam,
    )
    with pytest.raises(DecouplingError, match=r"call trainer.prepare\(...\) with one batch"):
        list(trainer.optimizers.values())
    trainer.step(torch.randn(4, 6), target=torch.arange(4) % 3)
    assert set(trainer.optimizers) == {"stage_0", "stage_1"}
