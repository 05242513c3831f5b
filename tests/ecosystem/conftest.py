"""Nothing is downloaded or reported, and other libraries' warnings about each other are theirs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

import torchvision_cpu  # noqa: E402, F401  (where it is installed, before anything imports it)

THEIRS = (
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*is not supported by the model summary",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let these warnings be."""
    for item in items:
        if HERE in item.path.parents:
            for warning in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(warning))
