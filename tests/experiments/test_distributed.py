"""The distributed experiments run under torchrun and in one process, with the same numbers, and go
on after a crash.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..helpers.paths import EXPERIMENTS
from .kit import rows
from .records import load

text = load("distributed_text")

MNIST = [
    "distributed_mnist.py",
    "--data",
    "digits",
    "--width",
    "16",
    "--batch",
    "16",
    "--steps",
    "20",
    "--every",
    "10",
]
TEXT = [
    "distributed_text.py",
    "--width",
    "16",
    "--length",
    "8",
    "--batch",
    "4",
    "--steps",
    "6",
    "--every",
    "3",
]
TRUNK = ["shared_trunk.py", "--seconds", "1", "--work", "10", "--slow", "5"]


def run(script: str, *arguments: str, cwd: Path, processes: int = 1, restarts: int = 0) -> str:
    """What an experiment prints, on so many processes; none is left."""
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command += ["--max-restarts", str(restarts)]
    settings = {**os.environ, "PYTHONPATH": str(EXPERIMENTS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(EXPERIMENTS / script), *arguments],
        cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise AssertionError(process.communicate()) from None
    assert process.returncode == 0, errors
    return output


def curve(output: str) -> list[str]:
    """The lines with measurements."""
    return [line for line in output.splitlines() if "  step " in line]


@pytest.mark.parametrize(
    ("script", "methods"),
    [(MNIST, ["linear"]), ([*TEXT, "--compare"], ["linear", "zero", "stale", "exact"])],
    ids=["mnist", "text"],
)
def test_two_processes_print_what_one_does(
    tmp_path: Path, script: list[str], methods: list[str]
) -> None:
    options = ["--staleness", "1", "--source", "linear"]
    one = run(*script, *options, cwd=tmp_path)
    two = run(*script, *options, "--timeline", "spans.json", cwd=tmp_path, processes=2)
    assert "1 process\n" in one
    assert "2 processes\n" in two
    assert [line.split()[0] for line in curve(one)[1::2]] == methods
    assert curve(one) == curve(two)
    assert {line.split()[1] for line in two.splitlines() if line.startswith("stage_")} == {
        "0",
        "1",
    }  # ranks
    for file in [f"spans-{m}.json" for m in methods] if len(methods) > 1 else ["spans.json"]:
        assert {
            event["pid"] for event in json.loads((tmp_path / file).read_text())["traceEvents"]
        } == {0, 1}


def test_a_file_may_be_the_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be or not to be, " * 49 + "that is ünheard")
    symbols, held_out = text.read(tmp_path / "text")
    assert len(symbols) == 896
    assert (
        bytes(torch.cat([symbols, held_out]).tolist())
        == b"to be or not to be, " * 49 + b"that is \x7f\x7fnheard"
    )
    library, rest = text.read(None)
    assert len(library) > 8 * len(rest) > 100_000


def test_goes_on_after_a_process_has_ended(tmp_path: Path) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(EXPERIMENTS)!r})
import distributed_text
from dni_fx import distributed
step = distributed.Trainer.step
def once(self, *args, **kwargs):
    if self.steps == 5 and self.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    return step(self, *args, **kwargs)
distributed.Trainer.step = once
distributed_text.main()
"""
    )
    options = [*TEXT[1:], "--staleness", "1", "--checkpoint"]
    crashed = run(str(crash), *options, "one", cwd=tmp_path, processes=2, restarts=1)
    assert "local: goes on after step 3" in crashed
    assert curve(crashed) == curve(run(TEXT[0], *options, "two", cwd=tmp_path))  # in one process
    again = run(TEXT[0], *options, "one", cwd=tmp_path)  # with nothing left to do
    assert "local: goes on after step 6" in again
    assert not curve(again)


@pytest.mark.parametrize("processes", [1, 4], ids=["threads", "processes"])
def test_a_slow_client_holds_nobody_up(tmp_path: Path, processes: int) -> None:
    updates = rows(run(*TRUNK, cwd=tmp_path, processes=processes).split("\n\n")[1])
    assert list(updates) == ["trunk", "digit", "parity", "large"]
    assert int(updates["large"][1]) < 0.7 * min(
        int(updates[name][1]) for name in ("digit", "parity")
    )
    for name in (
        "trunk",
        "digit",
        "parity",
    ):  # results come from longer runs on a machine that is not busy
        assert int(updates[name][1]) > 0.6 * int(updates[name][0])
