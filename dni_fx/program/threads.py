"""``train_threads.py``: a thread for each stage, queues between them."""

from __future__ import annotations

from .stages import Asked, StageFile, state_type
from .text import docstring
from .training import Training


def thread_lines(training: Training) -> list[list[str]] | None:
    """The definitions of the file; None where stages share what they train."""
    return None
