"""What every test starts from: one thread, a fixed seed, and the torch version in the report's
header.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

# With several threads eager PyTorch may differ from itself in the last bit.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Name the torch that is tested, since tracing depends on it."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread"


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for each test, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what user code may draw from)
    torch.manual_seed(0)
