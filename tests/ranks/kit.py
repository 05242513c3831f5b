"""What cases of several ranks share: trainers of one model, and the comparison with one process."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError

from ..helpers import training
from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam
from ..helpers.training import DECOUPLE, largest_difference
from ..models.small import TOWERS

ALONE = {*DECOUPLE, *inspect.signature(dni_fx.Trainer).parameters}  # what one process knows, too
SIZES = (8, 8, 5)
SHORTER = 1  # by how much the longest case is, where only its end matters
OUT = Path()  # a folder for what cases write


def trainer_of(
    gradients: Any = "linear",
    *,
    alone: bool = False,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A distributed trainer; or one of one process, for the options that both know."""
    model = TOWERS.build(dtype) if model is None else model
    if alone:
        options = {name: value for name, value in options.items() if name in ALONE}
    else:
        options = {"kind": distributed.Trainer, "timeout": 15.0} | options
    return training.trainer_of(gradients, TOWERS, model=model, optimizer=adam, **options)


def train(trainer: Any, steps: int, sizes: Sequence[int] = SIZES) -> Any:
    """Make steps, and wait for all that is under way."""
    training.train(trainer, steps, sizes=sizes)
    trainer.drain()
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    """Of the whole model; ends a distributed trainer."""
    if not isinstance(trainer, distributed.Trainer):
        return copy.deepcopy(trainer.decoupled.model.state_dict())
    found = copy.deepcopy(trainer.gather())
    trainer.close()
    return found


def compare(
    gradients: Any,
    steps: int = 7,
    tolerance: float = 0.0,
    sizes: Sequence[int] = SIZES,
    **options: Any,
) -> None:
    """Train by all processes, and by each alone."""
    apart = weights(train(trainer_of(gradients, **options), steps, sizes))
    alone = weights(train(trainer_of(gradients, alone=True, **options), steps, sizes))
    if tolerance:
        difference = largest_difference(apart, alone)
        assert difference < tolerance, f"{gradients}, {options}: {difference}"
    else:
        assert_bits_equal(apart, alone, f"{gradients}, {options}")
    start = weights(trainer_of(alone=True, **options))
    assert largest_difference(alone, start) > 1e-3  # something was learnt


def fails(message: str, run: Callable[[], Any], kind: type[Exception] = DecouplingError) -> None:
    """Assert that the call raises an error that says so."""
    found = "nothing"
    try:
        run()
    except kind as error:
        found = str(error)
    assert message in found, f"{message!r} is not in {found!r}"
