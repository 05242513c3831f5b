"""What a comparison means, in words."""

from __future__ import annotations

import itertools
import math

import pytest

from dni_fx.diagnostics import Diagnosis, summarize
from dni_fx.errors import DecouplingError
from dni_fx.reports import InterfaceReport, compare

from .kit import inf, nan, pair


def made(cosine: float, size: float, reference: str = "true") -> InterfaceReport:
    """The report of a prediction with this direction and size."""
    error = math.sqrt(max(0.0, 1 - 2 * cosine * size + size * size))
    return InterfaceReport(cosine, error, size, reference, 0)


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (made(0.85, 0.98), "explains 71 % of the gradient (cosine 0.85, size 0.98 x)"),
        (made(1.0, 1.0), "explains 100 % of the gradient (cosine 1.00, size 1.00 x)"),
        (made(0.3, 0.3), "explains 9 % of the gradient (cosine 0.30, size 0.30 x)"),
        (
            made(0.8, 12.3),
            "right direction, wrong size: cosine 0.80, size 12 x; rescaled it would explain 64 % "
            "of the gradient",
        ),
        (
            made(0.8, 0.00031),
            "right direction, wrong size: cosine 0.80, size 0.00031 x; rescaled it would explain "
            "64 % of the gradient",
        ),
        (
            made(-0.02, 1.0),
            "explains nothing: the frozen control (`zero`) would do as well (cosine -0.02)",
        ),
        (
            made(-0.4, 260.0),
            "points away from the gradient: the frozen control (`zero`) would do better (cosine "
            "-0.40, size 260 x)",
        ),
        (InterfaceReport(nan, 1.0, 0.0, "true", 0), "predicts nothing yet"),
        (InterfaceReport(nan, nan, nan, "true", 0), "no gradient arrives"),
        (
            InterfaceReport(nan, nan, nan, "bootstrapped", 0),
            "no gradient arrives: the target that the next stage's predictions gave is zero",
        ),
        (
            made(0.85, 0.98, "bootstrapped"),
            "explains 71 % of the target that the next stage's predictions gave (cosine 0.85, size "
            "0.98 x)",
        ),
        (
            made(0.05, 0.9, "bootstrapped"),
            "explains nothing of the target that the next stage's predictions gave: the frozen "
            "control (`zero`) would do as well (cosine 0.05)",
        ),
    ],
)
def test_verdicts(report: InterfaceReport, verdict: str) -> None:
    assert report.verdict == verdict


def test_every_report_has_a_verdict() -> None:
    cosines, sizes = (
        (-1.0, -0.1, 0.0, 0.0999, 0.1, 0.5, 1.0, nan),
        (0.0, 1e-300, 1e-3, 1.0, 1e7, 1e300, nan, inf),
    )
    for cosine, error, ratio in itertools.product(cosines, sizes, sizes):
        report = InterfaceReport(cosine, error, ratio, "other", 0)
        assert report.verdict
        assert "\n" not in report.verdict
        assert summarize({"cut": report}).endswith(f"cut  {report.verdict}")


def diagnosis(stale: float) -> Diagnosis:
    return Diagnosis(
        {"a": made(0.6, 0.6), "b": made(0.01, 1.0)},
        {"stale": {"a": made(stale, 1.0), "b": made(0.5, 1)}},
    )


def test_a_diagnosis_is_a_mapping() -> None:
    found = diagnosis(0.0)
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert found["a"] is found.interfaces["a"]
    assert dict(found.items()) == dict(found.interfaces)
    assert summarize(found) == str(found)


@pytest.mark.parametrize(
    ("stale", "words"),
    [
        (0.1, "; better than the stale control (cosine 0.10)"),
        (0.59, "; the stale control would do as well (cosine 0.59)"),
        (0.9, "; the stale control would do better (cosine 0.90)"),
        (nan, ""),
    ],
)
def test_a_verdict_beside_the_stale_control(stale: float, words: str) -> None:
    found = diagnosis(stale)
    assert found.verdict("a") == found["a"].verdict + words
    assert found.verdict("b").endswith(
        "(cosine 0.01); the stale control would do better (cosine 0.50)"
    )
    assert Diagnosis(found.interfaces).verdict("a") == found["a"].verdict
    assert Diagnosis(found.interfaces, {"stale": {}}).verdict("a") == found["a"].verdict


def test_a_diagnosis_prints_as_a_table() -> None:
    longer = {
        "a longer name": InterfaceReport(nan, nan, nan, "bootstrapped", 120),
        **diagnosis(0.1),
    }
    text = str(Diagnosis(longer, {"stale": {"a": made(0.1, 1.0)}}))
    assert text == (
        "interface      cosine  error    size  signs  explained  stale: cosine  reference     "
        "step\n-------------  ------  -----  ------  -----  ---------  -------------  ------------ "
        " ----\na longer name       -      -       -      -          -              -  "
        "bootstrapped   120\na                0.60   0.80  0.60 x      -       36 %           0.10 "
        " true             0\nb                0.01   1.41  1.00 x      -      -98 %              "
        "-  true             0\n\n"
        "a longer name  no gradient arrives: the target that the next stage's predictions gave is "
        "zero\na              explains 36 % of the gradient (cosine 0.60, size 0.60 x); better "
        "than the stale control (cosine 0.10)\n"
        "b              explains nothing: the frozen control (`zero`) would do as well (cosine "
        "0.01)"
    )
    assert "stale" not in summarize(dict(longer))
    assert summarize({}) == str(Diagnosis({})) == "nothing measured: no source predicted a gradient"


def test_measuring_a_diagnosis() -> None:
    a, b = pair(8, 4)
    found = Diagnosis.measure(
        {"x": a, "waits": None},
        {"x": b, "waits": b, "more": b},
        step=7,
        controls={"stale": {"x": b, "waits": a}},
    )
    assert list(found) == ["x"]
    assert found["x"] == compare(a, b, "true", 7)
    assert found.controls == {"stale": {"x": compare(b, b, "true", 7)}}
    short = Diagnosis.measure(
        {"x": a}, {"x": b}, step=7, controls={"stale": {"x": b[:3]}, "none": {"x": None}}
    )
    assert short.controls == {}  # a batch of another size, or none before
    with pytest.raises(DecouplingError, match="no reference for interface 'y'"):
        Diagnosis.measure({"y": a}, {"x": b}, step=0)
