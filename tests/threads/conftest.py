"""A deadlock fails, and no thread outlives its test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from .kit import MADE, SECONDS, stage_threads


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    """A test that takes too long fails; whatever it leaves behind is ended."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s: a deadlock?")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        while MADE:
            MADE.pop().close()
    assert stage_threads() == []
