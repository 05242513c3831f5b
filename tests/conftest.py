"""What every test starts from: one thread, a fixed seed, and the torch version in the report's
header.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# With several threads eager PyTorch may differ from itself in the last bit.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Name the torch that is tested, since tracing depends on it."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread"


@pytest.fixture(autouse=True)
def alike() -> Iterator[None]:
    """The same random numbers for each test, whichever ran before it, and one thread again after
    it: examples set a number of their own.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what user code may draw from)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of pytest's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
