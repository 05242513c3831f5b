"""One source for each consumer: each part hears its own, in turn and on threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dni_fx
from dni_fx import CutPlan
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Calibration, Schedule, Threads, WarmUp
from dni_fx.sources import Delayed, Each, Linear

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam
from ..helpers.training import ONE_HOT, batch, largest_difference, record
from ..models.small import CHAIN, SKIPS
from .kit import train, trainer_of


def parts_of(trainer: dni_fx.Trainer, interface: str) -> list[Any]:
    source = trainer.decoupled.sources[interface]
    assert isinstance(source, Each)
    return list(source.parts)


class Listening(Linear):
    """Keeps what it was told, and predicts nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: list[tuple[Tensor, ...]] = []

    def fit(self, prediction: Any, message: tuple[Tensor, ...]) -> Any:
        self.heard.append(tuple(m.clone() for m in message))
        return super().fit(prediction, message)


def two_consumers(trainer: dni_fx.Trainer) -> str:
    """The interface that the second stage and the last take."""
    (name,) = [i.name for i in trainer.decoupled.interfaces if len(i.consumers) == 2]
    return name


@pytest.mark.parametrize("schedule", ["sequential", Threads(staleness=0)], ids=str)
def test_each_part_hears_its_own_consumer(schedule: str | Schedule) -> None:
    gradients = {"a": partial(Each, source=Listening, parts=2), "c": "linear"}
    trainer = trainer_of(schedule, gradients, cuts=["a", "c"])
    assert two_consumers(trainer) == "a"
    want = []
    for step in range(3):
        x, y = batch(step)
        want.append(split_by_hand(trainer, x, y))
        trainer.step(x, target=y)
        trainer.drain()
    for place, part in enumerate(parts_of(trainer, "a")):
        assert len(part.heard) == 3
        for (got,), hand in zip(part.heard, want, strict=True):
            assert_bits_equal(got, hand[place], f"consumer {place}")
    assert not torch.equal(want[2][0], want[2][1])


def split_by_hand(trainer: dni_fx.Trainer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the second stage and the last send back for the first one's value, by autograd."""
    model: Any = trainer.decoupled.model
    saved = [p.grad for p in model.parameters()]
    h = model.a(x).detach()
    middle, skip = (h.clone().requires_grad_() for _ in range(2))
    k = model.c(model.b(middle).relu())
    guess = trainer.decoupled.sources["c"]((k.detach(),), ONE_HOT(y)).gradients
    assert guess is not None
    (first,) = torch.autograd.grad(k, middle, guess[0])
    (last,) = torch.autograd.grad(
        F.cross_entropy(model.d(torch.cat([k.detach().relu(), skip], 1)), y), skip
    )
    for parameter, gradient in zip(model.parameters(), saved, strict=True):
        parameter.grad = gradient
    return first, last


@pytest.mark.parametrize("schedule", [WarmUp(9), Calibration(every=1)], ids=str)
@pytest.mark.parametrize("threads", [False, True], ids=["sequential", "threads"])
def test_in_exact_steps_the_parts_hear_shares_of_the_true_gradient(
    schedule: Schedule, threads: bool
) -> None:
    trainer = trainer_of(
        Threads(staleness=0, then=schedule) if threads else schedule,
        {"a": partial(Each, source=Listening, parts=2), "c": "linear"}, cuts=["a", "c"],
    )  # fmt: skip
    for step in range(3):
        x, y = batch(step)
        true = trainer.true_gradients(x, target=y)
        trainer.step(x, target=y)
        trainer.drain()
        heard = [part.heard[-1][0] for part in parts_of(trainer, "a")]
        torch.testing.assert_close(heard[0] + heard[1], true["a"], rtol=1e-5, atol=1e-8)
        assert all(bool(h.abs().max() > 0) for h in heard)
        assert not torch.allclose(heard[0], true["a"])


def test_each_with_one_consumer_is_the_plain_source() -> None:
    for schedule in ("sequential", Threads(staleness=0), WarmUp(2), Threads(staleness=2)):
        plain, each = (
            train(trainer_of(schedule, g, case=CHAIN), 8) for g in ("linear", "each:linear")
        )
        assert_bits_equal(
            state_of(each.decoupled.model),
            state_of(plain.decoupled.model),
            str(schedule),
        )
        for (name, a), (_, b) in zip(
            each.decoupled.synthesizers.state_dict().items(),
            plain.decoupled.synthesizers.state_dict().items(), strict=True,
        ):  # fmt: skip
            assert_bits_equal(a, b, name)


def test_each_with_several_consumers_differs_from_the_plain_source() -> None:
    plain, each = (train(trainer_of("sequential", g), 8) for g in ("linear", "each:linear"))
    assert (
        largest_difference(each.decoupled.model.state_dict(), plain.decoupled.model.state_dict())
        > 0
    )
    assert len(parts_of(each, two_consumers(each))) == 2


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ("each:local", "must learn from gradients and answer at once.*Local does not"),
        ("each:critic", "Critic does not"),
        ("each:delayed", "Delayed does not"),
        ("each:zero", "Zero does not"),
        ("each:exact", r"[Ee]xact"),
        ("each:liner", "unknown gradient source 'liner'; did you mean 'linear'"),
        ("each:", "unknown gradient source"),
        ("joint:each:linear", "unknown gradient source"),
    ],
)
def test_sources_that_are_not_divided(gradients: str, message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        trainer_of("sequential", gradients)


def test_a_plan_remembers_divided_sources() -> None:
    first = trainer_of("sequential", "each:linear")
    plan = CutPlan.from_json(first.decoupled.plan.to_json())
    decoupled = dni_fx.decouple(SKIPS.build(), plan, example_inputs=(batch(0)[0],), context=ONE_HOT)
    second = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=adam)
    assert_bits_equal(record(train(second, 5)), record(train(first, 5)), "from the plan")


def test_a_late_source_keeps_its_graph_beside_later_updates() -> None:
    """DDG on threads: the graph of then with the weights of then, however late the answer."""
    first, second = (
        train(trainer_of(Threads(staleness=s), partial(Delayed, recompute=False)), 10)
        for s in (0, 3)
    )
    exact = train(trainer_of("sequential", "exact"), 10)
    assert (
        largest_difference(first.decoupled.model.state_dict(), exact.decoupled.model.state_dict())
        < 1e-6
    )
    assert (
        largest_difference(second.decoupled.model.state_dict(), exact.decoupled.model.state_dict())
        > 1e-4
    )
