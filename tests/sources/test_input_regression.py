"""Synthetic inputs: the regression."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.plan import TensorSpec
from dni_fx.sources.inputs import ConvInput, InputRegression, InputSource, LinearInput, make_input

from ..helpers.training import teach
from .values import FLOAT, IDS, VALUES, draw, input_spec, specs_of, value_spec


def solve(source: InputSource, inputs, real: Tensor) -> float:
    """The loss that a second-order method gets to."""
    optimizer = torch.optim.LBFGS(
        source.parameters(),
        max_iter=1000,
        tolerance_grad=1e-14,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = source.fit(source.predict(inputs), real)
        loss.backward()
        return loss

    optimizer.step(closure)
    return source.fit(source.predict(inputs), real).item()


def linear_case(kind: str) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """Inputs, a value that is linear in what they are lined up to, its feature dimension."""
    if kind == "vector":
        x, z = draw((40, 2, 3)), draw((40, 4), seed=1)
        return (x, z), torch.cat((x.flatten(1), z), 1) @ draw((10, 6), seed=2) + 1, -1
    if kind == "sequence":
        x, z = draw((8, 5, 3)), draw((8, 4), seed=1)
        return (x, z), x @ draw((3, 6), seed=2) + (z @ draw((4, 6), seed=3))[:, None], -1
    if kind == "tokens":
        x = torch.randint(0, 10, (8, 12))
        return (x,), draw((10, 6), seed=1)[x], -1
    x, z = draw((4, 3, 8, 6)), draw((4, 4), seed=1)
    by_position = torch.einsum("bchw,cf->bfhw", F.avg_pool2d(x, 2), draw((3, 6), seed=2))
    return (x, z), by_position + (z @ draw((4, 6), seed=3))[:, :, None, None], 1


@pytest.mark.parametrize("kind", ["vector", "sequence", "tokens", "map"])
def test_linear_reaches_zero_error_on_a_linear_value(kind: str) -> None:
    inputs, value, feature_dim = linear_case(kind)
    spec = TensorSpec(tuple(value.shape), value.dtype, feature_dim)
    option = partial(LinearInput, buckets=16) if kind == "tokens" else "linear"
    assert solve(make_input(option, spec, specs_of(*inputs)), inputs, value) < 1e-12
    beyond = solve(
        make_input(option, spec, specs_of(*inputs)), inputs, value + draw(value.shape, seed=9)
    )
    assert beyond > 1e-3  # what is not a function of the inputs cannot be predicted


def test_a_hidden_layer_predicts_what_linear_cannot() -> None:
    x = draw((64, 2))
    value = (x[:, :1] * x[:, 1:]).expand(-1, 3)
    spec = TensorSpec((64, 3), torch.float64)
    linear, mlp = (
        teach(make_input(name, spec, specs_of(x)), ((x,),), value, 400)[-1]
        for name in ("linear", "mlp")
    )
    assert mlp < 0.1 < 0.5 < linear


def test_convolutions_see_neighbours_and_the_rest_does_not() -> None:
    x = draw((16, 1, 8, 8))
    value = F.conv2d(x, draw((2, 1, 3, 3), seed=1), padding=1)
    spec = TensorSpec((16, 2, 8, 8), torch.float64, 1)
    linear, conv = (
        teach(make_input(name, spec, specs_of(x)), ((x,),), value, 300)[-1]
        for name in ("mlp", "conv")
    )
    assert conv < 0.1 < 0.5 < linear


def test_vectors_become_maps_that_vary_over_space() -> None:
    z = draw((8, 4))
    value = z[:, :1, None, None] + torch.linspace(-1, 1, 6, dtype=torch.float64).expand(8, 2, 5, 6)
    spec = TensorSpec((8, 2, 5, 6), torch.float64, 1)
    assert solve(make_input("linear", spec, specs_of(z)), (z,), value) < 1e-12


def test_the_scale_is_one_and_then_the_running_root_mean_square() -> None:
    x, spec = draw((4, 3)), TensorSpec((4, 6), torch.float64)
    source = make_input("linear", spec, specs_of(x))
    prediction = source((x,))
    assert torch.equal(prediction.value, prediction.state.detach())  # scale 1
    source.fit(prediction, torch.zeros(4, 6, dtype=torch.float64))
    source.fit(prediction, torch.full((4, 6), math.nan, dtype=torch.float64))
    assert source.scale == 1  # neither says anything about the scale

    first, second = 50 * draw((4, 6), seed=1), draw((4, 6), seed=2)
    loss = source.fit(prediction, first)
    rms = first.square().mean().sqrt()
    assert source.scale.item() == pytest.approx(rms.item())
    assert loss.item() == pytest.approx((prediction.state - first / rms).square().mean().item())
    assert torch.allclose(source((x,)).value, rms * prediction.state)

    source.fit(prediction, second)
    both = (0.5 * (first.square().mean() + second.square().mean())).sqrt()
    assert source.scale.item() == pytest.approx(both.item())
    for _ in range(200):
        source.fit(prediction, second)
    assert source.count == 100


def test_fit_reaches_the_synthesizer_and_nothing_else() -> None:
    x, real = draw((4, 3), FLOAT).requires_grad_(), draw((4, 6), FLOAT, seed=1).requires_grad_()
    source = make_input("mlp", TensorSpec((4, 6), FLOAT), specs_of(x))
    source.fit(source((x,)), real).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in source.parameters())
    assert x.grad is None
    assert real.grad is None


@pytest.mark.parametrize("value", VALUES)
def test_a_batch_differs_from_the_start(value: str) -> None:
    """Else a stage that begins with a batch normalisation would divide by no variance."""
    source = make_input("auto", value_spec(value), (TensorSpec((4, 3, 8, 6), FLOAT, 1),))
    x = draw((4, 3, 8, 6), FLOAT)
    assert source((x,)).value.var(0).min() > 0
    with torch.no_grad():  # the start of a gradient's synthesizer
        source.layers[-1].weight.zero_()
    assert source((x,)).value.var(0).max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_predictions_have_the_dtype_of_the_value(dtype: torch.dtype) -> None:
    x, real = draw((4, 3), dtype), draw((4, 6), dtype, seed=1)
    source = make_input("mlp", TensorSpec((4, 6), dtype), specs_of(x))
    assert source((x,)).value.dtype == dtype
    assert {p.dtype for p in source.parameters()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    losses = teach(source, ((x,),), real)
    assert losses[-1] < losses[0]
    assert source.double()((x.double(),)).value.dtype == torch.float64  # along with the model


def test_autocast() -> None:
    x = draw((4, 3, 8, 6), FLOAT)
    source = make_input("auto", value_spec("map2d"), specs_of(x))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = source((x,))
        loss = source.fit(prediction, draw((4, 6, 4, 3), FLOAT, seed=1))
    loss.backward()
    assert prediction.state.dtype == torch.bfloat16
    assert prediction.value.dtype == FLOAT


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    ("value", "over"), [("vector", (0,)), ("sequence", (0, 1)), ("map2d", (0, 2, 3))]
)
def test_hidden_layers_are_normalized(value: str, over: tuple[int, ...], norm: str) -> None:
    maps = value == "map2d"
    x = draw((4, 3, 4, 3) if maps else (4, *VALUES[value][0][1:-1], 3))
    source = make_input(
        partial(InputRegression, norm=norm), value_spec(value, torch.float64), specs_of(x)
    )
    first, second = source.layers
    seen: list[Tensor] = []
    second.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    before: list[Tensor] = []
    first.register_forward_hook(lambda module, args, output: before.append(output))
    source((x,))
    h = before[0]
    if norm == "batch":
        h = (h - h.mean(over, keepdim=True)) / (
            h.var(over, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
    torch.testing.assert_close(seen[0], h.relu())
    assert len(list(source.norms.parameters())) == (2 if norm == "batch" else 0)


def test_no_random_number_is_drawn() -> None:
    x, spec = draw((4, 5), IDS), value_spec("sequence")
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    source = make_input("auto", spec, specs_of(x))
    source.fit(source((x,)), draw(spec.shape, FLOAT)).backward()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    torch.manual_seed(0)
    first = make_input("auto", spec, specs_of(x)).state_dict()
    torch.manual_seed(1)
    second = make_input("auto", spec, specs_of(x)).state_dict()
    assert not torch.equal(
        first["layers.0.weight"], second["layers.0.weight"]
    )  # weights follow the seed


def test_a_state_dict_is_the_whole_state() -> None:
    x, spec = draw((4, 5), IDS), value_spec("sequence")
    source, other = (make_input("mlp", spec, specs_of(x)) for _ in range(2))
    teach(source, ((x,),), draw(spec.shape, FLOAT))
    assert not torch.equal(source((x,)).value, other((x,)).value)
    other.load_state_dict(source.state_dict())
    assert torch.equal(source((x,)).value, other((x,)).value)
    assert set(source.state_dict()) == {
        "scale",
        "count",
        "lineup.embeddings.0.weight",
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "norms.0.weight",
        "norms.0.bias",
    }


def test_flops_are_counted_for_the_example() -> None:
    flat = make_input("mlp", TensorSpec((4, 6), FLOAT), (TensorSpec((4, 3), FLOAT),))
    assert flat.flops() == 2 * 4 * (3 * 64 + 64 * 6)
    maps = ConvInput(value_spec("map2d"), (input_spec("image"),), hidden=2, kernel=5, width=7)
    assert maps.flops() == 2 * 4 * 12 * 25 * ((3 + 2) * 7 + 7 * 7 + 7 * 6)
    assert {p.device.type for p in maps.parameters()} == {"cpu"}
