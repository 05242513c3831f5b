"""Fixtures of the folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dni_fx import cli

from .kit import MODELS, Recorder


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


@pytest.fixture
def recorder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """In place of plan_cuts."""
    made = Recorder()
    monkeypatch.setattr(cli, "plan_cuts", made)
    return made
