"""One clear error: how it is asserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(error: type[BaseException], call: Callable[[], Any], *words: str) -> str:
    """The call raises the error, with a message that holds all words."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in: {text}"
    return text
