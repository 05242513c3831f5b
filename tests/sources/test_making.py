"""Gradient sources: contexts of every rank, the controls, making them by name."""

from __future__ import annotations

import doctest
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import (
    MLP,
    SOURCES,
    Conv,
    GradientSource,
    Linear,
    Prediction,
    align_context,
    auto_name,
    base,
    context,
    make_source,
    one_hot,
)

from ..helpers.training import teach
from .regressions import CASES, KINDS, LABELS, MAPS, random_tensor, spec_of


def test_one_hot() -> None:
    assert torch.equal(one_hot(3)(LABELS), F.one_hot(LABELS, 3).float())
    assert one_hot(3)(torch.zeros(2, 5, dtype=torch.int32)).shape == (2, 5, 3)
    assert one_hot(3)(torch.tensor([-100, 1])).tolist() == [[0, 0, 0], [0, 1, 0]]
    assert (repr(one_hot(3)), one_hot(3).features, one_hot(3) == one_hot(3)) == (
        "one_hot(3)",
        3,
        True,
    )
    with pytest.raises(DecouplingError, match=r"label 3.*one_hot\(4\)"):
        one_hot(3)(torch.tensor([0, 3]))
    with pytest.raises(DecouplingError, match="integer labels"):
        one_hot(3)(torch.zeros(4))
    with pytest.raises(DecouplingError, match="at least 1"):
        one_hot(0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("scalar", "one feature")])
@pytest.mark.parametrize("lead", ["batch", "one", "full"])
def test_linear_equals_an_affine_map_of_the_concatenation(kind: str, lead: str) -> None:
    """By hand: features last, context expanded, concatenated, one matrix for every position."""
    spec = spec_of(kind, torch.float64)
    value = random_tensor(*spec.shape)
    rows = value.movedim(spec.feature_dim, -1)
    sizes = {"batch": (4,), "one": (1,), "full": tuple(rows.shape[:-1])}[lead]
    c = random_tensor(*sizes, 3, seed=1)
    source = make_source("linear", [spec], TensorSpec(tuple(c.shape), c.dtype))
    layer = source.networks[0].layers[0]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    source.scale.fill_(0.5)

    expanded = c.view(*sizes, *(1,) * (rows.dim() - 1 - len(sizes)), 3).expand(*rows.shape[:-1], 3)
    expected = 0.5 * F.linear(torch.cat((rows, expanded), -1), layer.weight, layer.bias)
    torch.testing.assert_close(
        source((value,), c).gradients[0], expected.movedim(-1, spec.feature_dim)
    )


@pytest.mark.parametrize("kind", MAPS)
def test_conv_sees_labels_as_constant_planes(kind: str) -> None:
    spec = spec_of(kind, torch.float64)
    source = make_source("conv", [spec], TensorSpec((4, 3), torch.float64))
    network, value, space = source.networks[0], random_tensor(*spec.shape), spec.shape[2:]
    nn.init.normal_(network.layers[-1].weight)
    planes = torch.zeros(4, 3, *space, dtype=torch.float64)
    planes[torch.arange(4), LABELS] = 1.0
    expected = network.layers[1](F.relu(network.layers[0](torch.cat((value, planes), 1))))
    torch.testing.assert_close(network(value, one_hot(3)(LABELS)), expected)


def test_contexts_that_do_not_fit() -> None:
    with pytest.raises(DecouplingError, match=r"\(5, 3\).*\(4, 6\)"):
        align_context(torch.zeros(5, 3), (4, 6))
    with pytest.raises(DecouplingError, match=r"\(4, 7, 7, 3\).*\(4, 6, 5, 3\)"):
        make_source("conv", [spec_of("map2d")], TensorSpec((4, 7, 7, 3), torch.float32))
    with pytest.raises(DecouplingError, match="does not line up"):
        align_context(torch.zeros(()), (4, 6))
    source = make_source("linear", [spec_of("vector")], TensorSpec((4, 3), torch.float32))
    value = torch.zeros(4, 6)
    with pytest.raises(DecouplingError, match=r"context of 3 features.*Pass target="):
        source((value,), None)
    with pytest.raises(DecouplingError, match="3 features, but got 2"):
        source((value,), torch.zeros(4, 2))
    with pytest.raises(DecouplingError, match=r"\(4, 7\)"):
        source((torch.zeros(4, 7),), torch.zeros(4, 3))
    with pytest.raises(DecouplingError, match="targets of shapes"):
        source.fit(source((value,), torch.zeros(4, 3)), (torch.zeros(2, 6),))
    # A source made without a context ignores every one.
    assert make_source("linear", [spec_of("vector")])((value,), torch.zeros(9, 9)).gradients[
        0
    ].shape == (4, 6)


def test_zero_and_exact() -> None:
    value = torch.ones(4, 6)
    assert torch.equal(
        make_source("zero", [spec_of("vector")])((value,)).gradients[0], torch.zeros(4, 6)
    )
    exact = make_source("exact", [spec_of("vector")])
    assert exact.exact
    with pytest.raises(DecouplingError, match=r"Trainer\.step"):
        exact((value,))


def test_stale_is_the_last_message() -> None:
    source = make_source("stale", [spec_of("vector")])
    value = torch.ones(4, 6)
    assert list(source.state_dict()) == ["_extra_state"]
    prediction = source((value,))
    assert torch.equal(prediction.gradients[0], torch.zeros(4, 6))
    message = random_tensor(4, 6, dtype=torch.float32)
    kept = message.clone()
    assert source.fit(prediction, (message,)) is None
    message.zero_()  # what the caller does with its tensor afterwards
    assert torch.equal(source((value,)).gradients[0], kept)

    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    resumed = make_source("stale", [spec_of("vector")])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed((value,)).gradients[0], kept)
    resumed.load_state_dict(make_source("stale", [spec_of("vector")]).state_dict())
    assert torch.count_nonzero(resumed((value,)).gradients[0]) == 0

    assert torch.equal(source((torch.ones(2, 6),)).gradients[0], kept[:2])
    longer = source((torch.ones(6, 6, dtype=torch.float64),)).gradients[0]
    assert torch.equal(longer, torch.cat((kept, torch.zeros(2, 6))).double())


def test_names_are_checked_and_close_ones_suggested() -> None:
    with pytest.raises(DecouplingError, match=r"'linaer'; did you mean 'linear'"):
        make_source("linaer", [spec_of("vector")])
    with pytest.raises(DecouplingError, match="'stale'"):
        make_source("nothing like it", [spec_of("vector")])
    with pytest.raises(DecouplingError, match="Pass the class"):
        make_source(Linear([spec_of("vector")]), [spec_of("vector")])
    with pytest.raises(DecouplingError, match="name or a callable"):
        make_source(3, [spec_of("vector")])
    with pytest.raises(DecouplingError, match="returned Linear"):
        make_source(lambda specs, context: nn.Linear(1, 1), [spec_of("vector")])
    with pytest.raises(DecouplingError, match=r"\(4, 5, 6\).*Use 'linear' or 'mlp'"):
        make_source("conv", [spec_of("tokens")])
    with pytest.raises(DecouplingError, match="spatial dimensions"):
        make_source("linear", [TensorSpec((1, 2, 1, 1, 1, 1), torch.float32, 1)])
    assert isinstance(make_source(Linear, [spec_of("vector")]), Linear)


def test_auto() -> None:
    labels = TensorSpec((4, 3), torch.float32)
    names = {kind: (auto_name(spec_of(kind), labels), auto_name(spec_of(kind))) for kind in KINDS}
    expected = dict.fromkeys(KINDS, ("linear", "mlp")) | dict.fromkeys(MAPS, ("conv", "conv"))
    assert names == expected | {"scalar": ("mlp", "mlp")}
    # A position table has no batch to line labels up with: auto leaves them out, a name is taken at
    # its word.
    table = TensorSpec((1, 5, 6), torch.float32)
    prediction = make_source("auto", [table], labels)((torch.zeros(1, 5, 6),), torch.zeros(4, 3))
    assert prediction.gradients[0].shape == (1, 5, 6)
    with pytest.raises(DecouplingError, match=r"\(4, 3\).*\(1, 5, 6\)"):
        make_source("linear", [table], labels)


@pytest.mark.parametrize("kind", ["vector", "tokens", "map2d", "one feature"])
@pytest.mark.parametrize("make", [MLP, Conv])
def test_normalised_hidden_layers(make: type[GradientSource], kind: str) -> None:
    """Hidden layers do not feel the value's size; a single value is no error."""
    if make is Conv and kind != "map2d":
        return
    spec = spec_of(kind, torch.float64)
    source = make([spec], hidden=2, norm="batch")  # type: ignore[call-arg]
    for network in source.networks:
        nn.init.normal_(network.layers[-1].weight)
        nn.init.zeros_(network.layers[0].bias)
    value = random_tensor(*spec.shape)
    outputs = [source((value * size,)).state[0] for size in (1.0, 100.0)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=1e-3)
    plain = make([spec], hidden=2)  # type: ignore[call-arg]
    nn.init.normal_(plain.networks[0].layers[-1].weight)
    assert not torch.allclose(plain((value,)).state[0], plain((100 * value,)).state[0], rtol=1e-2)
    assert source((value[:1],)).gradients[0].shape == value[:1].shape
    assert source.flops() == plain.flops()


def test_unknown_norm() -> None:
    with pytest.raises(DecouplingError, match="unknown norm"):
        MLP([spec_of("vector")], norm="layer")


@pytest.mark.parametrize("name", SOURCES)
def test_global_random_state_stays(name: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    source = make_source(name, [spec_of("map2d")], TensorSpec((4, 3), torch.float32))
    value = torch.ones(4, 6, 5, 3)
    parts = {
        "gradient": value,
        "loss": torch.ones(4),
        "logits": torch.ones(4, 3),
        "error": torch.ones(4, 3),
    }
    if not source.exact:
        message = tuple(parts[kind] for kind in source.asks.learns_from)
        source.fit(source((value,), one_hot(3)(LABELS)), message)
    assert torch.equal(torch.get_rng_state(), state)
    again = make_source(name, [spec_of("map2d")], TensorSpec((4, 3), torch.float32))
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.matrix
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_flops_formula(name: str, kind: str, with_context: bool) -> None:
    source = make_source(
        name, [spec_of(kind)], TensorSpec((4, 3), torch.float32) if with_context else None
    )
    with FlopCounterMode(display=False) as counter:
        source((torch.zeros(spec_of(kind).shape),), one_hot(3)(LABELS))
    assert source.flops() == counter.get_total_flops() > 0
    assert GradientSource.flops(source) == source.flops()  # what a source of one's own inherits


def test_state_resumes_bit_for_bit() -> None:
    values, labels, targets = (
        (torch.ones(4, 6),),
        one_hot(3)(LABELS),
        (random_tensor(4, 6, dtype=torch.float32),),
    )
    source, other = (
        make_source("mlp", [spec_of("vector")], TensorSpec((4, 3), torch.float32)) for _ in range(2)
    )
    teach(source, (values, labels), targets)
    other.load_state_dict(source.state_dict())
    first, second = (teach(s, (values, labels), targets) for s in (source, other))
    assert first == second
    assert torch.equal(source(values, labels).gradients[0], other(values, labels).gradients[0])


def test_extension_point_and_the_examples_in_docstrings() -> None:
    with pytest.raises(NotImplementedError, match="GradientSource must implement predict"):
        GradientSource([spec_of("vector")])((torch.zeros(4, 6),))
    assert GradientSource([spec_of("vector")]).fit(Prediction(()), ()) is None
    for module in (base, context):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
