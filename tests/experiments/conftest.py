"""Fixtures of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kit import data


@pytest.fixture(scope="module")
def mnist_folder() -> Path:
    """Where MNIST is on this machine; nothing is downloaded for a test."""
    try:
        folder = data.find_mnist()
    except data.DataError as error:
        pytest.skip(f"MNIST is not on this machine: {error}")
    if folder is None:
        pytest.skip(
            f"MNIST is not on this machine: neither {data.DATA_VARIABLE} nor ../shared/data"
        )
    return folder
