"""Contexts that are no class probabilities: refused by heads that learn with cross entropy, with
what to pass instead; and contexts without features, by all.
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
from dni_fx.sources import Critic, Local

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import sgd

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
HEADS = ["local", "critic", "sobolev", "distill", "joint:local"]


class Told:
    """Its size is known by an attribute, its numbers only in a step."""

    features = 2

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode

    def __call__(self, target: Tensor) -> Tensor:
        return self.encode(target)


def _decoupled(gradients: Any, context: Any, target: Any = None) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    return dni_fx.decouple(
        net,
        ["1", "3"],
        example_inputs=(X,),
        gradients=gradients,
        context=context,
        example_target=target,
    )


def _step(decoupled: dni_fx.Decoupled, target: Tensor) -> None:
    dni_fx.Trainer(decoupled, F.mse_loss, optimizer=sgd).step(X, target=target)


@pytest.mark.parametrize("gradients", HEADS)
@pytest.mark.parametrize(
    ("target", "words"),
    [(Y, "below 0"), (Y.abs() + 1, "sums to"), ((Y > 0).float() * 2, "sums to")],
    ids=["signed", "positive", "several labels"],
)
def test_no_class_probabilities_are_refused(gradients: Any, target: Tensor, words: str) -> None:
    match = f"(?s)'1'.*class probabilities.*{words}.*loss='mse'"
    with pytest.raises(DecouplingError, match=match):
        _decoupled(gradients, lambda t: t, target)
    decoupled = _decoupled(gradients, Told(lambda t: t))
    before = state_of(decoupled.model)
    with pytest.raises(DecouplingError, match=match):
        _step(decoupled, target)
    assert_bits_equal(before, state_of(decoupled.model), "the model")


@pytest.mark.parametrize(
    "context",
    [
        lambda t: F.one_hot((t[:, 0] > 0).long(), 2).float(),
        lambda t: t.softmax(1),
        lambda t: t.softmax(1).bfloat16().float(),
        lambda t: t.softmax(1) * (t[:, :1] > 0),
    ],
    ids=["labels", "soft", "rounded", "ignored"],
)
@pytest.mark.parametrize("gradients", HEADS)
def test_class_probabilities_are_taken(gradients: Any, context: Callable[[Tensor], Tensor]) -> None:
    _step(_decoupled(gradients, context, Y), Y)
    _step(_decoupled(gradients, Told(context)), Y)


@pytest.mark.parametrize(
    "gradients",
    [
        "linear",
        partial(Local, loss="mse"),
        partial(Critic, loss="mse"),
        partial(Local, loss=lambda p, c: (p - c).abs().mean(-1)),
    ],
)
def test_other_sources_take_any_numbers(gradients: Any) -> None:
    _step(_decoupled(gradients, lambda t: t, Y), Y)
    _step(_decoupled(gradients, Told(lambda t: t)), Y)


def test_ignored_labels_alone_tell_nothing() -> None:
    decoupled = _decoupled("local", Told(lambda t: t))
    _step(decoupled, torch.zeros_like(Y))
    with pytest.raises(DecouplingError, match="below 0"):
        _step(decoupled, Y)


@pytest.mark.parametrize("gradients", ["linear", "mlp", "local", partial(Local, loss="mse")])
@pytest.mark.parametrize("target", [Y[:, 0], None], ids=["example", "labels"])
def test_a_context_without_features_is_refused(gradients: Any, target: Tensor | None) -> None:
    with pytest.raises(DecouplingError, match=r"\(12,\).*return \(batch, 1\).*unsqueeze\(1\)"):
        _decoupled(gradients, lambda t: t.float(), target)


def test_a_context_with_one_feature_is_taken() -> None:
    decoupled = _decoupled("linear", lambda t: t.float().unsqueeze(1), Y[:, 0])
    trainer = dni_fx.Trainer(decoupled, lambda o, t: F.mse_loss(o[:, 0], t), optimizer=sgd)
    trainer.step(X, target=Y[:, 0])
