"""Schedules inside the trainer: which stages move, which sources learn, and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dni_fx.schedules import Calibration, Mode, RandomUpdates, WarmUp

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, state, train, trainer_of
from ..models.small import CHAIN
from .kit import Fixed


@pytest.mark.parametrize("inputs", [None, "linear"])
@pytest.mark.parametrize("gradients", ["linear", "local", "exact"])
def test_only_active_stages_move(gradients: str, inputs: str | None) -> None:
    for active in ((0,), (2,), (1, 3), ()):
        trainer = trainer_of(gradients, schedule=Fixed(Mode(0.0, active)), inputs=inputs)
        train_before = state(trainer)
        report = trainer.step(batch(0)[0], target=batch(0)[1])
        for stage in range(3):
            name = f"{stage}.linear.weight"
            expected = stage in active and gradients != "linear"  # which starts at zero
            moved = not torch.equal(state(trainer)[name], train_before[name])
            assert moved == expected, (active, name)
        ran = 3 in active or gradients == "exact"
        assert bool(report.loss.isnan()) != ran


def test_stages_that_nobody_needs_are_not_run() -> None:
    trainer = trainer_of("linear", schedule=Fixed(Mode(0.0, (1,))))
    before = state(trainer)
    train(trainer, 1)
    after = state(trainer)
    assert after["0.norm.num_batches_tracked"] == 1  # run for its value
    assert after["2.norm.num_batches_tracked"] == 0
    assert before["2.norm.num_batches_tracked"] == 0


def test_updates_are_as_frequent_as_asked() -> None:
    trainer = trainer_of(
        "local", schedule=RandomUpdates({"stage_0": 0.25, "stage_1": 0.75}, seed=1)
    )
    counts = dict.fromkeys(trainer.optimizers, 0)
    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_pre_hook(
            lambda opt, *_, n=name: counts.update(
                {n: counts[n] + (opt.param_groups[0]["params"][0].grad is not None)}
            )
        )
    train(trainer, 200)
    assert 30 < counts["stage_0"] < 70 < 130 < counts["stage_1"] < 170
    assert counts["stage_2"] == counts["stage_3"] == 200


def test_sources_of_left_out_stages_learn_beside_waiting_ones() -> None:
    trainer = trainer_of(
        {"0": "linear", "1": "feedback", "2": "local"}, schedule=RandomUpdates({0: 0.0})
    )
    train(trainer, 3)
    assert trainer.decoupled.sources["0"].scale.item() > 0


@pytest.mark.parametrize("inputs", [None, "linear"])
def test_sources_learn_whenever_their_target_comes(inputs: str | None) -> None:
    """Not only when their own stage is updated too, which is rarer by another factor of p."""
    trainer = trainer_of("linear", schedule=Fixed(Mode(0.0, (2,))), inputs=inputs)
    trainer_zero = copy.deepcopy(trainer.decoupled.synthesizers.state_dict())
    with torch.no_grad():
        for parameter in trainer.decoupled.sources["2"].parameters():
            parameter.fill_(0.1)  # so that stage 2 has something to pull back
        trainer.decoupled.sources["2"].scale.fill_(1.0)
    train(trainer, 3)
    now = trainer.decoupled.synthesizers.state_dict()
    learnt = {
        key.split(".")[0]
        for key in now
        if "weight" in key and not torch.equal(now[key], trainer_zero[key])
    }
    assert learnt - {"2"} == ({"1", "2@input"} if inputs else {"1"})


def test_warm_up_trains_sources_in_shadow() -> None:
    """Stages move as in backpropagation; sources learn, and are used afterwards."""
    shadow, exact = trainer_of("linear", schedule=WarmUp(steps=5)), trainer_of("exact")
    for trainer in (shadow, exact):
        train(trainer, 5)
    assert_bits_equal(state(shadow), state(exact), "shadow mode")
    assert all(s.scale.item() > 0 for s in shadow.decoupled.sources.values())
    for trainer in (shadow, exact):
        train(trainer, 1, first=5)
    assert not torch.equal(state(shadow)["0.linear.weight"], state(exact)["0.linear.weight"])


def test_fading_mixes() -> None:
    half, zero = trainer_of("zero", schedule=Fixed(Mode(0.5))), trainer_of("zero")
    x, y = batch(0)
    true = zero.true_gradients(x, target=y)
    seen: dict[str, Tensor] = {}
    half.optimizers["stage_2"].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in half.decoupled.model[2].named_parameters()}
        )
    )
    half.step(x, target=y)
    model = CHAIN.build()
    model[2](model[1](model[0](x))).backward(true["2"] * 0.5)
    torch.testing.assert_close(seen["linear.weight"], model[2].linear.weight.grad)


def test_calibration_steps_are_exact() -> None:
    trainer = trainer_of("zero", schedule=Calibration(every=2))
    before = state(trainer)
    train(trainer, 1)
    assert torch.equal(state(trainer)["0.linear.weight"], before["0.linear.weight"])
    train(trainer, 1, first=1)
    assert not torch.equal(state(trainer)["0.linear.weight"], before["0.linear.weight"])


@pytest.mark.parametrize("gradients", ["linear", "critic"])
def test_a_resumed_run_goes_on_alike_under_every_schedule(gradients: str) -> None:
    schedule = WarmUp(2, fade=2, then=Calibration(every=3, then=RandomUpdates(0.5)))
    whole = trainer_of(gradients, schedule=schedule, inputs="linear")
    train(whole, 5)
    saved = copy.deepcopy(whole.state_dict())
    train(whole, 6, first=5)
    resumed = trainer_of(gradients, schedule=schedule, inputs="linear")
    resumed.load_state_dict(saved)
    train(resumed, 6, first=5)
    assert_bits_equal(resumed.decoupled.state_dict(), whole.decoupled.state_dict(), "resumed")
