"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from ..errors import DecouplingError

_STEP = re.compile(r"step-(\d{9})")
WRITING = ".step-*.writing"
"""Folders of steps that are being written, or were when a run ended."""


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file beside its place, then put it there in one move.

    Whoever reads ``path`` meanwhile, or after an error or a kill, finds the old file whole.

    Args:
        path: of the file; one that is there is replaced, its mode stays. A link stays a link, and
            what is no file (a pipe, ``/dev/stdout``) is written to.
        content: text is written as UTF-8, with its line ends as they are.

    Returns:
        The path.

    Raises:
        DecouplingError: the file cannot be written; why, and nothing is left beside it.
    """
    path = Path(path)
    target = path.resolve()
    special = target.exists() and not target.is_file()
    part = target if special else target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        if not special:
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    except OSError as error:
        why = str(error.strerror or error)
        if not path.parent.is_dir():
            why = f"there is no folder {str(path.parent)!r}"
        raise DecouplingError(f"cannot write {str(path)!r}: {why}; name another file") from error
    finally:
        with contextlib.suppress(OSError):  # the move has taken it, or it was never there
            if not special:
                part.unlink()
    return path


def step_folder(folder: Path, step: int) -> Path:
    """Where a saved step belongs."""
    return folder / f"step-{step:09d}"


def writing(final: Path) -> Path:
    """Where a step is written before it is published."""
    return final.parent / f".{final.name}.writing"


def publish(final: Path) -> None:
    """Give the folder that was written to its name."""
    if final.exists():
        shutil.rmtree(final)
    writing(final).replace(final)


def prune(final: Path, keep: int) -> None:
    """Remove all steps up to this one but the newest. Later ones, of a run that has ended or began
    anew, take no place of those.
    """
    until = [path for _, path in saved_steps(final.parent) if path.name <= final.name]
    for path in until[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """Numbers and folders of all saved steps, oldest first."""
    paths = [(m, p) for p in folder.glob("step-*") if (m := _STEP.fullmatch(p.name))]
    return sorted((int(m[1]), p) for m, p in paths)
