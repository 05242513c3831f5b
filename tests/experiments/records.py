"""Experiments as modules, their records and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..helpers.paths import EXPERIMENTS
from .kit import load_experiment

Record = dict[str, Any]


def load(name: str) -> ModuleType:
    """An experiment, which imports its neighbours."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        return load_experiment(name)
    finally:
        sys.path.remove(str(EXPERIMENTS))


feedforward, sparse, deep = (
    load("paper_feedforward"),
    load("paper_sparse_updates"),
    load("deep_cifar"),
)


experiment, data = sys.modules["experiment"], sys.modules["data"]  # as the experiments import them


# Of residual nets. Not narrower: without AVX-512, PyTorch 2.13 corrupts memory in the backward pass
# of a strided 1 x 1 convolution of 4 channels in channels-last order.
NARROW = ["--width", "8"]


SMALL = ["--data-set", "digits", "--width", "16", "--batch", "32", "--steps", "4"]


def tiny(*_args: Any, **_options: Any) -> Any:
    """Random coloured images in place of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(120, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (120,), generator=generator)
    return data.Digits("tiny", images[:80], labels[:80], images[80:], labels[80:])


def records_in(path: Path) -> list[Record]:
    """The file's records without their times, which no two runs share."""
    return [
        {k: v for k, v in r.items() if not k.endswith("seconds")}
        for r in json.loads(path.read_text())
    ]


def rows(output: str) -> list[dict[str, str]]:
    """The printed table, a dict for each row; other tables, with other columns, are passed over."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])]


def interrupted(run_one: Callable[..., Record], at_run: int, at_step: int) -> Callable[..., Record]:
    """The same, until someone presses a key in the middle of a run."""
    calls = 0

    def wrapped(run: Record, data: Any, progress: Any) -> Record:
        nonlocal calls
        calls += 1
        this, steps = calls, 0

        def interrupting(more: int, note: str) -> None:
            nonlocal steps
            steps += more
            if this == at_run and steps == at_step:
                raise KeyboardInterrupt
            progress(more, note)

        return run_one(run, data, interrupting)

    return wrapped
