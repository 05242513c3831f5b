"""What belongs to a step on threads: the rates it was posted with, and what its forward wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dni_fx.errors import NonFiniteError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, record
from ..models.small import CHAIN, SKIPS
from .kit import train, trainer_of

Change = Callable[[torch.optim.Optimizer], Callable[[int], None]]


def stepped(make: Callable[[torch.optim.Optimizer], Any]) -> Change:
    def change(optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        scheduler = make(optimizer)
        return lambda _: scheduler.step()

    return change


def by_hand(optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    def change(step: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = 0.01 / (1 + step), 0.1 * (step % 3)
        group["betas"] = (0.9 - 0.1 * (step % 2), 0.99)

    return change


def in_place(optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.01)
    return lambda step: group["lr"].fill_(0.01 / (1 + step))


CHANGES = {
    "step": stepped(lambda o: lr_scheduler.StepLR(o, 2, 0.5)),
    "cosine": stepped(lambda o: lr_scheduler.CosineAnnealingLR(o, 9)),
    "one cycle": stepped(lambda o: lr_scheduler.OneCycleLR(o, 0.05, 20)),
    "by hand": by_hand,
    "in place": in_place,
}


def trained(schedule: Any, change: Change, steps: int = 9, pause: int = -1) -> dict[str, Any]:
    model = SKIPS.build()
    if pause >= 0:  # the stage lags behind the caller
        calls: list[int] = []
        slow = model.get_submodule("abcd"[pause])
        slow.register_forward_pre_hook(lambda *_: calls.append(sum(range(20000))))
    trainer = trainer_of(schedule, model=model)
    x, y = batch(0)
    trainer.step(x, target=y)  # optimisers and threads are there
    trainer.drain()
    every = [*trainer.optimizers.values(), *trainer.synthesizer_optimizers.values()]
    changes = [change(optimizer) for optimizer in every]
    for step in range(1, steps):
        x, y = batch(step)
        trainer.step(x, target=y)
        for each in changes:
            each(step)
    trainer.drain()
    return record(trainer)


@pytest.mark.parametrize("name", CHANGES)
def test_rates_are_those_that_a_step_was_posted_with(name: str) -> None:
    plain = trained("sequential", CHANGES[name])
    for pause in (-1, 0, 3):
        found = trained(Threads(staleness=0), CHANGES[name], pause=pause)
        assert_bits_equal(found["decoupled"], plain["decoupled"], f"{name}, {pause}")
    assert_bits_equal(
        trained(Threads(staleness=2), CHANGES[name], pause=3)["decoupled"],
        trained(Threads(staleness=2), CHANGES[name], pause=0)["decoupled"],
        f"{name}, repeated",
    )


def test_rates_matter() -> None:
    """The control."""
    plain = trained("sequential", lambda _: lambda _: None)["decoupled"]
    other = trained("sequential", by_hand)["decoupled"]
    assert any(not torch.equal(plain[n], other[n]) for n in plain)


def test_state_and_settings_are_the_users_own_optimisers() -> None:
    trainer = trainer_of(Threads(staleness=0))
    for step in range(3):
        x, y = batch(step)
        trainer.step(x, target=y)
        trainer.optimizers["stage_1"].param_groups[0]["lr"] = 0.5
    trainer.drain()
    saved = trainer.optimizers["stage_1"].state_dict()
    assert saved["param_groups"][0]["lr"] == 0.5
    assert all(int(state["step"]) == 3 for state in saved["state"].values())


def step_and_drain(trainer: Any, x: torch.Tensor, target: torch.Tensor, times: int = 1) -> None:
    for _ in range(times):
        trainer.step(x, target=target)
    trainer.drain()


@pytest.mark.parametrize("gradients", ["linear", "zero", "local"])
@pytest.mark.parametrize("schedule", [Threads(), Threads(staleness=0)], ids=str)
def test_a_refused_batch_leaves_no_buffer_spoilt(gradients: str, schedule: Threads) -> None:
    trainer = trainer_of(schedule, gradients, case=CHAIN)
    for step in range(4):
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.drain()
    before = copy.deepcopy(trainer.decoupled.model.state_dict())
    with pytest.raises(NonFiniteError):
        step_and_drain(trainer, x * float("nan"), y, 4)
    after = trainer.decoupled.model.state_dict()
    assert_bits_equal(dict(after), dict(before), "after a batch that is not a number")
    trainer.step(x, target=y)


def test_weights_that_a_forward_rescales_are_put_back() -> None:
    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rest = nn.Embedding(7, 6, max_norm=0.5), nn.Linear(6, 3)
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(self.inner(self.table(x)).relu())

    model, x = Rescaled(), torch.arange(5)
    trainer = trainer_of(
        Threads(staleness=0), "linear", model=model, cuts=["inner"], example_inputs=(x,)
    )
    weight = model.table.weight.detach().clone()
    model.inner.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(Exception, match="division"):
        step_and_drain(trainer, x, x % 3)
    assert torch.equal(weight, model.table.weight)


def test_optimisers_that_load_a_state_between_steps_go_on_from_it() -> None:
    trainers = [trainer_of(s) for s in ("sequential", Threads(staleness=0))]
    for trainer in trainers:
        train(trainer, 3)
        trainer.drain()
        for optimizer in trainer.optimizers.values():
            state = copy.deepcopy(optimizer.state_dict())
            for own in state["state"].values():
                own["exp_avg"] = torch.zeros_like(own["exp_avg"])
            optimizer.load_state_dict(state)
        train(trainer, 3)
        trainer.drain()
    assert_bits_equal(record(trainers[1]), record(trainers[0]), "loaded")
