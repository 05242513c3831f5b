"""The example that fine-tunes a pretrained MiniLM: whole models in, plain checkpoints out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "finetune_pretrained.py"
METHODS = ["backprop", "frozen", "linear, label", "local", "delayed"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    few = ["--limit", "4", "--steps", "3", "--batch", "4", "--seeds", "0"]
    return [*few, "--methods", *METHODS, "--out", str(tmp_path / "runs.json")]


def run(arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minilm_is_fine_tuned_and_reloaded(arguments: list[str], tmp_path: Path) -> None:
    table = run(arguments)
    assert [
        line.strip("|").split("|")[0].strip() for line in table.splitlines() if line.startswith("|")
    ][2:] == METHODS
    assert "equal bit for bit: 5 of 5" in table
    records = {r["method"]: r for r in json.loads((tmp_path / "runs.json").read_text())}
    parameters = {name: record["synthesizer_parameters"] for name, record in records.items()}
    assert [name for name, count in parameters.items() if count] == ["linear, label", "local"]
    assert run(arguments) == table  # nothing is made again
