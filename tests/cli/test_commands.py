"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import dni_fx
from dni_fx import cli
from dni_fx.plan import CutPlan

from ..helpers.paths import ROOT
from ..plans.events import balanced, make_plan
from .kit import CHAIN, Recorder, run


@pytest.mark.parametrize("module", [True, False], ids=["python -m", "script"])
def test_plan_measures_prints_and_writes(folder: Path, module: bool) -> None:
    done = run(
        "plan",
        "models_here:chain",
        "--input",
        "4x6",
        "--stages",
        "3",
        "--out",
        "plan.json",
        cwd=folder,
        module=module,
    )
    assert done.returncode == 0, done.stderr
    plan = CutPlan.from_json((folder / "plan.json").read_text())
    assert len(plan.cuts) == 2
    assert done.stdout.startswith("Sequential: 3 stages, 2 cuts, graph ")
    assert "plan written to plan.json" in done.stdout
    assert "schedule " in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "on 3 equal devices" in last or "3 equal devices:" in last
    assert last.endswith("compare time to loss, not steps.")
    assert "%|" in done.stderr  # tqdm's bar
    assert "Traceback" not in done.stderr


def test_quiet_analytic_plan_is_silent_on_stderr_and_repeats_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for _ in range(2):
        assert cli.main(CHAIN) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].err == ""
    assert outputs[0].out.splitlines()[0] == outputs[1].out.splitlines()[0]


def test_every_option_reaches_the_search(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "plan models_here:chain --input 4x6 --stages 4 --objective memory --costs analytic "
        "--gradients linear --bandwidth 1e9 --speeds 1,1,2,1 --memory-cap 2GiB --must-cut 1 "
        "--must-cut 3 --never-cut 2 --keep-together 0.weight,5.weight --keep-together 4 --latency "
        "0.5 --micro-batches 2 --within modules --max-values 3 --quiet"
    )
    assert cli.main(words.split()) == 0
    assert recorder.options == {
        "stages": 4,
        "objective": "memory",
        "gradients": "linear",
        "costs": "analytic",
        "bandwidth": 1e9,
        "speeds": [1.0, 1.0, 2.0, 1.0],
        "memory_cap": 2 * 1024**3,
        "keep_together": [("0.weight", "5.weight"), "4"],
        "never_cut": ["2"],
        "must_cut": ["1", "3"],
        "within": "modules",
        "max_values": 3,
        "progress": False,
    }
    told = dni_fx.simulate(
        make_plan(balanced(4, parameter_bytes=8)),
        micro_batches=2,
        latency=0.5,
        bandwidth=1e9,
        speeds=[1, 1, 2, 1],
    )
    assert capsys.readouterr().out.endswith(f"\n\n{told}\n")


def test_defaults_are_those_of_plan_cuts(recorder: Recorder) -> None:
    import inspect

    assert cli.main(["plan", "models_here:chain", "--input", "4x6"]) == 0
    defaults = {n: p.default for n, p in inspect.signature(dni_fx.plan_cuts).parameters.items()}
    assert recorder.options.pop("progress") is True
    assert {n: tuple(v) if isinstance(v, list) else v for n, v in recorder.options.items()} == {
        n: defaults[n] for n in recorder.options
    }


def test_options_that_plan_cuts_understands_end_to_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--stages 3 --must-cut 1 --never-cut 2 --keep-together 4,5 --memory-cap 1MB"
    options += " --speeds 1,1,2 --bandwidth 1e6"
    assert cli.main([*CHAIN, *options.split(), "--objective", "traffic", "--out", "p.json"]) == 0
    cuts = CutPlan.from_json((folder / "p.json").read_text()).cuts
    assert "1" in cuts
    assert not {"2", "4"} & set(cuts)
    assert "3 devices" in capsys.readouterr().out


def test_points_lists_where_to_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["points", "models_here:chain", "--input", "4x6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cut after")
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3", "4", "5"]


def test_inputs_have_their_sizes_and_types(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["points", "models_here:Embedded", "--input", "5x7:int64", "--input", "1"]) == 0
    assert "(5, 7) torch.int64 (1,) torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", cli.DTYPES)
def test_each_dtype(dtype: str) -> None:
    value = cli._random(*cli.parse_input(f"40x3:{dtype}"), torch.Generator())
    assert value.dtype == getattr(torch, dtype)
    if not value.dtype.is_floating_point:
        assert set(value.unique().tolist()) == {0, 1}


def test_the_seed_decides_inputs(recorder: Recorder) -> None:
    seen = []
    for seed in ("0", "0", "1"):
        assert cli.main([*CHAIN, "--seed", seed]) == 0
        seen.append(recorder.inputs[0])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_module_itself_will_do(folder: Path) -> None:
    assert cli.main(["points", "models_here:ready", "--input", "4x6"]) == 0
    assert (
        cli.main(["plan", "torch.nn:Flatten", "--input", "4x6"]) == 1
    )  # nothing to train: said by dni_fx


def test_an_existing_file_is_replaced_with_its_mode_and_through_links(
    recorder: Recorder, folder: Path
) -> None:
    real, link = folder / "real.json", folder / "link.json"
    real.write_text("old" * 1000)
    real.chmod(0o640)
    link.symlink_to(real)
    assert cli.main([*CHAIN, "--out", "link.json"]) == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["model"] == "Net"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(p.name for p in folder.glob("*.json")) == ["link.json", "real.json"]
    assert list(folder.glob(".*")) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"]
)
def test_a_file_is_never_half_written(
    recorder: Recorder,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    (folder / "plan.json").write_text("old")

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    assert cli.main([*CHAIN, "--out", "plan.json"]) == (1 if isinstance(error, OSError) else 130)
    monkeypatch.undo()
    assert (folder / "plan.json").read_text() == "old"
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    if isinstance(error, OSError):
        assert (
            capsys.readouterr().err
            == "dni-fx: cannot write 'plan.json': No space left on device; name another file\n"
        )


def test_what_is_no_file_is_written_to_but_not_replaced(recorder: Recorder, folder: Path) -> None:
    pipe = folder / "pipe.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli.main([*CHAIN, "--out", str(pipe)]) == 0
        assert json.loads(os.read(reader, 100_000))["model"] == "Net"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_plan_is_drawn_where_it_was_asked_for(
    recorder: Recorder,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        CutPlan, "draw", lambda _plan, path: Path(path).write_text(Path(path).suffix), raising=False
    )
    assert cli.main([*CHAIN, "--draw", "plan.svg"]) == 0
    assert (folder / "plan.svg").read_text() == ".svg"
    assert "plan drawn in plan.svg" in capsys.readouterr().out
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.skipif(
    importlib.util.find_spec("dni_fx.drawing") is None, reason="plans cannot be drawn yet"
)
@pytest.mark.parametrize("suffix", ["html", "svg"])
def test_a_real_drawing(folder: Path, suffix: str) -> None:
    assert cli.main([*CHAIN, "--draw", f"plan.{suffix}"]) == 0
    assert f"<{suffix}" in (folder / f"plan.{suffix}").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [[], ["plan"], ["points"], ["emit"], ["demo"]], ids=str)
def test_help_has_examples_that_parse(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    lines = [
        line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  dni-fx ")
    ]
    assert [line[0] for line in lines] == ["points", "plan", "plan", "emit", "demo"]
    for line in lines:
        options, rest = cli.make_parser().parse_known_args(line)
        assert rest == ([] if line[0] != "demo" else line[1:])
        assert options.command == line[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dni_fx {dni_fx.__version__}, torch {torch.__version__}\n"


def test_pyproject_names_the_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    assert scripts == {"dni-fx": f"{cli.main.__module__}:{cli.main.__name__}"}


def test_demo_runs_from_anywhere_with_a_checkout(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    done = run("demo", "--steps", "2", "--out", "made", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "exact mode equals backprop bit for bit" in done.stdout
    assert (folder / "made" / "digits.png").exists()
    assert run("demo", "--steps", "0", cwd=folder).returncode == 2


def test_demo_without_a_checkout_says_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(folder / "site-packages" / "dni_fx" / "cli.py"))
    (folder / "experiments").mkdir()
    (folder / "experiments" / "digits.py").write_text("raise AssertionError('of another project')")
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert "experiments/digits.py of dni_fx's source repository" in said
    assert str(folder / "site-packages") in said
    assert "make demo" in said


def test_demo_in_a_checkout_beside_an_installation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(folder / "site-packages" / "dni_fx" / "cli.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    for name, text in (
        ("dni_fx/cli.py", ""),
        ("experiments/beside_here.py", "VALUE = 3"),
        (
            "experiments/digits.py",
            "import sys, beside_here; print(sys.argv[1:]); sys.exit(beside_here.VALUE)",
        ),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    before = list(sys.argv), list(sys.path)
    assert cli.main(["demo", "--steps", "7"]) == 3
    assert capsys.readouterr().out == "['--steps', '7']\n"
    assert (sys.argv, sys.path) == before


def test_demo_names_missing_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert cli.main(["demo"]) == 1
    assert "needs matplotlib and sklearn: pip install 'dni_fx[demo]'" in capsys.readouterr().err
