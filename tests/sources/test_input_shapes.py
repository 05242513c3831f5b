"""Synthetic inputs: how inputs of every kind are lined up with values of every kind."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.plan import TensorSpec
from dni_fx.sources.align_inputs import Lineup
from dni_fx.sources.inputs import LinearInput, MLPInput, make_input

from ..helpers.training import teach
from .values import FLOAT, IDS, MODEL_INPUTS, VALUES, draw, input_spec, specs_of, value_spec

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


@pytest.mark.matrix
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
    losses = teach(source, ((x,),), draw(spec.shape, spec.dtype, seed=1))
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


@pytest.mark.matrix
@pytest.mark.parametrize("given", MODEL_INPUTS)
@pytest.mark.parametrize("value", ["map1d", "map2d", "map3d"])
def test_convolutions_over_maps_from_every_input(value: str, given: str) -> None:
    spec, (shape, _, dtype, _) = value_spec(value), MODEL_INPUTS[given]
    source = make_input("conv", spec, (input_spec(given),))
    x = draw(shape, dtype)
    assert source((x,)).value.shape == spec.shape
    losses = teach(source, ((x,),), draw(spec.shape, spec.dtype, seed=1))
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
