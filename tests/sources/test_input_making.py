"""Synthetic inputs: making them, and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources.inputs import (
    INPUTS,
    ConvInput,
    InputPrediction,
    InputRegression,
    InputSource,
    LinearInput,
    MLPInput,
    make_input,
)

from ..helpers.training import teach
from .values import FLOAT, IDS, MODEL_INPUTS, draw, input_spec, specs_of, value_spec


def test_auto_takes_convolutions_for_maps_that_an_input_lines_up_with() -> None:
    def kernel(value: str, given: str) -> int:
        return make_input("auto", value_spec(value), (input_spec(given),)).kernel

    assert [kernel("map2d", "image"), kernel("map1d", "tokens")] == [3, 3]
    others = [
        ("map2d", "vector"),
        ("map1d", "image"),
        ("sequence", "image"),
        ("vector", "image"),
        ("vector", "class"),
    ]
    assert [kernel(*pair) for pair in others] == [0] * 5


def test_sources_of_ones_own() -> None:
    class Constant(InputSource):
        def __init__(self, spec, inputs) -> None:
            super().__init__(spec, inputs)
            self.mean = nn.Parameter(torch.zeros(spec.shape[1:]))

        def predict(self, inputs):
            guess = self.mean.expand(inputs[0].shape[0], *self.mean.shape)
            return InputPrediction(guess.detach(), guess)

        def fit(self, prediction, real):
            return F.mse_loss(prediction.state, real.detach())

    spec, x = TensorSpec((4, 6), FLOAT), draw((4, 3), FLOAT)
    source = make_input(Constant, spec, specs_of(x))
    assert teach(source, ((x,),), torch.ones(4, 6), 300)[-1] < 0.01
    assert source.flops() == 0
    wide = make_input(partial(MLPInput, hidden=2, width=10), spec, specs_of(x))
    assert [layer.weight.shape for layer in wide.layers] == [(10, 3), (10, 10), (6, 10)]
    assert isinstance(
        make_input(lambda spec, inputs: LinearInput(spec, inputs), spec, specs_of(x)), LinearInput
    )
    assert set(INPUTS) == {"auto", "linear", "mlp", "conv"}

    with pytest.raises(NotImplementedError, match="must implement predict"):
        InputSource(spec, specs_of(x))((x,))
    with pytest.raises(NotImplementedError, match="must implement fit"):
        InputSource(spec, specs_of(x)).fit(source((x,)), x)


SPEC, GIVEN = TensorSpec((4, 6), FLOAT), (TensorSpec((4, 3), FLOAT),)


@pytest.mark.parametrize(
    ("option", "spec", "inputs", "message"),
    [
        (
            "liner",
            SPEC,
            GIVEN,
            "unknown synthetic input 'liner'; did you mean 'linear'.*Known: 'auto', 'linear'",
        ),
        (3, SPEC, GIVEN, "a name or a callable .*, but got 3"),
        (lambda spec: None, SPEC, GIVEN, r"must take \(spec, inputs\): too many"),
        (
            lambda spec, inputs: nn.Identity(),
            SPEC,
            GIVEN,
            "returned Identity, expected an InputSource",
        ),
        (
            InputRegression(SPEC, GIVEN),
            SPEC,
            GIVEN,
            "got a InputRegression object.*each interface makes its own",
        ),
        ("conv", SPEC, GIVEN, "'conv' needs maps .* shape .4, 6. .* Use 'linear' or 'mlp'"),
        (partial(ConvInput, kernel=4), value_spec("map2d"), GIVEN, "odd kernel.*kernel=4"),
        (partial(LinearInput, buckets=0), SPEC, GIVEN, "at least 1 bucket.*buckets=0"),
        (partial(MLPInput, hidden=-1), SPEC, GIVEN, "hidden=-1"),
        (partial(MLPInput, width=0), SPEC, GIVEN, "width=0"),
        (partial(MLPInput, norm="layer"), SPEC, GIVEN, "unknown norm 'layer'"),
        (
            "auto",
            TensorSpec((12, 6), FLOAT),
            GIVEN,
            r"shape \(12, 6\): its first dimension.*shapes \(4, 3\)",
        ),
        (
            "auto",
            TensorSpec((12, 6), FLOAT),
            GIVEN,
            "batch and time are merged.*leave this interface out of inputs",
        ),
        ("auto", TensorSpec((), FLOAT), GIVEN, r"shape \(\)"),
        ("auto", SPEC, (), "shapes none"),
        (
            "auto",
            SPEC,
            (TensorSpec((), FLOAT), TensorSpec((4, 2), torch.complex64)),
            r"shapes \(\), \(4, 2\)",
        ),
        (
            "auto",
            TensorSpec((4, 6, 1, 2, 3, 4), FLOAT, 1),
            GIVEN,
            "more than 3 dimensions of time or space",
        ),
    ],
)
def test_errors_when_made(option, spec: TensorSpec, inputs, message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        make_input(option, spec, inputs)


@pytest.mark.parametrize(
    ("value", "given", "wrong"),
    [
        ("vector", "vector", (draw((4, 5), FLOAT),)),
        ("vector", "vector", (draw((4, 3, 1), FLOAT),)),
        ("vector", "vector", (draw((4, 3), IDS),)),
        ("vector", "vector", ()),
        ("vector", "vector", (draw((4, 3), FLOAT),) * 2),
        ("vector", "tokens", (draw((4, 5), FLOAT),)),
        ("vector", "tokens", (draw((4, 5, 1), IDS),)),
        ("sequence", "sequence", (draw((4, 5, 4), FLOAT),)),
        ("map2d", "image", (draw((4, 1, 8, 6), FLOAT),)),
        ("map2d", "image", (draw((3, 8, 6), FLOAT),)),
        ("map2d", "bytes", (draw((4, 3, 8, 6), FLOAT),)),
    ],
)
def test_errors_at_run_time(value: str, given: str, wrong: tuple[Tensor, ...]) -> None:
    source = make_input("auto", value_spec(value), (input_spec(given),))
    with pytest.raises(DecouplingError, match="made for model inputs like") as error:
        source(wrong)
    assert str(MODEL_INPUTS[given][0]) in str(error.value)
    assert all(str(tuple(x.shape)) in str(error.value) for x in wrong)


def test_errors_of_sizes() -> None:
    source = make_input("auto", TensorSpec((4, 6), FLOAT), specs_of(draw((4, 3)), draw((4, 2))))
    with pytest.raises(DecouplingError, match=r"one batch size, but got shapes \(4, 3\), \(5, 2\)"):
        source((draw((4, 3)), draw((5, 2))))

    source = make_input("auto", TensorSpec((4, 17, 6), FLOAT), specs_of(draw((4, 16, 3))))
    prediction = source((draw((4, 32, 3), FLOAT),))
    with pytest.raises(
        DecouplingError, match=r"shape \(4, 34, 6\) for a real value of shape \(4, 33, 6\)"
    ):
        source.fit(prediction, draw((4, 33, 6), FLOAT))

    many = draw((2, 1, 3, 3, 3, 3), FLOAT)
    source = make_input("auto", TensorSpec((2, 6), FLOAT), specs_of(many))
    assert source((many,)).value.shape == (2, 6)
    with pytest.raises(
        DecouplingError, match=r"sizes \(3, 3, 3, 4\): made for \(3, 3, 3, 3\) only"
    ):
        source((draw((2, 1, 3, 3, 3, 4), FLOAT),))
