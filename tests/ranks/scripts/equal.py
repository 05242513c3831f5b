"""Ranks that wait for each other make what one process makes."""

from __future__ import annotations

import copy
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx import distributed
from dni_fx.schedules import Calibration, RandomUpdates, WarmUp

from ...helpers.comparing import assert_bits_equal
from ...helpers.training import batch, largest_difference
from ...models.small import TOWERS
from .. import kit
from ..kit import compare, train, trainer_of, weights


def exact() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare("exact", dtype=dtype)
        compare("exact", dtype=dtype, queue=1, staleness=2)


def options() -> None:
    compare("linear", staleness=0, dtype=torch.bfloat16)
    for more in (
        {"accumulate": 2},
        {"clip_norm": 0.1},
        {"inputs": "mlp"},
        {"inputs": "mlp", "accumulate": 2},
    ):
        compare("linear", staleness=0, **more)  # type: ignore[arg-type]
    for schedule in (Calibration(every=3), WarmUp(2, fade=2), RandomUpdates(0.5, seed=1)):
        compare("linear", staleness=0, schedule=schedule)
        compare("each:linear", staleness=0, schedule=schedule)


def synthetic_inputs_and_exact_steps() -> None:
    for schedule in (Calibration(every=3), WarmUp(2, fade=2)):
        compare("linear", staleness=0, schedule=schedule, inputs="mlp")
        compare("feedback", staleness=0, schedule=schedule, inputs="mlp")


def interleaved() -> None:
    for placement in (
        [0, 1, 0, 1],
        [1, 0, 0, 1],
        {"stage_0": 1, "stage_1": 1, "stage_2": 0, "stage_3": 0},
    ):
        compare("exact", placement=placement)
        compare("each:linear", placement=placement, staleness=0)


def shared_again_and_again() -> None:
    """Rank 0 reads ahead as far in the last epoch as in the second."""
    trainer, queue, epochs, each = trainer_of(queue=1, staleness=0), 1, 6, 8
    progress = kit.OUT / "taken"
    progress.write_text("0")
    dist.barrier()
    for epoch in range(epochs):
        for number, _ in enumerate(trainer.share([batch(0)] * each)):
            done = epoch * each + number + 1
            if dist.get_rank() == 1:
                time.sleep(0.01)
                progress.with_suffix(".new").write_text(str(done))
                progress.with_suffix(".new").replace(progress)
            else:
                ahead = done - int(progress.read_text())
                assert ahead <= 2 * (2 * queue + 1) + 1, f"{ahead} ahead in epoch {epoch}"
    trainer.close()


def shared() -> None:
    """Stages on both ranks."""
    for placement in ([0, [0, 1], 1, [0, 1]], [[0, 1]] * 4):
        for gradients in ("exact", "zero"):
            compare(gradients, placement=placement, staleness=0, tolerance=1e-6, sizes=(8, 5, 3))
    compare("zero", placement=[0, [0, 1], 1, 0], staleness=0, tolerance=1e-6, accumulate=2)


def control() -> None:
    """The negative control: what one rank does otherwise is seen."""
    model = TOWERS.build()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.c.bias[0] += 1e-6
    apart = weights(train(trainer_of("exact", model=model), 7))
    assert largest_difference(apart, weights(train(trainer_of("exact", alone=True), 7))) > 1e-7
    late = weights(train(trainer_of("linear", staleness=1), 7))
    assert largest_difference(late, weights(train(trainer_of("linear", alone=True), 7))) > 1e-5


def repeats() -> None:
    for gradients in ("linear", "delayed", "corrected", "critic", "each:linear"):
        for inputs in (None, "mlp"):
            runs = [
                weights(train(trainer_of(gradients, staleness=2, inputs=inputs), 12))
                for _ in range(2)
            ]
            assert_bits_equal(*runs, f"{gradients}, {inputs}")


def lengths() -> None:
    """Letters longer than the receives that are posted, in any order of lengths."""
    sizes = [4, 600, 1, 3000, 2, 2, 900, 64, 2500, 3, 1, 1, 1, 700, 5]
    for gradients, more in (("exact", {}), ("each:linear", {"staleness": 0})):
        compare(gradients, len(sizes), sizes=sizes, **more)  # type: ignore[arg-type]


def channels_last() -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    states = []
    for make in (distributed.Trainer, dni_fx.Trainer):
        decoupled = dni_fx.decouple(
            copy.deepcopy(model), ["1", "3"], example_inputs=(x,), gradients="exact"
        )
        trainer = make(decoupled, F.cross_entropy, optimizer=torch.optim.SGD)
        for _ in range(3):
            trainer.step(x, target=torch.arange(4))
        states.append(weights(trainer))
    assert_bits_equal(*states, "channels last")


def four_ranks_equal_one() -> None:
    for placement in (None, [3, 1, 0, 2]):
        for dtype in (torch.float32, torch.bfloat16):
            compare("exact", placement=placement, dtype=dtype)
        compare("each:linear", placement=placement, staleness=0)
        compare("critic", placement=placement, staleness=0, inputs="mlp")
    compare(
        "exact",
        placement=[[0, 1], [2, 3], 0, [0, 1, 2, 3]],
        staleness=0,
        tolerance=1e-6,
        sizes=(8, 7, 9),
    )


TWO = [
    exact,
    options,
    synthetic_inputs_and_exact_steps,
    interleaved,
    shared,
    shared_again_and_again,
    control,
    repeats,
    lengths,
    channels_last,
]


FOUR = [four_ranks_equal_one]
