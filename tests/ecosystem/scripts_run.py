"""Runs the scripts beside it, as they are or with a word of them changed."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent / "scripts"


def run_script(
    name: str, folder: Path, argument: str | Path = "", changes: dict[str, str] | None = None
) -> Any:
    """What the script's variables are in the end.

    Args:
        name: of the script, without its suffix.
        folder: an empty one.
        argument: what it is called with; the folder by default.
        changes: what in its text stands for what; all of them occur.
    """
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), str(argument or folder)])
        return runpy.run_path(str(path))


def differing_lines(name: str, other: str) -> int:
    """How many lines have to be written to make one script of the other, or taken away, whichever
    are more.
    """
    texts = [(SCRIPTS / f"{n}.py").read_text(encoding="utf-8").splitlines() for n in (name, other)]
    found = [line for line in difflib.ndiff(*texts) if line[2:].strip()]
    return max(sum(line.startswith(sign) for line in found) for sign in "+-")
