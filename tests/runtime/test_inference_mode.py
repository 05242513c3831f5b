"""Inference mode: calling works, also where the model is traced then; training in it, and on
tensors of it, is refused by name, and nothing is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from .refusals import X, Y, everything


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _trainer(**options: Any) -> dni_fx.Trainer:
    return dni_fx.Trainer(dni_fx.decouple(_net(), ["1"], **options), F.cross_entropy, optimizer=sgd)


def _inside(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make()


def test_a_first_call_inside_traces_a_model_that_trains_afterwards() -> None:
    lazy, ready = _trainer(), _trainer(example_inputs=(X,))
    with torch.inference_mode():
        assert torch.equal(lazy.decoupled(X), lazy.decoupled.model(X))
        other = torch.randn(3, 6)  # made inside
        assert torch.equal(lazy.decoupled(other), lazy.decoupled.model(other))
    assert not any(p.is_inference() for p in lazy.decoupled.parameters())
    for _ in range(2):
        mine, other_loss = (t.step(X, target=Y).loss for t in (lazy, ready))
        assert torch.equal(mine, other_loss)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: dni_fx.decouple(m, ["1"], example_inputs=(X,)),
        lambda m: dni_fx.decouple(m, ["1"]),
        lambda m: dni_fx.plan_cuts(m, (X,)),
        lambda m: dni_fx.list_cut_points(m, (X,)),
    ],
)
def test_transforms_inside_are_refused(use: Callable[[nn.Module], Any]) -> None:
    net = _net()
    with torch.inference_mode(), pytest.raises(DecouplingError, match="inference_mode"):
        use(net)
    use(net)


def test_steps_inside_are_refused() -> None:
    trainer = _trainer(example_inputs=(X,), gradients="linear")
    before = everything(trainer)
    with torch.inference_mode(), pytest.raises(DecouplingError, match="inference_mode"):
        trainer.step(X, target=Y)
    assert_bits_equal(everything(trainer), before, "after the refusal")
    windows = decouple_through_time(nn.LSTM(3, 4), 4, loss=F.mse_loss, optimizer=sgd)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 4)
    with torch.inference_mode(), pytest.raises(DecouplingError, match="inference_mode"):
        windows.step(x, target=y)
    windows.step(x, target=y)


@pytest.mark.parametrize("what", ["input", "target", "nested target", "drop-in"])
def test_tensors_made_inside_are_refused(what: str) -> None:
    x, y = _inside(X.clone), _inside(Y.clone)
    trainer = _trainer(example_inputs=(X,), gradients="linear")
    m = trainer.decoupled.as_module()
    trainer.loss = lambda o, t: F.cross_entropy(o, t["y"] if isinstance(t, dict) else t)
    calls: dict[str, Callable[[], Any]] = {
        "input": lambda: trainer.step(x, target=Y),
        "target": lambda: trainer.step(X, target=y),
        "nested target": lambda: trainer.step(X, target={"y": y}),
        "drop-in": lambda: m(x),
    }
    before = everything(trainer)
    with pytest.raises(DecouplingError, match=r"inference mode.*clone"):
        calls[what]()
    assert_bits_equal(everything(trainer), before, "after the refusal")
    trainer.step(x.clone(), target={"y": y.clone()})


def test_a_model_made_inside_is_refused() -> None:
    with torch.inference_mode():
        net = _net()
    with pytest.raises(DecouplingError, match=r"'0\.weight' was made in inference mode"):
        dni_fx.decouple(net, ["1"], example_inputs=(X,))
    dni_fx.decouple(copy.deepcopy(net), ["1"], example_inputs=(X,))  # the copy is an ordinary one


class _Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h * 2 if torch.is_inference_mode_enabled() else h
        y: Tensor = self.second(h)
        return y


def test_a_model_that_asks_for_the_mode_is_refused_inside() -> None:
    model = _Asks()
    decoupled = dni_fx.decouple(model, ["first"], example_inputs=(X,))
    with torch.inference_mode(), pytest.raises(DecouplingError, match="inference mode"):
        decoupled(X)
    with torch.no_grad():
        assert torch.equal(decoupled(X), model(X))
