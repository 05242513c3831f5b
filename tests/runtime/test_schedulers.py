"""Optimisers exist as soon as the model is traced; asked for before, they are not silently none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time

from ..helpers.optimisers import sgd
from .refusals import X, Y


def _decoupled(**options: Any) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return dni_fx.decouple(net, ["1"], gradients="linear", **options)


def _trainer(decoupled: dni_fx.Decoupled) -> dni_fx.Trainer:
    return dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)


def _windows() -> Any:
    return decouple_through_time(nn.LSTM(3, 4), 4, loss=F.mse_loss, optimizer=sgd)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _trainer(_decoupled()),
        lambda: _trainer(copy.deepcopy(_decoupled(example_inputs=(X,)))),
        _windows,
    ],
    ids=["lazy", "copied", "through time"],
)
@pytest.mark.parametrize("which", ["optimizers", "synthesizer_optimizers"])
def test_before_the_model_is_traced(make: Callable[[], Any], which: str) -> None:
    with pytest.raises(DecouplingError, match=r"trainer\.prepare"):
        getattr(make(), which)


@pytest.mark.parametrize("how", ["examples", "prepare", "call", "step"])
def test_once_it_is_traced(how: str) -> None:
    trainer = _trainer(_decoupled(**({"example_inputs": (X,)} if how == "examples" else {})))
    if how == "prepare":
        before = [p.detach().clone() for p in trainer.decoupled.model.parameters()]
        assert trainer.prepare(X, target=Y) is trainer
        pairs = zip(before, trainer.decoupled.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if how == "call":
        trainer.decoupled(X)
    if how == "step":
        trainer.step(X, target=Y)
    schedulers = [StepLR(o, 1, 0.1) for o in trainer.optimizers.values()]
    assert list(trainer.optimizers) == ["stage_0", "stage_1"]
    assert list(trainer.synthesizer_optimizers) == ["1"]
    first = [o.param_groups[0]["lr"] for o in trainer.optimizers.values()]
    for _ in range(2):
        trainer.step(X, target=Y)
        for scheduler in schedulers:
            scheduler.step()
    last = [o.param_groups[0]["lr"] for o in trainer.optimizers.values()]
    assert last == pytest.approx([rate * 0.01 for rate in first])


def test_through_time() -> None:
    trainer = _windows()
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 4)
    assert trainer.prepare(x) is trainer
    schedulers = [StepLR(o, 1, 0.1) for o in trainer.optimizers.values()]
    (optimizer,) = trainer.optimizers.values()
    first = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        trainer.step(x, target=y)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first * 1e-3)
