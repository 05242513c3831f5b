"""Gradient sources: the mathematics of the regression."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import MLP, Conv, make_source, one_hot

from ..helpers.training import teach
from .regressions import CASES, LABELS, random_tensor, spec_of

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.matrix
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_starts_at_zero_then_learns(name: str, kind: str, with_context: bool) -> None:
    spec = spec_of(kind)
    labels = one_hot(3)(LABELS) if with_context else None
    source = make_source(name, [spec], TensorSpec((4, 3), torch.float32) if with_context else None)
    keys = {key: tuple(tensor.shape) for key, tensor in source.state_dict().items()}
    value, target = (random_tensor(*spec.shape, seed=seed, dtype=spec.dtype) for seed in (1, 2))

    first = source((value,), labels).gradients[0]
    assert first.shape == value.shape
    assert first.dtype == value.dtype
    assert not first.requires_grad
    assert torch.count_nonzero(first) == 0

    losses = teach(source, ((value,), labels), (target,), 20, SGD)
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(
        1.0, rel=1e-5
    )  # unit scale: the mean square of the target over itself
    assert torch.count_nonzero(source((value,), labels).gradients[0]) > 0
    assert {key: tuple(tensor.shape) for key, tensor in source.state_dict().items()} == keys


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_only_fit_reaches_the_synthesizer_and_only_the_synthesizer(name: str) -> None:
    stage = nn.Linear(3, 6)
    h = stage(random_tensor(4, 3, dtype=torch.float32))
    source = make_source(name, [spec_of("vector")])
    teach(source, ((h.detach(),), None), (torch.ones(4, 6),), 3, SGD)
    source.zero_grad()

    prediction = source((h.detach(),), None)
    h.backward(prediction.gradients[0])
    assert stage.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in source.parameters())

    before = stage.weight.grad.clone()
    source.fit(prediction, (torch.ones(4, 6),)).backward()
    assert all(parameter.grad is not None for parameter in source.parameters())
    assert torch.equal(stage.weight.grad, before)


@pytest.mark.parametrize("with_labels", [True, False])
def test_linear_with_labels_is_exact_under_a_linear_head_and_squared_error(
    with_labels: bool,
) -> None:
    h, head, y = (
        random_tensor(64, 6),
        random_tensor(3, 6, seed=1),
        one_hot(3)(torch.arange(64) % 3).double(),
    )
    leaf = h.clone().requires_grad_()
    F.mse_loss(leaf @ head.T, y).backward()
    spec = TensorSpec(h.shape, h.dtype)
    source = make_source("linear", [spec], TensorSpec(y.shape, y.dtype) if with_labels else None)
    teach(source, ((h,), y), (leaf.grad,), 400, partial(torch.optim.SGD, lr=2.0))
    error = (source((h,), y).gradients[0] - leaf.grad).norm() / leaf.grad.norm()
    assert error < 1e-6 if with_labels else error > 0.1  # without labels it cannot be


@pytest.mark.parametrize(
    ("name", "kind"), [("linear", "vector"), ("mlp", "tokens"), ("conv", "map2d")]
)
def test_size_of_the_target_does_not_matter(name: str, kind: str) -> None:
    spec = spec_of(kind)
    value, target = (random_tensor(*spec.shape, seed=seed, dtype=spec.dtype) for seed in (1, 2))
    losses, predictions = [], []
    for factor in (1.0, 1e-6, 1e-15):
        torch.manual_seed(0)
        source = make_source(name, [spec])
        losses.append(teach(source, ((value,), None), (target * factor,), 5, SGD))
        predictions.append(source((value,), None).gradients[0] / factor)
    torch.testing.assert_close(
        torch.tensor(losses[1:]), torch.tensor([losses[0]] * 2), rtol=1e-4, atol=0
    )
    for prediction in predictions[1:]:
        torch.testing.assert_close(prediction, predictions[0], rtol=1e-3, atol=1e-6)


def test_scale_is_the_running_root_mean_square_of_informative_targets() -> None:
    source = make_source("linear", [TensorSpec((2, 3), torch.float64)])
    value, scale = torch.zeros(2, 3, dtype=torch.float64), source.scale
    for bad in (torch.zeros(2, 3), torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf)):
        loss = source.fit(source((value,)), (bad.double(),))
        assert source.scale.item() == 0
        assert loss.item() == 0 or not bad.isfinite().all()
    seen = []
    for size in [2.0, 4.0, 0.0] + [3.0] * 150:
        source.fit(source((value,)), (torch.full_like(value, size),))
        if size:
            seen.append(size**2)
        if len(seen) == 2:
            assert source.scale.item() == pytest.approx((sum(seen) / 2) ** 0.5)
    expected = sum(seen[:100]) / 100
    for square in seen[100:]:
        expected = 0.99 * expected + 0.01 * square
    assert source.scale.item() == pytest.approx(expected**0.5, rel=1e-12)
    assert source.count.item() == 100
    assert source.scale is scale  # in place, so that references and captured graphs hold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "vector"), ("mlp", "tokens"), ("conv", "map2d"), ("stale", "vector")],
)
def test_dtypes(name: str, kind: str, dtype: torch.dtype) -> None:
    spec = spec_of(kind, dtype)
    source = make_source(name, [spec], TensorSpec((4, 3), torch.float32))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(tensor.dtype == wanted for tensor in source.parameters())
    value, target = (random_tensor(*spec.shape, seed=seed, dtype=dtype) for seed in (1, 2))
    for _ in range(2):
        prediction = source((value,), one_hot(3)(LABELS))
        assert prediction.gradients[0].dtype == dtype
        loss = source.fit(prediction, (target,))
        if loss is not None:
            assert loss.dtype == wanted
            loss.backward()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "vector"), ("mlp", "map2d"), ("linear", "tokens"), ("conv", "map2d")],
)
def test_autocast_and_a_changed_dtype(name: str, kind: str) -> None:
    spec = spec_of(kind)
    source = make_source(name, [spec], TensorSpec((4, 3), torch.float32))
    value = random_tensor(*spec.shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = source((value,), one_hot(3)(LABELS))
        loss = source.fit(prediction, (value * 1e-4,))
    loss.backward()
    assert prediction.gradients[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    source.double()
    source.fit(source((value.double(),), one_hot(3)(LABELS)), (value.double(),)).backward()


def test_memory_format_follows_the_value() -> None:
    for name in ("linear", "mlp", "conv", "zero", "stale"):
        source = make_source(name, [spec_of("map2d")], TensorSpec((4, 3), torch.float32))
        value = random_tensor(4, 6, 5, 3, dtype=torch.float32).to(memory_format=torch.channels_last)
        for _ in range(2):
            prediction = source((value,), one_hot(3)(LABELS))
            assert prediction.gradients[0].stride() == value.stride(), name
            source.fit(prediction, (value.contiguous(),))
    transposed = random_tensor(6, 4, dtype=torch.float32).T
    assert (
        make_source("linear", [spec_of("vector")])((transposed,)).gradients[0].stride()
        == transposed.stride()
    )


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "scalar"])
def test_other_batch_sizes(name: str, kind: str) -> None:
    source = make_source(name, [spec_of(kind)], TensorSpec((4, 3), torch.float32))
    for size in (1, 7):
        value = random_tensor(size, *spec_of(kind).shape[1:], dtype=torch.float32)
        prediction = source((value,), one_hot(3)(torch.zeros(size, dtype=torch.long)))
        assert prediction.gradients[0].shape == value.shape
        assert source.fit(prediction, (value,)).isfinite()


def test_a_boundary_of_several_values() -> None:
    specs = [spec_of("vector"), spec_of("map2d", torch.float64)]
    source = make_source("auto", specs, TensorSpec((4, 3), torch.float32))
    values = tuple(random_tensor(*spec.shape, dtype=spec.dtype) for spec in specs)
    targets = (values[0] * 1e-3, values[1] * 10)
    first, *_, last = teach(source, (values, one_hot(3)(LABELS)), targets, 10, SGD)
    assert (first, last < first) == (pytest.approx(2.0, rel=1e-5), True)
    assert source.scale[1] / source.scale[0] > 1e3
    assert [g.dtype for g in source(values, one_hot(3)(LABELS)).gradients] == [
        torch.float32,
        torch.float64,
    ]


def test_size_options() -> None:
    count = {
        p.shape
        for p in make_source(partial(MLP, hidden=2, width=8), [spec_of("vector")]).parameters()
    }
    assert torch.Size((8, 8)) in count
    source = make_source(partial(Conv, hidden=2, kernel=5, width=8), [spec_of("map2d")])
    assert source((torch.zeros(4, 6, 5, 3),)).gradients[0].shape == (4, 6, 5, 3)
    with pytest.raises(DecouplingError, match="odd kernel"):
        make_source(partial(Conv, kernel=4), [spec_of("map2d")])
