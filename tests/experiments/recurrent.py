"""The recurrent experiments in small."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from .records import load

Record = dict[str, Any]


copying, language = load("paper_copy"), load("paper_char_lm")


through_time = pytest.mark.skipif(
    importlib.util.find_spec("dni_fx.recurrent") is None,
    reason="recurrent models came after the first version",
)
