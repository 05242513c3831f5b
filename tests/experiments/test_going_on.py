"""Experiments go on where they were interrupted, to the same records."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from .kit import run_experiment
from .records import SMALL, deep, feedforward, interrupted, records_in, rows, sparse


def test_an_interrupted_experiment_goes_on_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "2",
        "--seeds",
        "0",
        "1",
        "--methods",
        "backprop",
        "dni",
        "cdni",
        "stale",
    ]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert feedforward.main([*arguments, "--out", str(whole)]) == 0
    expected = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(
            feedforward, "run_one", interrupted(feedforward.run_one, at_run=3, at_step=2)
        )
        assert feedforward.main([*arguments, "--out", str(parts)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert records_in(parts) == records_in(whole)[:2]
    before = json.loads(parts.read_text())
    assert feedforward.main([*arguments, "--out", str(parts)]) == 0
    assert json.loads(parts.read_text())[:2] == before  # with their times: not made again
    assert records_in(parts) == records_in(whole)
    assert len(records_in(whole)) == 8
    without_times = [{k: v for k, v in row.items() if k != "CPU seconds"} for row in rows(expected)]
    again = [
        {k: v for k, v in row.items() if k != "CPU seconds"}
        for row in rows(capsys.readouterr().out)
    ]
    assert again == without_times


def test_finished_runs_need_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "--seeds",
        "0",
        "--methods",
        "zero",
        "--out",
        str(tmp_path / "runs.json"),
    ]
    assert feedforward.main(arguments) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(feedforward, "load_data", pytest.fail)
    monkeypatch.setattr(feedforward, "run_one", pytest.fail)
    assert feedforward.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "--seeds",
        "0",
        "--methods",
        "cdni",
        "--out",
        str(tmp_path / "runs.json"),
    ]
    assert feedforward.main(arguments) == 0
    assert feedforward.main([*arguments, "--synthesizer-lr", "0.5"]) == 0
    rates = [
        r["settings"]["synthesizer_optimizer"]["lr"] for r in records_in(tmp_path / "runs.json")
    ]
    assert len(rates) == 2
    assert rates[1] == 0.5 != rates[0]


def test_several_processes_make_the_same_records(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "2",
        "--seeds",
        "0",
        "--methods",
        "backprop",
        "cdni",
        "--out",
    ]
    assert feedforward.main([*arguments, str(tmp_path / "here.json")]) == 0
    apart = [*arguments, "apart.json", "--jobs", "2"]
    done = run_experiment("paper_feedforward", *apart, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    here, apart = (
        sorted(records_in(tmp_path / f"{name}.json"), key=lambda r: (r["setting"], r["method"]))
        for name in ("here", "apart")
    )
    assert here == apart
    assert len(here) == 4


@pytest.mark.parametrize("content", ['[{"method": "cdni"', '{"method": "cdni"}', "[1, 2]"])
@pytest.mark.parametrize("module", [feedforward, sparse, deep], ids=lambda module: module.__name__)
def test_a_damaged_file_is_an_error(
    tmp_path: Path, module: ModuleType, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "runs.json"
    broken.write_text(content)
    assert module.main(["--out", str(broken)]) == 1
    assert "runs.json holds no finished runs" in capsys.readouterr().err
    assert broken.read_text() == content


def test_missing_data_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(tmp_path), "--methods", "zero", "--seeds", "0", "1"]
    assert deep.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 1
    assert f"no CIFAR-10 in {tmp_path}" in capsys.readouterr().err
    done = run_experiment("deep_cifar", *arguments, "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert f"no CIFAR-10 in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(feedforward.METHODS, ("fcn", "dni"), {"gradients": "no such source"})
    arguments = [*SMALL, "--layers", "1", "--seeds", "0", "--methods", "dni", "zero"]
    assert feedforward.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 1
    printed = capsys.readouterr()
    assert "FAILED fcn 1, dni, seed 0" in printed.err
    assert "no such source" in printed.err
    assert [row["method"] for row in rows(printed.out)] == ["zero"]
