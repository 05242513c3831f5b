"""Experiments as modules and as commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from ..helpers.paths import EXPERIMENTS


def load_experiment(name: str) -> ModuleType:
    """An experiment as a module, without putting experiments/ on the import path."""
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


data = load_experiment("data")


def run_experiment(
    name: str, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does; warnings are errors there too."""
    command = [sys.executable, "-W", "error", str(EXPERIMENTS / f"{name}.py"), *arguments]
    package = str(EXPERIMENTS.parent)  # works without an installation too
    settings = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, env=settings, capture_output=True, text=True, check=False, timeout=300
    )


def rows(output: str) -> dict[str, list[str]]:
    """Cells of a markdown table by their row's first cell, the header left out."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}
