"""Reports, their verdicts, histories and pictures."""

from __future__ import annotations

import builtins
import doctest
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import diagnostics
from dni_fx.diagnostics import Diagnosis, History, plot, summarize, write_tensorboard
from dni_fx.errors import DecouplingError
from dni_fx.reports import InterfaceReport, StepReport, compare
from dni_fx.reports import steps as reports

nan, inf = math.nan, math.inf


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


def pair(
    *shape: int, dtype: torch.dtype = torch.float32, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A prediction and a reference that resemble each other, with zeros in both."""
    reference = torch.randn(shape) * 1e-5
    prediction = reference + noise * torch.randn(shape) * 1e-5
    if reference.numel() > 8:
        reference.view(-1)[::5] = 0.0
        prediction.view(-1)[::7] = 0.0
    return prediction.to(dtype), reference.to(dtype)


# compare.
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4, 5)])
def test_compare_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prediction, reference = pair(*shape, dtype=dtype)
    report = compare(prediction, reference, "true", 3)
    assert_is(report, reference_values(prediction, reference))
    assert (report.reference, report.step) == ("true", 3)
    assert -1 <= report.cosine <= 1


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


# Verdicts.
# ---------------------------------------------------------------------------------------------------------


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


# Diagnosis.
# --------------------------------------------------------------------------------------------------------


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


# A run, for what follows.
# ------------------------------------------------------------------------------------------


def chain() -> nn.Module:
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    model.add_module("layer2", nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model.add_module("head", nn.Linear(8, 3))
    return model


def trainer_of(gradients: Any = "linear", **options: Any) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        chain(), ["layer1", "layer2"], example_inputs=(torch.randn(4, 6),), gradients=gradients,
        context=dni_fx.one_hot(3),
    )  # fmt: skip
    return dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1), **options
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(count)]


def step_report(
    step: int, loss: float | Tensor = 1.0, measured: int | None = None, cosine: float = 0.5
) -> StepReport:
    at = step - 1 if measured is None else measured
    report = InterfaceReport(cosine, 0.5, 0.25, "true", at, 0.75)
    return StepReport(torch.as_tensor(loss), torch.zeros(3), {"cut": report}, step)


# History.
# ----------------------------------------------------------------------------------------------------------


def test_history_keeps_every_measurement_once() -> None:
    trainer, history, seen = trainer_of(metrics_every=3), History(), []

    def note(report: StepReport) -> None:
        seen.append(report)
        history.add(report)

    trainer.fit(batches(8), progress=False, on_step=note)
    assert history.losses == {i: pytest.approx(float(r.loss)) for i, r in enumerate(seen)}
    assert list(history.interfaces) == ["layer1", "layer2"]
    for name, series in history.interfaces.items():
        assert [r.step for r in series] == [0, 3, 6]
        assert series == [seen[i].interfaces[name] for i in (0, 3, 6)] or math.isnan(
            series[0].cosine
        )
        assert history.last[name] is series[-1]
    text = history.table()
    assert text.startswith(f"loss {float(seen[-1].loss):.4g} after 8 steps\n")
    assert summarize(history.last) in text
    assert seen[-1].interfaces["layer1"].verdict in text


def test_an_empty_history() -> None:
    history = History()
    assert (history.losses, history.interfaces, history.last) == ({}, {}, {})
    assert history.table() == "no steps yet\n\nnothing measured: no source predicted a gradient"
    assert History.from_json(history.to_json()).table() == history.table()


def test_history_keeps_no_outputs_and_reads_losses_late() -> None:
    class Counting(Tensor):
        read = 0

        def item(self) -> Any:
            type(self).read += 1
            return super().item()

    history, report = History(), step_report(1, torch.tensor(2.0).as_subclass(Counting))
    history.add(report)
    assert Counting.read == 0
    assert not any(isinstance(v, Tensor) and v.numel() > 1 for v in vars(history).values())
    assert history.losses == {0: 2.0}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        history.add(step_report(2 + len(history.losses), torch.ones((), dtype=dtype)))
    history.add(step_report(9, torch.ones(1, requires_grad=True)))
    history.add(step_report(10, nan))  # a step without the last stage
    assert list(history.losses.values()) == [2.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("most", [2, 3, 4, 10, 11])
def test_a_bounded_history_still_covers_the_run(most: int) -> None:
    history, whole = History(most), History(None)
    for step in range(1, 1000):
        for each in (history, whole):
            each.add(step_report(step, float(step), cosine=step / 1000))
        if step % 97 == 0:
            assert len(history.losses) <= most
    steps = list(history.losses)
    assert len(steps) <= most
    assert (steps[0], steps[-1]) == (0, 998)
    gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1  # evenly spaced, but for the last
    assert all(history.losses[s] == s + 1 for s in steps)
    assert [r.step for r in history.interfaces["cut"]] == steps
    assert history.last == whole.last
    assert list(whole.losses) == list(range(999))


@pytest.mark.parametrize("most", [1, 0, -3, 2.5, True, "10"])
def test_history_refuses_other_bounds(most: Any) -> None:
    with pytest.raises(DecouplingError, match="most="):
        History(most)


@pytest.mark.parametrize("most", [None, 4])
def test_a_run_that_goes_on_from_an_earlier_state(most: int | None) -> None:
    history, straight = History(most), History(most)
    for step in range(1, 12):
        history.add(step_report(step, 100.0))
    for step in range(1, 21):
        straight.add(step_report(step, 100.0 if step < 7 else 1.0))
    for step in range(7, 21):
        history.add(step_report(step, 1.0))
    assert history.losses == (straight.losses if most is None else history.losses)
    steps = list(history.losses)
    assert steps == sorted(set(steps))
    assert steps[-1] == 19
    assert all(loss == (100.0 if step < 6 else 1.0) for step, loss in history.losses.items())
    assert [r.step for r in history.interfaces["cut"]] == steps


def test_history_as_json() -> None:
    history = History(5)
    history.add(
        StepReport(
            torch.tensor(1.5), None, {"a.b": InterfaceReport(nan, inf, 0.0, "bootstrapped", 0)}, 1
        )
    )
    for step in range(2, 10):
        history.add(step_report(step, 1 / step, cosine=1 / step))
    text = history.to_json()
    assert all(word not in text for word in ("NaN", "Infinity"))
    json.loads(text, parse_constant=pytest.fail)
    again = History.from_json(text)
    assert again.to_json() == text
    assert again.table() == history.table()
    assert again.losses == history.losses
    assert again.last["cut"] == history.last["cut"]
    assert math.isnan(again.last["a.b"].cosine)
    assert again.last["a.b"].relative_error == inf
    for step in range(10, 30):  # goes on as if it had not been away
        again.add(step_report(step))
        history.add(step_report(step))
    assert again.to_json() == history.to_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format="dni_fx cut plan"), "no dni_fx history"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("losses"), "damaged"),
        (lambda c: c["losses"].pop("stride"), "damaged"),
        (lambda c: c["losses"]["loss"].append(1.0), "damaged"),
        (lambda c: c["losses"].update(seen=0), "damaged"),
        (lambda c: c.update(interfaces=[]), "damaged"),
        (lambda c: c["interfaces"]["cut"].pop("reference"), "damaged"),
        (lambda c: c["interfaces"]["cut"].update(cosine=["far"]), "damaged"),
        (lambda c: c.update(most=0), "most="),
    ],
)
def test_json_of_something_else(change: Any, says: str) -> None:
    history = History()
    history.add(step_report(1))
    content = json.loads(history.to_json())
    change(content)
    with pytest.raises(DecouplingError, match=says):
        History.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", None])
def test_text_that_is_no_history(text: Any) -> None:
    with pytest.raises(DecouplingError, match="history"):
        History.from_json(text)


# TensorBoard.
# ------------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float
        self.scalars.append((tag, value, step))


def test_write_tensorboard() -> None:
    writer, trainer = Writer(), trainer_of("stale", metrics_every=2)
    for x, target in batches(3):
        write_tensorboard(writer, trainer.step(x, target=target))
    assert [s for t, _, s in writer.scalars if t == "dni/loss"] == [0, 1, 2]
    assert not any(math.isnan(v) for _, v, _ in writer.scalars)
    assert [s for t, _, s in writer.scalars if t == "dni/layer2/cosine"] == [
        2
    ]  # nan in step 0, where it says nothing
    assert [s for t, _, s in writer.scalars if t == "dni/layer2/relative_error"] == [0, 2]
    tags = {t for t, _, _ in writer.scalars}
    metrics = ("cosine", "relative_error", "rms_ratio", "sign_agreement", "explained")
    assert tags >= {f"dni/layer2/{metric}" for metric in metrics}
    assert {t.split("/")[1] for t in tags} == {"loss", "layer1", "layer2"}


def test_what_is_logged_and_when() -> None:
    writer, report = Writer(), step_report(8, nan, measured=4)
    write_tensorboard(writer, report)
    assert writer.scalars == []  # measured before, and no loss
    write_tensorboard(writer, report, fresh=False, prefix="run")
    assert writer.scalars[0] == ("run/cut/cosine", 0.5, 4)
    assert len(writer.scalars) == 5


def test_with_the_real_tensorboard(tmp_path: Path) -> None:
    with warnings.catch_warnings():  # not ours
        warnings.simplefilter("ignore")
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(tmp_path))
        for step in range(1, 4):
            write_tensorboard(
                writer, step_report(step, float(step), cosine=nan if step == 2 else 0.5)
            )
        writer.close()
        events = EventAccumulator(str(tmp_path))
        events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("dni/loss")] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("dni/cut/cosine")] == [(0, 0.5), (2, 0.5)]


# Pictures.
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def history() -> History:
    history = History()
    odd = InterfaceReport(nan, inf, 0.0, "bootstrapped", 0)
    for step in range(1, 30):
        report = step_report(step, 1 / step, cosine=1 - 1 / step)
        history.add(StepReport(report.loss, None, {"_first": odd, **report.interfaces}, step))
    return history


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_plot(tmp_path: Path, history: History, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"history{suffix}"
    assert plot(history, str(path)) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix != ".svg" else b"<svg" in content
    assert len(content) > 10_000


def test_plots_of_little(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    plot(history, tmp_path / "empty.png")
    history.add(StepReport(torch.tensor(1.0), None, {}, 1))
    plot(history, tmp_path / "exact.png")
    history.add(
        StepReport(torch.tensor(1.0), None, {"cut": InterfaceReport(nan, nan, nan, "true", 1)}, 2)
    )
    plot(history, tmp_path / "nothing.png")


def test_plots_that_cannot_be(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DecouplingError, match=r"must end in one of \..*\.png"):
        plot(history, tmp_path / "history.docx")
    with pytest.raises(DecouplingError, match="must end in"):
        plot(history, tmp_path / "history")
    with pytest.raises(DecouplingError, match="there is no folder"):
        plot(history, tmp_path / "away" / "history.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(DecouplingError, match="cannot write"):
        plot(history, tmp_path / "taken.png")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DecouplingError, match=r"pip install matplotlib"):
        plot(history, tmp_path / "history.png")


# Documentation.
# ----------------------------------------------------------------------------------------------------


def test_docstring_examples() -> None:
    for module in (diagnostics, reports):
        assert doctest.testmod(module).failed == 0
