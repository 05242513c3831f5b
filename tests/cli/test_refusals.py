"""How the command line refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dni_fx import cli
from dni_fx.plan import CutPlan

from ..helpers.paths import ROOT
from .kit import CHAIN, Recorder, run


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "nowhere_here:net",
            ["no module 'nowhere_here'", "nor installed", "run dni-fx in the directory"],
        ),
        ("models_here.sub:net", ["no module 'models_here.sub'", "'models_here'"]),
        (
            "needy_here:net",
            ["'needy_here' raised ModuleNotFoundError", "nothing_of_this_name", "needy_here.py:1"],
        ),
        (
            "broken_here:net",
            ["importing 'broken_here' raised ZeroDivisionError", "broken_here.py:3"],
        ),
        (
            "syntax_here:net",
            ["importing 'syntax_here' raised SyntaxError", "syntax_here.py, line 1"],
        ),
        ("models_here:chian", ["models_here has no 'chian'", "did you mean 'chain'", "nn.Module"]),
        ("models_here:chain.deep", ["models_here has no 'chain.deep'"]),
        (
            "models_here:raising",
            ["models_here:raising raised RuntimeError: no luck", "models_here.py:14", "nn.Module"],
        ),
        ("models_here:needs", ["raised TypeError", "'width'", "without arguments"]),
        ("models_here:leaving", ["raised SystemExit: bye"]),
        ("models_here:number", ["returned a value of type int", "nn.Module"]),
        ("models_here:table", ["is of type dict", "nn.Module"]),
        ("models_here:chain", ["mat1 and mat2"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "points"])
def test_a_target_that_cannot_be_used(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, target: str, words: list[str]
) -> None:
    assert cli.main([command, target, "--input", "4x5"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dni-fx: ")
    assert "Traceback" not in said.err
    assert "\n\n" not in said.err
    missing = [w for w in words if w not in said.err]
    assert not missing, f"{missing} not in: {said.err}"


@pytest.mark.parametrize(
    "option", [["--must-cut", "nowhere"], ["--stages", "2", "--speeds", "1,2,3"]], ids=str
)
def test_what_the_search_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert cli.main([*CHAIN, *option]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("dni-fx: ")
    assert option[-2].strip("-").split("-")[0] in said.err


def test_where_no_file_can_be_is_said_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "made.html").mkdir()
    for option, path, words in (
        ("--out", "gone/plan.json", "the directory gone does not exist"),
        ("--out", ".", "is a directory"),
        ("--draw", "made.html", "is a directory"),
    ):
        assert cli.main(["plan", "nowhere_here:net", "--input", "4x6", option, path]) == 1
        assert f"cannot write {path!r}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: {plan,points,emit,demo}"),
        (["fly"], "invalid choice: 'fly'"),
        (["plan"], "required: package.module:factory, --input"),
        (["points", "models_here:chain"], "required: --input"),
        (
            ["points", "models_here:chain", "--input", "4x6", "--stages", "2"],
            "unrecognized arguments: --stages 2",
        ),
        (
            ["plan", "models_here", "--input", "4x6"],
            "'models_here': expected package.module:factory",
        ),
        (["plan", "models_here:", "--input", "4x6"], "expected package.module:factory"),
        (
            ["plan", "models_here.py:chain", "--input", "4x6"],
            "names a file: expected models_here:chain",
        ),
        (["plan", "nets/small.py", "--input", "4x6"], "names a file: expected nets.small:factory"),
    ]
    + [
        (
            ["plan", "models_here:chain", "--input", "4x6", option, value],
            f"argument {option}: {value!r}: expected",
        )
        for option, values in {
            "--input": [
                "",
                "4x",
                "x4",
                "4,6",
                "0x6",
                "4x-1",
                "4x6.0",
                "٤x6",
                "4x6:",
                "4x6:int",
                "4x6:int64:bool",
            ],
            "--stages": ["0", "2.0", "four"],
            "--micro-batches": ["0", "x"],
            "--latency": ["-1", "inf", "nan", "fast"],
            "--bandwidth": ["0", "-1", "nan", "10GB"],
            "--memory-cap": ["2G", "0", "-1", "two", "1.5.2MB", "0.1B"],
            "--keep-together": [",", "a,,b"],
            "--draw": ["plan.png", "plan"],
        }.items()
        for value in values
    ]
    + [
        (
            ["plan", "models_here:chain", "--input", "4x6", "--speeds", v],
            "expected numbers above 0 joined by commas",
        )
        for v in ("1,", "0,1", "a", "1;2")
    ]
    + [
        (["plan", "models_here:chain", "--input", "4x6", option, "x"], "invalid choice: 'x'")
        for option in ("--objective", "--costs")
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_wrong_dtype_names_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["points", "a:b", "--input", "8x16:int46"])
    assert "found 'int46'; did you mean 'int64' or 'int32'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("1e3", 1000), ("1.5kB", 1500), ("2 MiB", 2 << 20), ("1TB", 10**12)],
)
def test_sizes_in_bytes(text: str, count: int) -> None:
    assert cli.parse_bytes(text) == count


def test_an_interrupt_returns_130_without_a_traceback(folder: Path) -> None:
    done = run("plan", "models_here:interrupted", "--input", "4x6", cwd=folder)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "dni-fx: interrupted\n"


def test_a_reader_who_leaves_early_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "dni_fx", "points", "models_here:chain", "--input", "4x6"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 128 + signal.SIGPIPE
    assert said == ""


def test_a_fault_of_ours_is_not_hidden(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any, **__: Any) -> CutPlan:
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "plan_cuts", faulty)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(CHAIN)
