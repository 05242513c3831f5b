"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ..errors import DecouplingError


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
