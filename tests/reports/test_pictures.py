"""TensorBoard, pictures, and the documentation's own examples."""

from __future__ import annotations

import builtins
import doctest
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dni_fx import diagnostics
from dni_fx.diagnostics import History, plot, plot_runs, write_tensorboard
from dni_fx.errors import DecouplingError
from dni_fx.reports import InterfaceReport, StepReport
from dni_fx.reports import steps as reports

from ..helpers.training import batch, trainer_of
from ..models.small import SKIPS
from .kit import nan, step_report


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float
        self.scalars.append((tag, value, step))


def test_write_tensorboard() -> None:
    writer, trainer = Writer(), trainer_of("stale", SKIPS, metrics_every=2)
    for x, target in map(batch, range(3)):
        write_tensorboard(writer, trainer.step(x, target=target))
    assert [s for t, _, s in writer.scalars if t == "dni/loss"] == [0, 1, 2]
    assert not any(math.isnan(v) for _, v, _ in writer.scalars)
    assert [s for t, _, s in writer.scalars if t == "dni/c/cosine"] == [
        2
    ]  # nan in step 0, where it says nothing
    assert [s for t, _, s in writer.scalars if t == "dni/c/relative_error"] == [0, 2]
    tags = {t for t, _, _ in writer.scalars}
    metrics = ("cosine", "relative_error", "rms_ratio", "sign_agreement", "explained")
    assert tags >= {f"dni/c/{metric}" for metric in metrics}
    assert {t.split("/")[1] for t in tags} == {"loss", "a", "b", "c"}


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


def run_of(level: float, steps: int = 40) -> History:
    history = History()
    for step in range(1, steps):
        history.add(step_report(step, level / step, cosine=level / 10))
    return history


def test_runs_of_several_methods_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[tuple[list[int], list[float], str]] = []
    plotting = Axes.plot

    def note(self: Axes, steps: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append((list(steps), list(values), kwargs.get("label", "")))
        return plotting(self, steps, values, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", note)
    seeds = [run_of(2.0), run_of(4.0)]
    path = plot_runs({"dni": seeds, "zero": run_of(5.0)}, tmp_path / "runs.svg", smooth=0.05)
    assert b"<svg" in path.read_bytes()
    loss, cosine = (line for line in drawn if line[2] == " dni")
    assert loss[0] == list(range(39))
    assert loss[1][9] == pytest.approx(3.0 * (1 / 9 + 1 / 10) / 2)  # the mean, over two steps
    assert loss[1][9] != pytest.approx(3.0 / 10)
    assert cosine[1] == pytest.approx([0.3] * 39)
    assert len(drawn) == 2 * (2 + 1) + 2 * 1  # each seed faintly, and one method of one seed


def test_runs_that_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for runs, says in [
        ({}, "no runs"),
        ({"a": []}, "the runs of 'a'"),
        ({"a": [run_of(1.0), run_of(1.0, 20)]}, "different steps"),
    ]:
        with pytest.raises(DecouplingError, match=says):
            plot_runs(runs, tmp_path / "runs.png")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_report_prints_as_one_line() -> None:
    report = step_report(8, 0.25, cosine=0.5)
    assert str(report) == "8 steps: loss 0.25; cosine at cut 0.50"
    many = StepReport(
        torch.tensor(1.5), torch.ones(999), {str(k): report.interfaces["cut"] for k in range(9)}, 3
    )
    assert str(many).endswith("5 0.50, 3 more")
    assert str(StepReport(torch.tensor(1.5), None)) == "0 steps: loss 1.5"
    assert "tensor([" not in repr(many)
    assert "tensor([" in repr(many.outputs)


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


def test_docstring_examples() -> None:
    for module in (diagnostics, reports):
        assert doctest.testmod(module).failed == 0
