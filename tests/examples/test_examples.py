"""The nine examples run, show what they say, and stay short enough to copy."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from ..helpers.paths import EXAMPLES
from .kit import run_example

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SEVERAL = {"choosing_cuts", "finetune_huggingface", "processes"}  # looked at in other ways


def numbers(printed: str) -> list[float]:
    """The last number of each line."""
    return [float(re.findall(r"\d+\.?\d*", line)[-1]) for line in printed.splitlines()]


def test_there_are_nine() -> None:
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_an_example_can_be_copied(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= 60
    assert text.startswith('"""')
    nodes = list(ast.walk(ast.parse(text)))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    known = sys.stdlib_module_names | {"torch", "dni_fx", "sklearn", "transformers"}
    assert imported <= known - {"argparse"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEVERAL])
def test_an_example_shows_what_it_says(name: str, tmp_path: Path) -> None:
    if "sklearn" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"):
        pytest.importorskip("sklearn")
    found = numbers(run_example(name, tmp_path))
    assert list(tmp_path.iterdir()) == []
    if name == "quickstart":
        backprop, decoupled, nothing = found
        assert backprop > 95
        assert nothing + 5 < decoupled < backprop + 2
    elif name == "own_source":
        contrastive, local, zero = found
        assert min(contrastive, local) > zero + 10
    elif name == "own_loop":
        linear, zero = found
        assert linear < 0.7 * zero
    elif name == "through_time":
        truncated, synthetic = found
        assert synthetic > truncated + 5
    elif name == "threads":
        assert max(found) < 0.1
    else:
        assert name == "drop_in"
        assert found[0] > 85


def test_the_example_of_cuts_prints_a_plan_and_a_forecast(tmp_path: Path) -> None:
    printed = run_example("choosing_cuts", tmp_path)
    assert "places can be cut" in printed
    assert "3 stages, 2 cuts" in printed
    assert "3 equal devices: decoupled" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_processes_prints_the_same_alone(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    one = run_example("processes", alone)
    two = run_example("processes", together, processes=2)
    assert two == one
    assert float(re.findall(r"[\d.]+%", one)[0].rstrip("%")) > 70
    assert (together / "checkpoints" / "step-000000200").is_dir()
    assert run_example("processes", together, processes=2) == two  # goes on where it ended
