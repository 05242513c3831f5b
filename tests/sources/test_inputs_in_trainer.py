"""Synthetic inputs inside the trainer: right ones change nothing, no stage waits for another."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.sources import InputSource
from dni_fx.sources.inputs import InputPrediction

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from ..helpers.training import batch, state, train, trainer_of
from ..models.small import CONVOLUTIONS
from ..models.zoo import BY_NAME
from .kit import noted


class Seer(InputSource):
    """Knows the value that is about to come, off by ``shift``."""

    def __init__(self, spec: Any, inputs: Any, model: Any = None, shift: float = 0.0) -> None:
        super().__init__(spec, inputs)
        self.shift = shift

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        return InputPrediction(self.coming + self.shift)

    def fit(self, prediction: InputPrediction, real: Tensor) -> Tensor | None:  # type: ignore[override]
        assert torch.allclose(prediction.value - self.shift, real) or self.shift
        return None


def foreseen(trainer: dni_fx.Trainer, x: Tensor) -> None:
    """Tell the seers what the stages will send."""
    model = copy.deepcopy(trainer.decoupled.model)
    for index, source in enumerate(trainer.decoupled.inputs.values()):
        x = model[index](x)
        source.coming = x.detach()  # type: ignore[assignment]


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_inputs_that_are_right_change_nothing(shift: float) -> None:
    plain, seen = trainer_of("linear"), trainer_of("linear", inputs=partial(Seer, shift=shift))
    for step in range(4):
        x, y = batch(step)
        foreseen(seen, x)
        seen.step(x, target=y)
        plain.step(x, target=y)
    if shift:
        with pytest.raises(AssertionError):
            assert_bits_equal(state(seen), state(plain), "negative control")
    else:
        assert_bits_equal(state(seen), state(plain), "perfect inputs")


@pytest.mark.parametrize("inputs", ["linear", None])
def test_no_stage_waits_for_the_forward_of_another(inputs: str | None) -> None:
    grads = []
    for scale in (1.0, 3.0):
        trainer = trainer_of("linear", inputs=inputs)
        train(trainer, 2)
        with torch.no_grad():
            trainer.decoupled.model[0].linear.weight.mul_(scale)
            trainer.decoupled.model[0].linear.weight[0] = scale
        seen: dict[str, Tensor] = {}
        noted(trainer, 2, seen)
        train(trainer, 1, first=2)
        grads.append(seen)
    if inputs:
        assert_bits_equal(grads[0], grads[1], "complete unlock")
    else:
        assert not torch.equal(grads[0]["linear.weight"], grads[1]["linear.weight"])


def test_synthetic_inputs_come_near_the_real_ones() -> None:
    trainer = trainer_of(
        "linear", inputs="mlp", synthesizer_optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    source = trainer.decoupled.inputs["0"]
    errors = []
    for step in range(400):
        x, y = batch(step, 64)
        trainer.step(x, target=y)
        real = trainer.decoupled.model[0](x).detach()
        errors.append(float((source.predict((x,)).value - real).norm() / real.norm()))
    assert errors[-1] < 0.3 < errors[0]


@pytest.mark.parametrize(
    "case",
    [
        "fan_out",
        "several_inputs",
        "unet",
        "two_towers",
        "transformer",
        "gpt",
        "nested_input",
        "views",
    ],
)
def test_inputs_on_zoo_models(case: str) -> None:
    chosen = BY_NAME[case]
    args, kwargs, target = oracles.draw(chosen, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        chosen.build(torch.float32, 0),
        list(chosen.cuts),
        example_inputs=args,
        example_kwargs=kwargs,
        inputs="auto",
    )
    trainer = dni_fx.Trainer(decoupled, chosen.loss, optimizer=sgd)
    for _ in range(3):
        trainer.step(*args, target=target, **kwargs)
    oracles.composed_check(chosen, torch.float32, decoupled=decoupled)


def test_a_value_without_a_batch_dimension_is_named() -> None:
    case = BY_NAME["lstm"]
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    with pytest.raises(DecouplingError, match=r"interface '.*leave this interface out"):
        dni_fx.decouple(
            case.build(torch.float32, 0),
            list(case.cuts),
            example_inputs=args,
            example_kwargs=kwargs,
            inputs="auto",
        )


def test_a_synthetic_input_of_another_size_is_named() -> None:
    trainer = trainer_of("linear", CONVOLUTIONS, inputs=lambda spec, inputs: Constant(spec, inputs))
    x, y = torch.randn(8, 3, 11, 5), batch(0)[1]
    with pytest.raises(DecouplingError, match="synthetic input at '0' has shape"):
        trainer.step(x, target=y)


class Constant(InputSource):
    """Always of the example's size."""

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        return InputPrediction(torch.zeros(self.spec.shape))

    def fit(self, prediction: InputPrediction, real: Tensor) -> None:  # type: ignore[override]
        return None


def test_evaluation_uses_the_real_chain() -> None:
    trainer = trainer_of("linear", inputs="linear")
    train(trainer, 3)
    x, _ = batch(0)
    trainer.decoupled.eval()
    assert_bits_equal(trainer.decoupled(x), trainer.decoupled.model(x), "evaluation")
