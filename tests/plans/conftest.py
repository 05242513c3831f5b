"""Fixtures of the folder."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(params=range(10))
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A hundred graphs for each of ten seeds."""
    return random.Random(request.param)
