"""The command line as a shell user meets it: what it prints, writes and returns, and how it
refuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_fx
from dni_fx import cli
from dni_fx.plan import CutPlan

from .test_simulation import balanced, make_plan

ROOT = Path(__file__).resolve().parents[1]
MODELS = """\
import os, signal
import torch
from torch import nn

seen = []

class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(2, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, tokens, scale):
        seen.append((tokens, scale))
        return self.head(self.middle(self.embed(tokens) * scale).relu())

def chain(): return nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])
def raising(): raise RuntimeError("no luck")
def needs(width): return nn.Linear(width, width)
def number(): return 3
def leaving(): raise SystemExit("bye")
def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    os.kill(os.getpid(), signal.SIGINT)
ready, table = chain(), {}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, which holds a few modules; nothing imported from it is left."""
    (tmp_path / "models_here.py").write_text(MODELS)
    (tmp_path / "broken_here.py").write_text("import torch\n\n1 / 0\n")
    (tmp_path / "needy_here.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "syntax_here.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [n for n in sys.modules if n.endswith("_here")]:
        del sys.modules[name]


def run(*arguments: str, cwd: Path, module: bool = True) -> subprocess.CompletedProcess[str]:
    """In a process of its own: ``python -m dni_fx``, or as the installed script starts it."""
    start = (
        ["-m", "dni_fx"]
        if module
        else ["-c", "import sys; from dni_fx.cli import main; sys.exit(main())"]
    )
    # Safe path: an installed script has no current directory on its path either.
    command = [sys.executable, *([] if module else ["-P"]), *start, *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=settings, capture_output=True, text=True, check=False, timeout=300
    )


CHAIN = ("plan", "models_here:chain", "--input", "4x6", "--costs", "analytic", "--quiet")


class Recorder:
    """A plan_cuts that keeps its arguments, for a plan of four equal stages."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.inputs: tuple[torch.Tensor, ...] = ()

    def __call__(
        self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any
    ) -> CutPlan:
        self.inputs, self.options = inputs, options
        return make_plan(balanced(4, parameter_bytes=8))


@pytest.fixture
def recorder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """In place of plan_cuts."""
    made = Recorder()
    monkeypatch.setattr(cli, "plan_cuts", made)
    return made


# What it does.
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [True, False], ids=["python -m", "script"])
def test_plan_measures_prints_and_writes(folder: Path, module: bool) -> None:
    done = run("plan", "models_here:chain", "--input", "4x6", "--stages", "3", "--out", "plan.json", cwd=folder,
               module=module)  # fmt: skip
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
        "0.5 --micro-batches 2 --quiet"
    )
    assert cli.main(words.split()) == 0
    assert recorder.options == {
        "stages": 4, "objective": "memory", "gradients": "linear", "costs": "analytic", "bandwidth": 1e9,
        "speeds": [1.0, 1.0, 2.0, 1.0], "memory_cap": 2 * 1024**3, "keep_together": [("0.weight", "5.weight"), "4"],
        "never_cut": ["2"], "must_cut": ["1", "3"], "progress": False,
    }  # fmt: skip
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
    options = "--stages 3 --must-cut 1 --never-cut 2 --keep-together 4,5 --memory-cap 1MB --speeds 1,1,2 --bandwidth 1e6"
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


def test_inputs_have_their_sizes_and_types(folder: Path) -> None:
    assert cli.main(["points", "models_here:Embedded", "--input", "5x7:int64", "--input", "1"]) == 0
    tokens, scale = sys.modules["models_here"].seen[0]
    assert tokens.shape == (5, 7)
    assert tokens.dtype == torch.int64
    assert scale.shape == (1,)
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", cli.DTYPES)
def test_each_dtype(dtype: str) -> None:
    value = cli._random(*cli._input(f"40x3:{dtype}"), torch.Generator())
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


# What it writes.
# ----------------------------------------------------------------------------------------------------


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
    recorder: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:  # fmt: skip
    (folder / "plan.json").write_text("old")

    def half(path: Path, text: str, **_: Any) -> int:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    assert cli.main([*CHAIN, "--out", "plan.json"]) == (1 if isinstance(error, OSError) else 130)
    monkeypatch.undo()
    assert (folder / "plan.json").read_text() == "old"
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    if isinstance(error, OSError):
        assert (
            capsys.readouterr().err
            == "dni-fx: cannot write plan.json: No space left on device; name another file\n"
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


def test_drawing_goes_through_the_same_door(
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


# How it refuses.
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere_here:net", ["no module 'nowhere_here'", "nor installed", "run dni-fx in the directory"]),
        ("models_here.sub:net", ["no module 'models_here.sub'", "'models_here'"]),
        ("needy_here:net", ["'needy_here' raised ModuleNotFoundError", "nothing_of_this_name", "needy_here.py:1"]),
        ("broken_here:net", ["importing 'broken_here' raised ZeroDivisionError", "broken_here.py:3"]),
        ("syntax_here:net", ["importing 'syntax_here' raised SyntaxError", "syntax_here.py, line 1"]),
        ("models_here:chian", ["models_here has no 'chian'", "did you mean 'chain'", "nn.Module"]),
        ("models_here:chain.deep", ["models_here has no 'chain.deep'"]),
        ("models_here:raising", ["models_here:raising raised RuntimeError: no luck", "models_here.py:16", "nn.Module"]),
        ("models_here:needs", ["raised TypeError", "'width'", "without arguments"]),
        ("models_here:leaving", ["raised SystemExit: bye"]),
        ("models_here:number", ["returned a value of type int", "nn.Module"]),
        ("models_here:table", ["is of type dict", "nn.Module"]),
        ("models_here:chain", ["mat1 and mat2"]),
    ],
)  # fmt: skip
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
        assert f"cannot write {path}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: {plan,points,demo}"),
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
    assert cli._bytes(text) == count


def test_an_interrupt_returns_130_without_a_traceback(folder: Path) -> None:
    done = run("plan", "models_here:interrupted", "--input", "4x6", cwd=folder)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "dni-fx: interrupted\n"


def test_a_reader_who_leaves_early_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "dni_fx.cli", "points", "models_here:chain", "--input", "4x6"]
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


# Help, version, packaging.
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["plan"], ["points"], ["demo"]], ids=str)
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
    assert [line[0] for line in lines] == ["points", "plan", "plan", "demo"]
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


# The demo.
# ----------------------------------------------------------------------------------------------------------


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
    (folder / "examples").mkdir()
    (folder / "examples" / "digits.py").write_text("raise AssertionError('of another project')")
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert "examples/digits.py of dni_fx's source repository" in said
    assert str(folder / "site-packages") in said
    assert "make demo" in said


def test_demo_in_a_checkout_beside_an_installation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(folder / "site-packages" / "dni_fx" / "cli.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    for name, text in (
        ("dni_fx/cli.py", ""),
        ("examples/beside_here.py", "VALUE = 3"),
        (
            "examples/digits.py",
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
