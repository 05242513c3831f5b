"""What a decoupled model holds: one frozen recipe, and graphs that belong to its own model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.passes.search.choosing import Search
from dni_fx.recurrent import decouple_through_time


def decoupled(**options: object) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(5, 4),), **options)


def test_the_recipe_is_what_was_asked_for_and_frozen() -> None:
    recipe = decoupled(gradients="linear", check=False).graphs.recipe
    assert (recipe.cuts, recipe.gradients, recipe.check) == (("1",), "linear", False)
    assert recipe.wanted is None
    assert dataclasses.replace(recipe, cuts=Search(3)).wanted == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.gradients = "zero"  # type: ignore[misc]


def test_a_copy_is_traced_at_its_first_call() -> None:
    first, x = decoupled(), torch.randn(5, 4)
    other = copy.deepcopy(first)
    assert other.plan == first.plan
    with pytest.raises(dni_fx.DecouplingError, match="not traced yet"):
        other.stages[0].module  # noqa: B018  raises
    assert torch.equal(other(x), first(x))
    with torch.no_grad():
        other.model[0].weight.zero_()
    assert not torch.equal(other(x), first(x))
    assert other.stages[0].module.code == first.stages[0].module.code


def test_a_copy_of_a_window_traces_its_own_model() -> None:
    torch.manual_seed(0)
    trained = decouple_through_time(
        nn.GRUCell(3, 2), 3, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, 0.0)
    )
    trained.step(torch.randn(3, 4, 3), target=torch.randn(3, 4, 2))
    first = trained.decoupled
    other = copy.deepcopy(first)
    for each in (first, other):
        opening = each.graphs.recipe.opening
        assert opening is not None
        assert dict(opening.module.named_modules())["model"] is each.model
    assert first.model is not other.model
    x, state = torch.randn(3, 4, 3), {"0": torch.zeros(4, 2)}
    with torch.no_grad():
        other.model.weight_ih.zero_()
        assert not torch.equal(other(x, state), first(x, state))
