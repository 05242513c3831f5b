"""Two gradients compared: each number against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dni_fx import diagnostics
from dni_fx.diagnostics import summarize
from dni_fx.errors import DecouplingError
from dni_fx.reports import InterfaceReport, compare
from dni_fx.reports import steps as reports

from .kit import inf, nan, pair


def reference_values(prediction: Tensor, reference: Tensor) -> dict[str, float]:
    """The definitions, written down once more, on double copies."""
    a, b = prediction.double().flatten(), reference.double().flatten()
    known = b != 0
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "relative_error": float((a - b).norm() / b.norm()),
        "rms_ratio": float(a.norm() / b.norm()),
        "sign_agreement": float((a.sign() == b.sign())[known].double().mean()),
        "explained": float(1 - ((a - b) ** 2).sum() / (b**2).sum()),
    }


def assert_is(report: InterfaceReport, expected: dict[str, float], rel: float = 1e-9) -> None:
    for name, value in expected.items():
        assert getattr(report, name) == pytest.approx(value, rel=rel, nan_ok=True), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4, 5)])
def test_compare_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prediction, reference = pair(*shape, dtype=dtype)
    report = compare(prediction, reference, "true", 3)
    assert_is(report, reference_values(prediction, reference))
    assert (report.reference, report.step) == ("true", 3)
    assert -1 <= report.cosine <= 1


def test_complex_numbers_count_as_pairs() -> None:
    a, b = (torch.complex(*pair(5, 3)) for _ in range(2))
    whole = reference_values(*map(torch.view_as_real, (a, b)))
    assert_is(compare(a, b.conj().conj(), "true", 3), whole)
    assert_is(compare(a.conj(), b.conj(), "true", 3), whole)
    assert compare(a, a.real.to(a.dtype), "true", 3).relative_error > 0.1  # the control


@pytest.mark.parametrize("elements", [1, 2, 5, 24, 119, 120, 121])
@pytest.mark.parametrize(
    "layout", ["plain", "channels_last", "mixed", "transposed", "expanded", "strided"]
)
def test_compare_in_parts(monkeypatch: pytest.MonkeyPatch, layout: str, elements: int) -> None:
    monkeypatch.setattr(reports, "ELEMENTS", elements)
    a, b = pair(2, 3, 4, 5)
    if layout in ("channels_last", "mixed"):
        a = a.to(memory_format=torch.channels_last)
        b = b.to(memory_format=torch.channels_last) if layout == "channels_last" else b
    elif layout == "transposed":
        a, b = a.transpose(1, 3), b.transpose(1, 3).contiguous()
    elif layout == "expanded":
        b = b[:1, :, :1].expand(2, 3, 4, 5)
    elif layout == "strided":
        a, b = a[..., ::2], b[..., ::2]
    assert_is(compare(a, b, "true", 0), reference_values(a, b))


def test_compare_large_maps_without_copies() -> None:
    a, b = pair(3, 2**18 + 1)
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            fresh = (
                isinstance(result, Tensor) and not func.is_view and result.dtype is torch.float64
            )
            largest.extend([result.untyped_storage().nbytes()] if fresh else [])
            return result

    with Watch():
        report = compare(a, b, "true", 0)
    assert_is(report, reference_values(a, b))
    assert max(largest) <= 3 * 8 * reports.ELEMENTS < 2 * 8 * a.numel()


def test_half_precision_neither_vanishes_nor_overflows() -> None:
    tiny = torch.full((300, 300), 6e-8, dtype=torch.float16)  # its square is zero in float16
    assert_is(
        compare(tiny, tiny, "true", 0),
        {"cosine": 1, "relative_error": 0, "rms_ratio": 1, "sign_agreement": 1},
    )
    large = torch.full((300, 300), 6e4, dtype=torch.float16)
    assert_is(
        compare(-large, large, "true", 0),
        {"cosine": -1, "relative_error": 2, "rms_ratio": 1, "explained": -3},
    )
    mixed = compare(tiny, tiny.double() * 2, "true", 0)  # dtypes may differ
    assert_is(mixed, {"rms_ratio": 0.5, "cosine": 1})


def test_an_equal_prediction_is_exact() -> None:
    _, b = pair(50, 50)
    report = compare(b.clone(), b, "true", 0)
    assert (report.cosine, report.relative_error, report.rms_ratio) == (pytest.approx(1), 0.0, 1.0)
    assert (report.sign_agreement, report.explained, report.aligned) == (1.0, 1.0, pytest.approx(1))


def test_zeros_and_empty_tensors() -> None:
    _, b = pair(4, 5)
    zero = torch.zeros(4, 5)
    nothing = compare(zero, b, "true", 0)
    assert_is(
        nothing,
        {"cosine": nan, "relative_error": 1, "rms_ratio": 0, "sign_agreement": 0, "explained": 0},
    )
    assert nothing.aligned == 0.0
    for a, reference in (
        (b, zero),
        (zero, zero),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (b * nan, zero),
    ):
        report = compare(a, reference, "true", 0)
        assert all(
            math.isnan(getattr(report, name))
            for name in (*diagnostics.METRICS, "aligned")
            if name != "cosine"
        )
        assert math.isnan(report.cosine)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["prediction", "reference", "both"])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    a, b = pair(4, 5)
    for tensor in (a,) * (where != "reference") + (b,) * (where != "prediction"):
        tensor[1, 1] = value
    report = compare(a, b, "true", 0)
    assert math.isnan(report.cosine)
    assert report.relative_error == inf
    assert report.explained == -inf
    assert math.isnan(report.aligned)
    assert report.verdict == "not finite: a NaN or an infinity is predicted or arrives"
    summarize({"cut": report})


def test_shapes_must_agree() -> None:
    with pytest.raises(DecouplingError, match=r"\(4, 5\).*\(5, 4\)"):
        compare(torch.ones(4, 5), torch.ones(5, 4), "true", 0)
    with pytest.raises(DecouplingError, match="shape"):
        compare(torch.ones(1, 5), torch.ones(4, 5), "true", 0)


@pytest.mark.parametrize("mode", ["grad", "autocast", "inference"])
def test_compare_in_any_mode(mode: str) -> None:
    a, b = pair(6, 7)
    expected = compare(a, b, "true", 0)
    if mode == "grad":
        assert compare((a.requires_grad_() * 1), b, "true", 0) == expected
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert compare(a, b, "true", 0) == expected
    else:
        with torch.inference_mode():
            c = a.clone()
        assert compare(c, b, "true", 0) == expected
        with torch.inference_mode():
            assert compare(c, b, "true", 0) == expected


def test_explained_and_aligned() -> None:
    a, b = pair(200, 30, dtype=torch.float64)
    best = compare(a, b, "true", 0)
    for size in (-1.0, 0.01, 0.5, 1.0, 3.0, 100.0):
        report = compare(size * a, b, "true", 0)
        assert report.explained <= best.aligned + 1e-12
        assert report.aligned == (pytest.approx(best.aligned) if size > 0 else 0.0)
    rescaled = compare(a * (best.cosine / best.rms_ratio), b, "true", 0)
    assert rescaled.explained == pytest.approx(best.aligned)
