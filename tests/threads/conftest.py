"""A deadlock fails, and no thread outlives its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..helpers.processes import limited
from .kit import MADE, SECONDS, stage_threads


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    """A test that takes too long fails; whatever it leaves behind is ended."""
    try:
        with limited(SECONDS):
            yield
    finally:
        while MADE:
            MADE.pop().close()
    assert stage_threads() == []
