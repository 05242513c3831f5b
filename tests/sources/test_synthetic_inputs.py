"""Synthetic inputs: the regression, how inputs of every kind are lined up with values of every
kind, making them.
"""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources.align_inputs import Lineup
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

VALUES = {
    "vector": ((4, 6), -1),
    "one feature": ((4,), -1),
    "sequence": ((4, 5, 6), -1),
    "channels last": ((4, 4, 3, 6), -1),
    "map1d": ((4, 6, 4), 1),
    "map2d": ((4, 6, 4, 3), 1),
    "map3d": ((4, 6, 2, 2, 2), 1),
}
# Shape, feature dimension as a traced model's spec has it, dtype, dimensions that may change
# besides the batch.
FLOAT, IDS = torch.float32, torch.int64
MODEL_INPUTS = {
    "vector": ((4, 3), -1, FLOAT, ()),
    "number": ((4,), -1, FLOAT, ()),
    "sequence": ((4, 5, 3), -1, FLOAT, (1,)),
    "signal": ((4, 1, 16), -1, FLOAT, (2,)),
    "tokens": ((4, 5), -1, IDS, (1,)),
    "class": ((4,), -1, torch.int32, ()),
    "mask": ((4, 5), -1, torch.bool, ()),
    "image": ((4, 3, 8, 6), 1, FLOAT, (2, 3)),
    "channels last": ((4, 8, 6, 3), -1, FLOAT, (1, 2)),
    "bytes": ((4, 3, 8, 6), 1, torch.uint8, (2, 3)),
    "volume": ((4, 2, 4, 4, 4), 1, FLOAT, (2, 3, 4)),
}
# What doubles in a value when an input's time or space doubles; all else keeps its size.
DOUBLED = {
    ("sequence", "sequence"): (2,),
    ("sequence", "signal"): (2,),
    ("sequence", "tokens"): (2,),
    ("sequence", "image"): (4,),
    ("sequence", "channels last"): (4,),
    ("sequence", "bytes"): (4,),
    ("sequence", "volume"): (8,),
    ("channels last", "sequence"): (2, 1),  # an image without a channel dimension
    ("channels last", "image"): (2, 2),
    ("channels last", "channels last"): (2, 2),
    ("channels last", "bytes"): (2, 2),
    ("map1d", "sequence"): (2,),
    ("map1d", "signal"): (2,),
    ("map1d", "tokens"): (2,),
    ("map1d", "image"): (4,),
    ("map1d", "channels last"): (4,),
    ("map1d", "bytes"): (4,),
    ("map1d", "volume"): (8,),
    ("map2d", "sequence"): (2, 1),
    ("map2d", "image"): (2, 2),
    ("map2d", "channels last"): (2, 2),
    ("map2d", "bytes"): (2, 2),
    ("map3d", "image"): (1, 2, 2),
    ("map3d", "bytes"): (1, 2, 2),
    ("map3d", "channels last"): (2, 2, 1),
    ("map3d", "volume"): (2, 2, 2),
}
PAIRS = [(value, given) for value in VALUES for given in MODEL_INPUTS]
# Where a dimension of features would be doubled: without it (a signal lies in the last dimension,
# for a vector unseen).
FIXED = [
    ("vector", "signal"),
    ("one feature", "signal"),
    ("channels last", "signal"),
    ("map2d", "signal"),
    ("map3d", "signal"),
]


def value_spec(kind: str, dtype: torch.dtype = FLOAT) -> TensorSpec:
    shape, feature_dim = VALUES[kind]
    return TensorSpec(shape, dtype, feature_dim)


def input_spec(kind: str) -> TensorSpec:
    shape, feature_dim, dtype, _ = MODEL_INPUTS[kind]
    return TensorSpec(shape, dtype, feature_dim)


def draw(shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)


def specs_of(*tensors: Tensor) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tuple(x.shape), x.dtype, 1 if x.dim() > 3 else -1) for x in tensors)


def train(
    source: InputSource, inputs, real: Tensor, steps: int = 10, rate: float = 0.01
) -> list[float]:
    optimizer = torch.optim.Adam(source.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = source.fit(source.predict(inputs), real)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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


# ---------------------------------------------------------------------------------------------- sha


@pytest.mark.parametrize("name", ["auto", "linear", "mlp"])
@pytest.mark.parametrize(("value", "given"), PAIRS)
def test_every_value_from_every_input(value: str, given: str, name: str) -> None:
    spec, (shape, _, dtype, changing) = value_spec(value), MODEL_INPUTS[given]
    source = make_input(name, spec, (input_spec(given),))
    keys = {key: tuple(tensor.shape) for key, tensor in source.state_dict().items()}
    x = draw(shape, dtype)

    prediction = source((x,))
    assert prediction.value.shape == spec.shape
    assert prediction.value.dtype == spec.dtype
    assert not prediction.value.requires_grad
    losses = train(source, (x,), draw(spec.shape, spec.dtype, seed=1))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in source.parameters())

    if (value, given) not in FIXED:
        larger = [n * 2 if d in changing else n for d, n in enumerate(shape)]
        factors = DOUBLED.get((value, given), (1,) * 3)
        first = 2 if spec.feature_dim == 1 else 1
        expected = [7, *spec.shape[1:]]
        for dim, factor in zip(range(first, first + len(spec.shape) - 2), factors, strict=False):
            expected[dim] *= factor
        assert list(source((draw([7, *larger[1:]], dtype),)).value.shape) == expected
    assert {key: tuple(tensor.shape) for key, tensor in source.state_dict().items()} == keys


@pytest.mark.parametrize("given", MODEL_INPUTS)
@pytest.mark.parametrize("value", ["map1d", "map2d", "map3d"])
def test_convolutions_over_maps_from_every_input(value: str, given: str) -> None:
    spec, (shape, _, dtype, _) = value_spec(value), MODEL_INPUTS[given]
    source = make_input("conv", spec, (input_spec(given),))
    x = draw(shape, dtype)
    assert source((x,)).value.shape == spec.shape
    losses = train(source, (x,), draw(spec.shape, spec.dtype, seed=1))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("value", VALUES)
def test_all_inputs_at_once(value: str) -> None:
    spec = value_spec(value)
    source = make_input("auto", spec, tuple(map(input_spec, MODEL_INPUTS)))
    inputs = tuple(
        draw(shape, dtype, seed=i) for i, (shape, _, dtype, _) in enumerate(MODEL_INPUTS.values())
    )
    first = source(inputs).value
    assert first.shape == spec.shape
    for i, x in enumerate(inputs):  # each of them matters
        other = x.logical_not() if x.dtype == torch.bool else x + 1
        assert not torch.equal(source((*inputs[:i], other, *inputs[i + 1 :])).value, first)


@pytest.mark.parametrize(
    ("given", "value", "now", "expected"),
    [
        ((2, 3, 32, 32), (2, 8, 8, 8), (5, 3, 64, 48), (5, 8, 16, 12)),
        (
            (2, 3, 32, 32),
            (2, 8, 16, 16),
            (2, 3, 33, 31),
            (2, 8, 17, 16),
        ),  # as stride 2 with padding
        ((2, 3, 224, 224), (2, 8, 7, 7), (2, 3, 224, 224), (2, 8, 7, 7)),
        (
            (2, 3, 223, 221),
            (2, 8, 7, 7),
            (2, 3, 223, 221),
            (2, 8, 7, 7),
        ),  # exact in the example whatever the ratio
        ((2, 3, 8, 8), (2, 8, 4, 4), (2, 3, 1, 1), (2, 8, 1, 1)),
        ((2, 3, 4, 4), (2, 8, 16, 16), (2, 3, 6, 5), (2, 8, 24, 20)),
    ],
)
def test_sizes_follow_the_ratio_of_the_example(given, value, now, expected) -> None:
    source = make_input("auto", TensorSpec(value, FLOAT, 1), (TensorSpec(given, FLOAT, 1),))
    assert source((draw(now, FLOAT),)).value.shape == expected


def test_a_decoder_takes_its_own_length() -> None:
    inputs = TensorSpec((2, 9), IDS), TensorSpec((2, 6), IDS)
    source = make_input("auto", TensorSpec((2, 6, 8), FLOAT), inputs)
    assert source((draw((2, 11), IDS), draw((2, 4), IDS))).value.shape == (2, 4, 8)


# --------------------------------------------------------------------------------------------------


def lined_up(value: TensorSpec, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    return Lineup(value, specs_of(*inputs), 4096, torch.float64)(inputs, torch.float64)


def test_vectors_get_flat_inputs() -> None:
    x, y = draw((4, 3, 5, 2)), draw((4,))
    local, shared = lined_up(TensorSpec((4, 6), torch.float64), x, y)
    assert shared is None
    assert torch.equal(local, torch.cat((x.flatten(1), y[:, None]), 1))


def test_large_images_are_pooled_before_they_are_flattened() -> None:
    x = draw((2, 3, 224, 224))
    local, _ = lined_up(TensorSpec((2, 6), torch.float64), x)
    assert torch.equal(local, F.adaptive_avg_pool2d(x, (36, 36)).flatten(1))
    assert 3 * 36 * 36 <= 4096 < 3 * 37 * 37
    source = make_input(
        "mlp", TensorSpec((2, 2048), FLOAT), (TensorSpec((2, 3, 224, 224), FLOAT, 1),)
    )
    assert sum(p.numel() for p in source.parameters()) < 2e7


def test_maps_get_pooled_images_planes_and_coordinates() -> None:
    x, z = draw((4, 3, 8, 6)), draw((4, 5), seed=1)
    local, shared = lined_up(TensorSpec((4, 6, 4, 3), torch.float64, 1), x, z)
    assert torch.allclose(local[:, 2:], F.avg_pool2d(x, 2))
    assert local[0, 0, :, 0].tolist() == local[3, 0, :, 2].tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert torch.equal(shared, z)


def test_sequences_get_patches_of_images() -> None:
    x = draw((2, 3, 28, 28))
    local, _ = lined_up(TensorSpec((2, 49, 8), torch.float64), x)
    assert torch.allclose(local[:, 1:], F.avg_pool2d(x, 4).flatten(2))
    with_class_token, _ = lined_up(TensorSpec((2, 50, 8), torch.float64), x)
    assert with_class_token.shape == (2, 4, 50)


def test_positions_in_time_keep_their_coordinate_when_sequences_get_longer() -> None:
    lineup = Lineup(
        TensorSpec((2, 5, 8), torch.float64),
        (TensorSpec((2, 5, 3), torch.float64),),
        8,
        torch.float64,
    )
    short, long = (lineup((draw((2, n, 3)),), torch.float64)[0][0, 0] for n in (5, 9))
    assert torch.equal(short, long[:5])


@pytest.mark.parametrize(
    ("value", "value_dim", "given", "given_dim", "positions"),
    [
        ((2, 5, 6), -1, (2, 5, 3), -1, (5,)),
        ((2, 49, 6), -1, (2, 1, 16000), -1, (16000,)),  # speech, features first
        ((2, 17, 6), -1, (2, 16, 24), -1, (16,)),  # a class token was added
        ((2, 64, 100), 1, (2, 1, 400), -1, (400,)),
        ((2, 64, 100), 1, (2, 100, 300), -1, (100,)),  # time first, transposed by the model
        ((2, 64, 61), 1, (2, 64, 1000), -1, (1000,)),
        ((2, 64, 7, 7), 1, (2, 3, 28, 28), 1, (28, 28)),
        ((2, 64, 7, 7), 1, (2, 28, 28, 3), 1, (28, 28)),  # channels last, which specs do not know
        ((2, 7, 7, 64), -1, (2, 28, 28, 3), -1, (28, 28)),
        ((2, 64, 14, 14), 1, (2, 28, 28), -1, (28, 28)),  # no channel dimension
        ((2, 64, 400), 1, (2, 16000), -1, (16000,)),
        ((2, 64, 400), 1, (2, 100), -1, None),  # too short for a signal: a vector
        ((2, 5, 6), -1, (2, 5), -1, (5,)),  # a weight per token
        ((2, 5, 6), -1, (2, 8), -1, None),
    ],
)
def test_which_dimensions_are_positions(value, value_dim, given, given_dim, positions) -> None:
    spec = TensorSpec(value, FLOAT, value_dim)
    route = Lineup(spec, (TensorSpec(given, FLOAT, given_dim),), 8, FLOAT).routes[0]
    assert (route.sizes if route.kept else None) == positions


def test_vectors_beside_maps_are_no_signals() -> None:
    lineup = Lineup(
        TensorSpec((2, 8, 4), FLOAT, 1), specs_of(draw((2, 3, 8)), draw((2, 9))), 8, FLOAT
    )
    assert [route.kept for route in lineup.routes] == [True, False]


def test_masks_change_their_length_with_the_tokens() -> None:
    source = make_input(
        "auto", TensorSpec((2, 6), FLOAT), (TensorSpec((2, 5), IDS), TensorSpec((2, 5), torch.bool))
    )
    assert source((draw((3, 9), IDS), draw((3, 9), torch.bool))).value.shape == (3, 6)


def test_pixels_are_scaled() -> None:
    x = draw((2, 3, 4, 4), torch.uint8)
    local, _ = lined_up(TensorSpec((2, 6), torch.float64), x)
    assert torch.equal(local, x.flatten(1) / torch.tensor(255.0, dtype=torch.float64))


def test_inputs_without_the_batch_are_left_out() -> None:
    x, mask, scalar = draw((4, 5, 6)), draw((5, 5)), draw(())
    source = make_input("linear", TensorSpec((4, 5, 6), torch.float64), specs_of(mask, x, scalar))
    value = source((mask, x, scalar)).value
    assert torch.equal(source((mask + 1, x, scalar - 3)).value, value)
    assert not torch.equal(source((mask, x + 1, scalar)).value, value)
    assert source((mask, draw((2, 5, 6)), scalar)).value.shape == (2, 5, 6)
    with_complex = make_input(
        "linear", TensorSpec((4, 6), FLOAT), specs_of(x.to(torch.complex64), x)
    )
    assert with_complex((x.to(torch.complex64), x)).value.shape == (4, 6)


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_ids_are_embedded(value: str) -> None:
    # Batch normalisation would let one sample's ids change all predictions.
    source = make_input(
        partial(MLPInput, norm="none"), value_spec(value), (TensorSpec((4, 5), IDS),)
    )
    x = torch.zeros(4, 5, dtype=IDS)
    other = x.clone()
    other[1] = 3
    prediction = source((x,))
    difference = (prediction.value != source((other,)).value).reshape(4, -1).any(1)
    assert difference.tolist() == [False, True, False, False]

    source.fit(prediction, draw(prediction.value.shape, FLOAT)).backward()
    gradient = source.lineup.embeddings["0"].weight.grad
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0


def test_ids_count_modulo_the_buckets_and_may_be_negative() -> None:
    x = torch.tensor([[-1, 4096], [7, 2**40 + 3]])
    source = make_input("linear", TensorSpec((2, 2, 8), FLOAT), (TensorSpec((2, 2), IDS),))
    assert torch.equal(source((x,)).value, source((torch.tensor([[4095, 0], [7, 3]]),)).value)
    small = LinearInput(TensorSpec((2, 2, 8), FLOAT), (TensorSpec((2, 2), IDS),), buckets=5)
    assert torch.equal(small((x,)).value, small((x.remainder(5),)).value)
    assert small.lineup.embeddings["0"].weight.shape[0] == 5


def test_order_matters_to_sequences_and_not_to_vectors() -> None:
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    vector = make_input("mlp", TensorSpec((2, 8), torch.float64), (TensorSpec((2, 3), IDS),))
    assert torch.allclose(vector((x,)).value, vector((x.flip(1),)).value)
    sequence = make_input("mlp", TensorSpec((2, 3, 8), torch.float64), (TensorSpec((2, 3), IDS),))
    assert not torch.allclose(sequence((x,)).value, sequence((x.flip(1),)).value)


# --------------------------------------------------------------------------------------------------


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
        train(make_input(name, spec, specs_of(x)), (x,), value, 400)[-1]
        for name in ("linear", "mlp")
    )
    assert mlp < 0.1 < 0.5 < linear


def test_convolutions_see_neighbours_and_the_rest_does_not() -> None:
    x = draw((16, 1, 8, 8))
    value = F.conv2d(x, draw((2, 1, 3, 3), seed=1), padding=1)
    spec = TensorSpec((16, 2, 8, 8), torch.float64, 1)
    linear, conv = (
        train(make_input(name, spec, specs_of(x)), (x,), value, 300)[-1] for name in ("mlp", "conv")
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
    losses = train(source, (x,), real)
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
    train(source, (x,), draw(spec.shape, FLOAT))
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


# --------------------------------------------------------------------------------------------------


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
    assert train(source, (x,), torch.ones(4, 6), 300)[-1] < 0.01
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
