"""What a caller changes while batches are under way: refused, unless it was drained before."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, record
from ..models.small import SKIPS
from .kit import slow, stage_threads, trainer_of

Change = Callable[[nn.Module], object]


class Dropped(nn.Module):
    """Reads its mode when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.a(x).relu()))


def dropped(pause: float = 0.0) -> dni_fx.Trainer:
    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(4, 6)
    model.a.register_forward_pre_hook(lambda *_: time.sleep(pause))
    return trainer_of(
        Threads(staleness=0), model=model, cuts=["a"], example_inputs=(x,), context=None
    )


def steps(trainer: dni_fx.Trainer, count: int, change: Change, drains: bool) -> None:
    for step in range(count):
        x, y = batch(step)
        trainer.step(x, target=y)
        if step == 3:
            if drains:
                trainer.drain()
            change(trainer.decoupled.model)
    trainer.drain()


def clip(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


def load(model: nn.Module) -> None:
    model.load_state_dict({n: t * 0.5 for n, t in model.state_dict().items()})


def one(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("d.bias").zero_()


@pytest.mark.parametrize("change", [clip, load, one])
@pytest.mark.parametrize("schedule", [Threads(), Threads(staleness=0)], ids=str)
def test_weights_that_are_changed_under_way(schedule: Threads, change: Change) -> None:
    trainer = trainer_of(schedule, model=slow("d", 0.002))
    with pytest.raises(DecouplingError, match=r"stage_\d, step \d+: parameter '[abcd].*drain\(\)"):
        steps(trainer, 12, change, drains=False)
    assert stage_threads() == []


def test_weights_that_are_changed_between_forward_and_backward() -> None:
    """Where autograd notices it, too."""
    model, weight = SKIPS.build(), list[Tensor]()

    def change(*_: Any) -> None:
        if stage_threads() and weight:
            with torch.no_grad():
                weight.pop().mul_(2)

    model.get_submodule("d").register_forward_hook(change)
    trainer = trainer_of(Threads(staleness=0), model=model)
    trainer.step(batch(0)[0], target=batch(0)[1])
    trainer.drain()
    weight.append(model.get_parameter("d.weight"))
    trainer.step(batch(0)[0], target=batch(0)[1])
    with pytest.raises(DecouplingError, match=r"stage_3, step 2: parameter 'd.weight' was changed"):
        trainer.drain()


@pytest.mark.parametrize("change", [clip, load, one])
def test_weights_that_are_changed_between(change: Change) -> None:
    found = []
    for schedule in ("sequential", Threads(staleness=0)):
        trainer = trainer_of(schedule)
        steps(trainer, 8, change, drains=True)
        found.append(record(trainer))
    assert_bits_equal(found[1], found[0], "changed between two steps")


def test_a_mode_that_is_changed_before_the_next_step() -> None:
    trainer = dropped()
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    trainer.step(x, target=y)
    trainer.decoupled.model.drop.eval()  # type: ignore[union-attr]
    with pytest.raises(DecouplingError, match=r"module 'drop' was put into evaluation mode"):
        trainer.step(x, target=y)
    trainer.close()
    trainer.step(x, target=y)
    trainer.drain()


def test_a_mode_that_is_changed_while_a_batch_is_under_way() -> None:
    """Validation in the middle, without a word; it is as before when the next step comes."""
    trainer = dropped(0.3)
    model, x, y = trainer.decoupled.model, torch.randn(4, 6), torch.arange(4) % 3
    for _ in range(3):
        trainer.step(x, target=y)
    model.eval()
    assert trainer.threads is not None
    until = time.monotonic() + 15
    while trainer.threads.mail.failure is None and time.monotonic() < until:
        time.sleep(0.01)
    model.train()
    with pytest.raises(DecouplingError, match=r"stage_\d, step \d: module .* evaluation mode"):
        trainer.drain()
    for _ in range(3):
        trainer.step(x, target=y)
        trainer.drain()
        model.eval()
        model(x)
        model.train()
    trainer.drain()


def other_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * 3 + output.pow(2).mean()


def test_loss_and_norm_are_those_that_a_step_was_posted_with() -> None:
    found = []
    for schedule, where in (
        ("sequential", "a"),
        (Threads(staleness=0), "d"),
        (Threads(staleness=0), "a"),
    ):
        trainer = trainer_of(schedule, model=slow(where, 0.003))
        for step in range(10):
            x, y = batch(step)
            trainer.step(x, target=y)
            trainer.clip_norm = 0.01 * (1 + step) if step % 3 else None
            trainer.loss = other_loss if step % 2 else F.cross_entropy
        trainer.drain()
        found.append(record(trainer)["decoupled"])
    assert_bits_equal(found[1], found[0], "the last stage is behind")
    assert_bits_equal(found[2], found[0], "the first stage is behind")


@pytest.mark.parametrize("gradients", ["linear", "delayed"])
def test_gradients_of_an_unfinished_update_are_put_back(gradients: str) -> None:
    trainer = trainer_of(Threads(staleness=0), gradients, accumulate=3)
    for step in range(4):
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.drain()
    model = trainer.decoupled.model
    before = {n: copy.deepcopy(p.grad) for n, p in model.named_parameters()}
    assert any(g is not None for g in before.values())
    trainer.step(x * float("nan"), target=y)
    with pytest.raises(DecouplingError, match="NaN"):
        trainer.drain()
    for name, parameter in model.named_parameters():
        known, now = before[name], parameter.grad
        assert (known is None) == (now is None), name
        assert known is None or now is None or torch.equal(known, now), name


def test_a_trainer_that_nobody_holds_ends_its_threads() -> None:
    model = SKIPS.build()
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(batch(0)[0],), gradients="linear")

    def made() -> weakref.ref[Any]:
        trainer = dni_fx.Trainer(
            decoupled, F.cross_entropy, optimizer=torch.optim.SGD, schedule="threads"
        )
        for step in range(3):
            x, y = batch(step)
            trainer.step(x, target=y)
        assert len(stage_threads()) == 2
        return weakref.ref(trainer)

    ref = made()
    gc.collect()
    assert ref() is None
    until = time.monotonic() + 15
    while stage_threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert stage_threads() == []


def test_threads_that_were_closed_are_let_go_of() -> None:
    """A trainer may be closed, and go on, any number of times."""
    trainer, closed = trainer_of("threads"), []
    for step in range(3):
        x, y = batch(step)
        trainer.step(x, target=y)
        closed.append(weakref.ref(trainer.threads))
        trainer.drain()
        trainer.close()
    gc.collect()
    assert [ref() for ref in closed] == [None] * 3
