"""A graph that lacks the plan's cuts is refused with what to do about it, and that helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.errors import PlanMismatchError

from ..helpers.optimisers import sgd
from .test_guards import Net, X


def by_mask(net: Net, h: torch.Tensor, x: torch.Tensor, *more: Any) -> torch.Tensor:
    """With a mask it is another operation."""
    return h.cos() * more[0] if more else h.sin()


def stepper(model: nn.Module, cuts: list[str], *inputs: torch.Tensor) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(model, cuts, example_inputs=inputs, gradients="exact")
    return dni_fx.Trainer(decoupled, nn.functional.cross_entropy, optimizer=sgd)


TARGET, MASK = torch.zeros(len(X), dtype=torch.long), torch.ones(len(X), 6)


def test_an_operation_as_a_cut_lies_elsewhere() -> None:
    trainer = stepper(Net(by_mask), ["a", "sin"], X)
    with pytest.raises(
        PlanMismatchError, match=r"name cuts by modules.*not by operations \('sin'\)"
    ):
        trainer.step(X, MASK, target=TARGET)
    trainer = stepper(Net(by_mask), ["a"], X)  # as the error says
    trainer.step(X, MASK, target=TARGET)


def test_a_frozen_module_needs_no_cut() -> None:
    model = Net(lambda net, h, x: net.more(h), more=nn.Linear(6, 6))
    trainer = stepper(model, ["a", "more"], X)
    model.a.requires_grad_(False)
    with pytest.raises(PlanMismatchError, match=r"decouple again.*is frozen \('a'\)"):
        trainer.step(X, target=TARGET)
    stepper(model, ["more"], X).step(X, target=TARGET)


def test_a_module_that_a_mode_leaves_out_is_not_called_frozen() -> None:
    """Negative control."""
    model = Net(lambda net, h, x: net.more(h) if net.training else h, more=nn.Linear(6, 6))
    trainer = stepper(model, ["a", "more"], X)
    model.eval()
    with pytest.raises(PlanMismatchError, match=r"'more'.*modules that every mode runs$") as caught:
        trainer.step(X, target=TARGET)
    assert "frozen" not in str(caught.value)
    assert "operations" not in str(caught.value)
