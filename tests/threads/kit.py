"""Small models on threads: the trainers of the folder, and how their threads are looked at."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Schedule

from ..helpers import training
from ..helpers.optimisers import adam
from ..models.cases import Case
from ..models.small import SKIPS

SECONDS = 20  # a test that takes longer is taken for a deadlock
MADE: list[dni_fx.Trainer] = []  # the test's trainers, which are closed after it


def trainer_of(
    schedule: str | Schedule = "sequential",
    gradients: Any = "linear",
    model: nn.Module | None = None,
    inputs: Any = None,
    case: Case = SKIPS,
    **options: Any,
) -> dni_fx.Trainer:
    """A trainer that is closed at the end of the test."""
    MADE.append(
        training.trainer_of(
            gradients,
            case,
            model=model,
            inputs=inputs,
            optimizer=adam,
            schedule=schedule,
            **options,
        )
    )
    return MADE[-1]


def train(
    trainer: dni_fx.Trainer, steps: int, first: int | None = None, pause: float = 0.0
) -> dni_fx.Trainer:
    """Make steps, some on shorter batches, and wait for the threads."""
    training.train(trainer, steps, first, sizes=(8, 8, 5), pause=pause)
    trainer.drain()
    return trainer


def stage_threads() -> list[str]:
    """Names of the threads that stages run on now."""
    return [t.name for t in threading.enumerate() if t.name.startswith("dni_fx")]


def slow(name: str, seconds: float) -> nn.Module:
    """A model one of whose modules takes long."""
    model = SKIPS.build()
    model.get_submodule(name).register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def counts(trainer: dni_fx.Trainer) -> list[int]:
    """Updates of each stage."""
    assert trainer.threads is not None
    return [w.learner.updates for w in trainer.threads.workers.values()]


def run_script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | environment,
    )


def fails_once(trainer: dni_fx.Trainer) -> BaseException:
    """The error of training, after which no thread is left."""
    with pytest.raises(DecouplingError) as caught:
        train(trainer, 6)
    assert stage_threads() == []
    return caught.value
