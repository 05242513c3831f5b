"""Cheap synthesizers are full ones whose weights have a form; options are written behind names."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import CutPlan, TensorSpec
from dni_fx.sources import (
    INPUTS,
    MLP,
    Conv,
    GradientSource,
    Linear,
    base_name,
    make_source,
    one_hot,
)

from ..helpers.executors import OPTIONED
from ..helpers.training import ONE_HOT, batch, decoupled_of
from .regressions import CHEAP, KINDS, LABELS, MAPS, WIDE, random_tensor, spec_of

CONTEXT = TensorSpec((4, 3), torch.float64)


def drawn(name: str, kind: str) -> Any:
    """A source with every weight drawn at random, and a scale of 1."""
    source = make_source(name, [spec_of(kind, torch.float64)], CONTEXT)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    source.scale.fill_(1.0)
    return source


def said(source: GradientSource, kind: str) -> Tensor:
    value = random_tensor(*spec_of(kind).shape)
    (gradient,) = source((value,), one_hot(3)(LABELS).double()).gradients or ()
    return gradient


def full_of(name: str, kind: str, layer: Any) -> Any:
    """The full source with the weights that a cheap layer amounts to."""
    full = drawn(name, kind)
    mine = full.networks[0].layers[0]
    with torch.no_grad():
        if hasattr(layer, "outer"):
            mine.weight.copy_(layer.outer.weight @ layer.inner.weight)
            mine.bias.copy_(layer.outer.bias)
        else:
            blocks = layer.weight.chunk(layer.groups)
            mine.weight.copy_(torch.cat([torch.block_diag(*blocks), layer.shift], 1))
            mine.bias.copy_(layer.bias)
    return full


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("name", ["linear(rank=2)", "linear(groups=2)", "linear(groups=3)"])
def test_a_cheap_linear_source_is_a_full_one_of_that_form(name: str, kind: str) -> None:
    cheap = drawn(name, kind)
    full = full_of("linear", kind, cheap.networks[0].layers[0])
    torch.testing.assert_close(said(cheap, kind), said(full, kind))
    assert torch.linalg.matrix_rank(full.networks[0].layers[0].weight) == (
        2 if "rank" in name else 6
    )
    with torch.no_grad():
        full.networks[0].layers[0].weight[0, 0] += 1e-3
    assert not torch.allclose(said(cheap, kind), said(full, kind))


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_a_pooled_source_says_of_every_position_what_it_says_of_the_mean(
    name: str, kind: str
) -> None:
    pooled, plain = drawn(f"{name}(pooled=True)", kind), drawn(name, kind)
    value, feature = random_tensor(*spec_of(kind).shape), spec_of(kind).feature_dim
    positions = [d for d in range(1, value.dim()) if d != feature % value.dim()]
    mean = value.mean(positions, keepdim=True) if positions else value
    labels = one_hot(3)(LABELS).double()
    (expected,) = plain((mean.expand(value.shape).contiguous(),), labels).gradients
    torch.testing.assert_close(said(pooled, kind), expected)
    assert torch.allclose(said(plain, kind), expected) == (not positions)


def test_a_pooled_source_sees_the_mean_of_labels_per_position() -> None:
    spec, context = spec_of("tokens", torch.float64), random_tensor(4, 5, 3, seed=4)
    source = make_source("linear(pooled=True)", [spec], TensorSpec((4, 5, 3), torch.float64))
    nn.init.normal_(source.networks[0].layers[0].weight)
    source.scale.fill_(1.0)
    value = random_tensor(*spec.shape)
    mean = context.mean(1, keepdim=True).expand_as(context)
    torch.testing.assert_close(
        source((value,), context).gradients, source((value,), mean).gradients
    )
    other = context.flip(2)
    assert not torch.allclose(
        source((value,), context).gradients[0], source((value,), other).gradients[0]
    )


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["conv(rank=2, hidden=0)", "conv(depthwise=True, hidden=0)"])
def test_a_cheap_convolution_is_a_full_one_of_that_form(name: str, kind: str) -> None:
    """The labels see no border, so they are compared apart, where they are the same everywhere."""
    cheap = drawn(name, kind)
    layer, full = cheap.networks[0].layers[0], drawn("conv(hidden=0)", kind)
    mixed, spatial = layer.pointwise.weight.split((layer.pointwise.inputs, 3), 1)[0], layer.weight
    if "rank" in name:
        kernel = torch.einsum("or,ri...->oi...", mixed, spatial)
    else:
        kernel = torch.einsum("oi,i...->oi...", mixed, spatial[:, 0])
    mine, value = full.networks[0].layers[0], random_tensor(*spec_of(kind).shape)
    nothing = torch.zeros(4, 3, dtype=torch.float64)
    with torch.no_grad():
        mine.weight[:, :6].copy_(kernel)
        mine.bias.copy_(layer.pointwise.bias)
    torch.testing.assert_close(
        cheap((value,), nothing).gradients, full((value,), nothing).gradients
    )
    labels = one_hot(3)(LABELS).double()
    shift = (labels @ layer.pointwise.weight[:, -3:].T).view(4, 6, *(1,) * (value.dim() - 2))
    torch.testing.assert_close(said(cheap, kind), cheap((value,), nothing).gradients[0] + shift)
    with torch.no_grad():
        mine.weight[0, 0] += 1e-3
    assert not torch.allclose(
        cheap((value,), nothing).gradients[0], full((value,), nothing).gradients[0]
    )


@pytest.mark.parametrize(
    ("full", "cheap", "shape", "feature", "share"),
    [
        ("linear", "linear(rank=16)", (64, 256), -1, 2 * 16 / 256),
        ("linear", "linear(groups=8)", (64, 256), -1, 1 / 8),
        ("linear", "linear(pooled=True)", (8, 32, 256), -1, 1 / 32),
        ("mlp", "mlp(width=16)", (64, 256), -1, 16 / 256),
        ("conv", "conv(rank=8)", (8, 64, 16, 16), 1, (9 * 8 + 8) / (9 * 64)),
        ("conv", "conv(depthwise=True)", (8, 64, 16, 16), 1, (9 + 64) / (9 * 64)),
    ],
)
def test_they_cost_what_they_say(
    full: str, cheap: str, shape: tuple[int, ...], feature: int, share: float
) -> None:
    spec = TensorSpec(shape, torch.float32, feature)
    whole, part = (make_source(name, [spec]).flops() for name in (full, cheap))
    assert part / whole == pytest.approx(share)


def test_every_option_is_in_the_lists_of_the_tests() -> None:
    """So that a new one is trained by every executor, too."""
    sizes = {"hidden", "norm", "kernel", "width"}  # of the full forms
    for kind, lists in ((Linear, (CHEAP, OPTIONED)), (MLP, (CHEAP,)), (Conv, (CHEAP, OPTIONED))):
        options = [
            p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        for listed in lists:
            mine = [entry for entry in listed if base_name(entry) == kind.__name__.lower()]
            for option in set(options) - sizes:
                assert any(f"{option}=" in entry for entry in mine), (kind, option)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("linear(rank=0)", "vector", "rank= of a synthesizer must be a whole number from 1, not 0"),
        ("linear(rank=2.0)", "vector", "whole number from 1, not 2.0"),
        ("linear(groups=4)", "vector", "4 groups cannot share 6 features evenly"),
        ("linear(rank=2, groups=2)", "vector", "a rank or groups, not both"),
        ("conv(rank=2, depthwise=True)", "map2d", "a rank or is depthwise, not both"),
        ("conv(depthwise=True)", "vector", "'conv' needs convolutional maps"),
        ("linear(ranks=2)", "vector", r"no option 'ranks'; did you mean 'rank'\?"),
        ("zero(rank=2)", "vector", "'zero' has no option 'rank'. It has: none"),
        ("linaer(rank=2)", "vector", "unknown gradient source .*; did you mean 'linear'"),
        ("linear(2)", "vector", "options are written as in Python"),
        ("linear(rank=2", "vector", "options are written as in Python"),
        ("linear(rank=n)", "vector", "options are written as in Python"),
        ("linear(**{})", "vector", "options are written as in Python"),
        ("linear()(rank=2)", "vector", "options are written as in Python|did you mean"),
    ],
)
def test_what_is_refused(name: str, kind: str, says: str) -> None:
    with pytest.raises(DecouplingError, match=says):
        make_source(name, [spec_of(kind)])


def test_options_behind_names() -> None:
    written = make_source("linear(rank=2)", [spec_of("vector")])
    by_hand = make_source(partial(Linear, rank=2), [spec_of("vector")])
    keys = [{n: tuple(p.shape) for n, p in s.named_parameters()} for s in (written, by_hand)]
    assert keys[0] == keys[1]
    assert type(make_source("local(hidden=1)", [spec_of("vector")], CONTEXT)).__name__ == "Local"
    assert type(make_source("critic(hidden=1)", [spec_of("vector")], CONTEXT)).__name__ == "Critic"
    assert [base_name(n) for n in ("each:mlp(width=4)", "joint:critic", "zero")] == [
        "mlp",
        "critic",
        "zero",
    ]
    assert "mlp" in INPUTS
    assert KINDS.keys() >= set(WIDE)


@pytest.mark.parametrize(
    "option", ["linear(rank=2)", "each:linear(rank=2)", "joint:linear(groups=2)"]
)
def test_a_plan_holds_options(option: str) -> None:
    made = decoupled_of(option, inputs="mlp(hidden=2)")
    plan = CutPlan.from_json(made.plan.to_json())
    assert plan == made.plan
    assert set(dict(plan.gradients).values()) == {option}
    again = dni_fx.decouple(made.model, plan, example_inputs=(batch(0)[0],), context=ONE_HOT)
    assert again.state_dict().keys() == made.state_dict().keys()
