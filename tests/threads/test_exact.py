"""Exact gradients on threads equal backpropagation, whatever the flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dni_fx
from dni_fx.schedules import Schedule, Threads

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam
from ..helpers.training import record
from ..models.cases import seed_generator
from ..models.zoo import BY_NAME
from .kit import MADE, train, trainer_of

TREES = [
    "norm_dropout_chain",
    "conv_norm_chain",
    "channels_last",
    "dense",
    "unet",
    "two_towers",
    "fan_out",
    "transformer",
    "lstm",
    "checkpoint_reentrant",
    "dict_output",
    "frozen_middle",
    "running_mean",
    "routing",
    "weight_norm",
]


def on_threads(
    name: str, dtype: torch.dtype, schedule: Schedule, steps: int = 3
) -> dict[str, Tensor]:
    case = BY_NAME[name]
    decoupled = oracles.transform(case, dtype, "exact")
    trainer = dni_fx.Trainer(decoupled, case.loss, optimizer=adam, schedule=schedule)
    MADE.append(trainer)
    for step in range(steps):
        args, kwargs, target = oracles.draw(case, 4, dtype, step)
        seed_generator(step)
        trainer.step(*args, target=target, **kwargs)
        trainer.drain()  # before the generator is seeded again
    return state_of(decoupled.model)


@pytest.mark.matrix
@pytest.mark.parametrize("name", TREES)
def test_exact_gradients_equal_backprop(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        want = oracles.backprop_run(BY_NAME[name], dtype, adam)["step 2"]["state"]
        assert_bits_equal(on_threads(name, dtype, Threads(queue=1)), want, f"{name}, {dtype}")


def test_exact_gradients_can_be_told_from_others() -> None:
    """The negative control: another learning rate, and the same with a source."""
    want = oracles.backprop_run(BY_NAME["dense"], torch.float64, adam, steps=2)["step 1"]["state"]
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(
            on_threads("dense", torch.float64, Threads(), steps=3), want, "another step"
        )


@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_exact_gradients_do_not_depend_on_the_flow(staleness: int | None) -> None:
    exact = train(trainer_of("sequential", "exact"), 8)
    threads = train(trainer_of(Threads(queue=1, staleness=staleness), "exact"), 8)
    assert_bits_equal(record(threads)["decoupled"], record(exact)["decoupled"], "exact")
