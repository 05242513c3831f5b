"""Contexts and heads are made from an example of a target; without one from documented attributes,
else from integer labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.sources import Local

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import sgd

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
BOXES = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


def _net(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, outputs)
    )


def _both(labels: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat((F.one_hot(labels, 3).float(), boxes), 1)


Case = tuple[Any, Callable[[Any], Tensor], int]
CASES: dict[str, Case] = {  # target, context, features
    "floats": (BOXES, lambda t: t, 4),
    "integers that are no labels": (LABELS[:, None].expand(12, 2), lambda t: t.float(), 2),
    "a dict": ({"labels": LABELS, "boxes": BOXES}, lambda t: _both(t["labels"], t["boxes"]), 7),
    "a tuple": ((LABELS, BOXES), lambda t: _both(*t), 7),
    "a list of dicts": (
        [{"box": b} for b in BOXES],
        lambda t: torch.stack([d["box"] for d in t]),
        4,
    ),
    "labels": (LABELS, dni_fx.one_hot(3), 3),
}


def _loss(output: Tensor, _: Any) -> Tensor:
    return F.mse_loss(output, BOXES)


@pytest.mark.parametrize("gradients", ["linear", "mlp", partial(Local, loss="mse")])
@pytest.mark.parametrize("name", CASES)
def test_any_target_makes_sources_and_trains(name: str, gradients: Any) -> None:
    target, context, features = CASES[name]
    decoupled = dni_fx.decouple(
        _net(),
        ["1", "3"],
        example_inputs=(X,),
        gradients=gradients,
        context=context,
        example_target=target,
    )
    for source in decoupled.sources.values():
        assert source.context_spec is not None
        assert source.context_spec.shape == (12, features)
    before = [p.detach().clone() for p in decoupled.model.parameters()]
    trainer = dni_fx.Trainer(decoupled, _loss, optimizer=sgd)
    for _ in range(4):  # some sources start at zero, and learn from those behind them
        trainer.step(X, target=target)
    pairs = zip(before, decoupled.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
    trainer.diagnose(X, target=target)


def test_it_changes_no_number() -> None:
    """Where attributes or labels said the same, training is the same bit for bit."""
    trainers = []
    for options in ({}, {"example_target": LABELS}):
        torch.manual_seed(1)
        decoupled = dni_fx.decouple(
            _net(3), ["1", "3"], example_inputs=(X,), context=dni_fx.one_hot(3), **options
        )
        trainers.append(dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd))
        for _ in range(3):
            trainers[-1].step(X, target=LABELS)
    assert_bits_equal(*(state_of(t.decoupled) for t in trainers), "with an example")


def test_without_one_the_error_names_it() -> None:
    target, context, _ = CASES["a dict"]
    with pytest.raises(DecouplingError, match="example_target="):
        dni_fx.decouple(_net(), ["1"], example_inputs=(X,), context=context)
    with pytest.raises(DecouplingError, match="example_target="):
        dni_fx.decouple(_net(), ["1"], example_inputs=(X,), context=lambda t: t)
    with pytest.raises(DecouplingError, match="example_target="):
        dni_fx.decouple(_net(), ["1"], example_inputs=(X,), context=lambda t: t.float()[:5])
    with pytest.raises(DecouplingError, match="example_target="):
        dni_fx.plan_cuts(_net(), (X,), context=context)
    dni_fx.plan_cuts(_net(), (X,), context=context, example_target=target, stages=2)


class _Positions:
    """The documented attributes, of a callable that labels would not do for."""

    features, positions = 4, 1

    def __call__(self, target: Any) -> Tensor:
        found: Tensor = target["boxes"]
        return found


def test_the_documented_attributes() -> None:
    x = torch.randn(12, 5, 8)
    decoupled = dni_fx.decouple(
        _net(), ["1"], example_inputs=(x,), gradients="linear", context=_Positions()
    )
    (source,) = decoupled.sources.values()
    assert source.context_spec is not None
    assert source.context_spec.shape == (12, 1, 4)
    trainer = dni_fx.Trainer(decoupled, lambda o, t: F.mse_loss(o, t["boxes"]), optimizer=sgd)
    trainer.step(x, target={"boxes": torch.randn(12, 5, 4)})


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda t: t["nothing"], "KeyError"),
        (lambda t: t["labels"], "int64"),
        (lambda t: t["boxes"].sum(), r"\(\)"),
        (lambda t: None, "NoneType"),
        (dni_fx.one_hot(3), "integer labels"),
    ],
)
def test_a_context_that_fails_on_its_example(context: Any, words: str) -> None:
    target = CASES["a dict"][0]
    with pytest.raises(DecouplingError, match=rf"(?s)example_target=.*{words}"):
        dni_fx.decouple(_net(), ["1"], example_inputs=(X,), context=context, example_target=target)


def test_the_target_and_random_numbers_are_left_alone() -> None:
    def noisy(target: Tensor) -> Tensor:
        return target + torch.randn_like(target)

    net, target, rng = _net(), BOXES.clone(), torch.get_rng_state()
    dni_fx.decouple(net, ["1"], example_inputs=(X,), context=noisy, example_target=target)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(target, BOXES)


def test_traced_at_the_first_call() -> None:
    target, context, features = CASES["a tuple"]
    decoupled = dni_fx.decouple(_net(), ["1"], context=context, example_target=target)
    trainer = dni_fx.Trainer(decoupled, _loss, optimizer=sgd)
    trainer.step(X, target=target)
    (source,) = decoupled.sources.values()
    assert source.context_spec is not None
    assert source.context_spec.shape == (12, features)
