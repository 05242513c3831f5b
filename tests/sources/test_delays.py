"""Gradients that come late: delays, weighted corrections, predicted weights, rates by stage."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.runtime.delays import moved_along
from dni_fx.schedules import Threads
from dni_fx.sources import Corrected, Delayed, Mix, Wait

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam, sgd
from ..helpers.training import batch, largest_difference, state, train, trainer_of
from ..models.small import CHAIN, TOWERS
from . import late

SLOW = partial(torch.optim.SGD, lr=1e-12)


def gradients_of(source: Any) -> list[dict[str, Tensor]]:
    """What each update was made with, after one batch and in the steps that finish it."""
    found: list[dict[str, Tensor]] = []

    def noting(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters)
        optimizer = SLOW(pairs)

        def note(*_: Any) -> None:
            grads = {n: p.grad.clone() for n, p in pairs if p.grad is not None}
            found.append(grads)

        optimizer.register_step_pre_hook(note)
        return optimizer

    trainer = late.trainer_of(source, optimizer=noting)
    x, y = late.batch(0)
    trainer.step(x, target=y)
    trainer.drain()
    return found


@pytest.mark.parametrize("weight", ["delay", 1.0, 0.3])
def test_a_correction_counts_the_less_the_later_it_comes(weight: Any) -> None:
    total: dict[str, Tensor] = {}
    early: dict[str, Tensor] = {}
    for grads in gradients_of(partial(Corrected, source=late.Fixed, weight=weight)):
        for name, gradient in grads.items():
            early.setdefault(name, gradient)
            total[name] = total.get(name, torch.zeros(())) + gradient
    model, (x, y) = late.chain(), late.batch(0)
    F.cross_entropy(model(x), y).backward()
    true = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for stage, delay in ((0, 3), (1, 2), (2, 1)):
        name = f"{stage}.linear.weight"
        share = 1 / (1 + delay) if weight == "delay" else weight
        want = early[name] + share * (true[name] - early[name])
        torch.testing.assert_close(total[name], want, rtol=1e-5, atol=1e-8)
        assert not torch.allclose(total[name], early[name], rtol=1e-2)


def test_by_default_it_is_weighted_by_the_delay() -> None:
    twins = [trainer_of(partial(Corrected, **o)) for o in ({}, {"weight": "delay"}, {"weight": 1})]
    for trainer in twins:
        train(trainer, 8)
    assert_bits_equal(state(twins[0]), state(twins[1]), "the default")
    assert largest_difference(state(twins[0]), state(twins[2])) > 1e-5


def test_accumulated_steps_are_one_update() -> None:
    """Up to three steps late, of which four make an update."""
    twins = [
        trainer_of(partial(Corrected, weight=weight), accumulate=4)
        for weight in ("delay", 1 / 2, 1 / 4)
    ]
    for trainer in twins:
        train(trainer, 12)
    assert_bits_equal(state(twins[0]), state(twins[1]), "a delay of one update")
    assert largest_difference(state(twins[0]), state(twins[2])) > 1e-5


def test_stages_before_hear_the_true_gradient() -> None:
    """A correction in the second stage counts half there, and whole in what it sends back."""
    found = []
    for weight in (1.0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        x, y = batch(0)
        decoupled = dni_fx.decouple(
            model,
            ["0", "1"],
            example_inputs=(x,),
            gradients={"0": "delayed", "1": partial(Corrected, source="zero", weight=weight)},
        )
        seen: dict[str, list[Tensor]] = {}
        trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=SLOW)
        for _ in range(3):
            trainer.step(x, target=y)
            for name, p in model.named_parameters():
                seen.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
        found.append(seen)
    whole, half = found
    torch.testing.assert_close(half["1.weight"][2], whole["1.weight"][2] / 2)
    assert bool(whole["0.weight"][2].any())
    torch.testing.assert_close(half["0.weight"][2], whole["0.weight"][2])


def test_corrections_of_one_stage_have_one_weight() -> None:
    gradients = {
        "a": "zero",
        "b": "zero",
        "relu": partial(Corrected, source="zero", weight=0.5),
        "c": partial(Corrected, source="zero", weight=1.0),
    }
    trainer = trainer_of(gradients, TOWERS)
    with pytest.raises(DecouplingError, match="one stage and have different weights"):
        train(trainer, 6, case=TOWERS)


@pytest.mark.parametrize(
    ("gradients", "want"),
    [
        ("linear", [0, 0, 0, 0]),
        ("delayed", [3, 2, 1, 0]),
        (partial(Corrected, steps=2), [6, 4, 2, 0]),
        ({"0": "linear", "1": "delayed", "2": "local"}, [0, 1, 0, 0]),
        ("mix", [0, 0, 0, 0]),
        ("exact", [0, 0, 0, 0]),
    ],
)
def test_every_stage_s_delay_is_known(gradients: Any, want: list[int]) -> None:
    trainer = trainer_of(gradients)
    assert trainer.delays() == {f"stage_{k}": delay for k, delay in enumerate(want)}
    if gradients != "exact" and max(want):
        x, y = batch(0)
        trainer.step(x, target=y)
        assert trainer.drain() == max(want)


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_delays_on_threads(staleness: int | None) -> None:
    trainer = trainer_of("delayed", schedule=Threads(staleness=staleness))
    before = trainer.delays()
    train(trainer, 12)
    trainer.drain()
    assert trainer.threads is not None
    known = {k: w.learner.delay for k, w in trainer.threads.workers.items()}
    if staleness is None:
        assert before == {"stage_0": 3, "stage_1": 2, "stage_2": 1, "stage_3": 0}
        measured = {f"stage_{k}": delay or 0 for k, delay in known.items()}
        assert trainer.delays() == measured
    else:
        want = {f"stage_{k}": staleness * (3 - k) for k in range(4)}
        assert trainer.delays() == before == want
        seen = {f"stage_{k}": delay for k, delay in known.items() if k < 3}
        assert all(delay <= want[name] for name, delay in seen.items())
    trainer.close()


def test_delays_of_a_process() -> None:
    trainer = trainer_of("delayed", kind=distributed.Trainer, staleness=1)
    assert list(trainer.delays().values()) == [3, 2, 1, 0]
    trainer.close()


OPTIMISERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
}


def two_stages() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)
    return nn.Sequential(*layers).double()


def direction(optimizer: Any, p: Tensor) -> Tensor:
    """PipeOptim's formulas, once more."""
    group, known = optimizer.param_groups[0], optimizer.state[p]
    if isinstance(optimizer, torch.optim.SGD):
        return known["momentum_buffer"]
    n, (beta, gamma) = int(known["step"]), group["betas"]
    second = known["max_exp_avg_sq"] if group["amsgrad"] else known["exp_avg_sq"]
    step = known["exp_avg"] / (1 - beta**n) / ((second / (1 - gamma**n)).sqrt() + group["eps"])
    decayed = isinstance(optimizer, torch.optim.AdamW)
    return step + group["weight_decay"] * p.detach() if decayed else step


def by_hand(make: Any, recompute: bool, ahead: float, steps: int = 6) -> dict[str, Tensor]:
    """Two stages, the first one step late; its forward with weights ``ahead`` updates ahead."""
    model = two_stages()
    first, last = model[:2], model[2:]
    one, two = make(first.parameters()), make(last.parameters())
    before: Any = None
    for step in range(steps):
        x, y = batch(step, dtype=torch.float64)
        moved = {}
        for name, p in first.named_parameters():
            known = bool(one.state.get(p))
            shift = ahead * one.param_groups[0]["lr"] * direction(one, p) if known else 0.0
            moved[name] = (p.detach() - shift).requires_grad_()
        h = torch.func.functional_call(first, moved, x)
        leaf = h.detach().requires_grad_()
        two.zero_grad()
        F.cross_entropy(last(leaf), y).backward()
        if before is not None:
            old, graph, weights, gradient = before
            one.zero_grad()
            if recompute:
                first(old).backward(gradient)
            else:
                graph.backward(gradient)
                for name, p in first.named_parameters():
                    p.grad = weights[name].grad
            one.step()
        two.step()
        before = x, h, moved, leaf.grad
    return model.state_dict()


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_predicted_weights_are_those_of_the_published_rule(name: str, recompute: bool) -> None:
    make = OPTIMISERS[name]
    found = []
    for predict in (True, False):
        source = partial(Delayed, recompute=recompute, predict_weights=predict)
        x, _ = batch(0, dtype=torch.float64)
        decoupled = dni_fx.decouple(two_stages(), ["1"], example_inputs=(x,), gradients=source)
        trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=make)
        for step in range(6):
            x, y = batch(step, dtype=torch.float64)
            trainer.step(x, target=y)
        found.append(decoupled.model.state_dict())
    assert largest_difference(found[0], by_hand(make, recompute, 1)) < 1e-12
    assert largest_difference(found[1], by_hand(make, recompute, 0)) < 1e-12
    assert largest_difference(found[0], found[1]) > 1e-5


@pytest.mark.parametrize(
    "source",
    [
        partial(Corrected, source="linear", predict_weights=True),
        partial(Corrected, source="linear", predict_weights=True, recompute=False),
        partial(Mix, source="linear", steps=1, predict_weights=True),
    ],
)
def test_other_late_sources_take_it_and_leave_weights_as_they_were(source: Any) -> None:
    found = []
    for option in (source, partial(source, predict_weights=False)):
        trainer = trainer_of(option, optimizer=adam)
        trained = train(trainer, 5)
        storages = {n: p.data_ptr() for n, p in trainer.decoupled.model.named_parameters()}
        train(trained, 5)
        now = {n: p.data_ptr() for n, p in trainer.decoupled.model.named_parameters()}
        assert now == storages
        found.append(state(trainer))
    assert largest_difference(*found) > 1e-5


@pytest.mark.parametrize("staleness", [1, None])
def test_threads_predict_weights_of_their_own_stages(staleness: int | None) -> None:
    found = []
    for predict in (True, True, False):
        source = partial(Delayed, predict_weights=predict)
        trainer = trainer_of(source, optimizer=adam, schedule=Threads(staleness=staleness))
        train(trainer, 10)
        trainer.drain()
        found.append(state(trainer))
        trainer.close()
    if staleness is not None:
        assert_bits_equal(found[0], found[1], "runs repeat")
        assert largest_difference(found[0], found[2]) > 1e-5


def test_weights_come_back_after_an_error() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    before, version, place = parameter.detach().clone(), parameter._version, parameter.data_ptr()

    def fails() -> None:
        with moved_along(optimizer, [parameter], 2):
            assert not torch.equal(parameter, before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(parameter, before)
    assert (parameter._version, parameter.data_ptr()) == (version, place)
    with moved_along(optimizer, [], 2):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (partial(torch.optim.RMSprop, lr=0.1), "not RMSprop"),
        (partial(torch.optim.SGD, lr=0.1), "not SGD without momentum"),
    ],
)
def test_an_optimiser_whose_direction_is_not_known(optimizer: Any, words: str) -> None:
    trainer = trainer_of(partial(Delayed, predict_weights=True), optimizer=optimizer)
    before = state(trainer)
    with pytest.raises(DecouplingError, match=words):
        train(trainer, 1)
    assert_bits_equal(state(trainer), before, "nothing was changed")


def test_rates_by_stage() -> None:
    rates = []
    for scale in (None, "delay", {"stage_1": 0.5, "stage_3": 2.0}):
        trainer = trainer_of("delayed", optimizer=partial(torch.optim.SGD, lr=0.1), lr_scale=scale)
        rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers.values()])
        scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizers["stage_1"], 1, 0.1)
        train(trainer, 1)
        scheduler.step()
        assert trainer.optimizers["stage_1"].param_groups[0]["lr"] == pytest.approx(
            rates[-1][1] / 10
        )
    assert rates == [
        [0.1] * 4,
        pytest.approx([0.1 / 4, 0.1 / 3, 0.1 / 2, 0.1]),
        pytest.approx([0.1, 0.05, 0.1, 0.2]),
    ]


def test_a_rate_of_nothing_leaves_a_stage_as_it_is() -> None:
    trainer = trainer_of("linear", lr_scale={"stage_0": 0.0})
    before = state(trainer)
    train(trainer, 3)
    assert torch.equal(state(trainer)["0.linear.weight"], before["0.linear.weight"])
    assert not torch.equal(state(trainer)["1.linear.weight"], before["1.linear.weight"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: trainer_of("linear", lr_scale="late"), "'delay', or a factor for each stage"),
        (lambda: trainer_of("linear", lr_scale={"stage_0": -1}), "'delay', or a factor"),
        (lambda: trainer_of("linear", lr_scale=0.5), "'delay', or a factor"),
        (lambda: trainer_of("linear", lr_scale={"stage_9": 1.0}), "names no stage: 'stage_9'"),
        (lambda: trainer_of(partial(Corrected, weight=2.0)), "a correction's weight"),
        (lambda: trainer_of(partial(Corrected, weight="late")), "a correction's weight"),
        (lambda: trainer_of(partial(Mix, predict_weights=True)), "a lag of 0 is the same step"),
        (lambda: Wait(1, weight=0.5), "needs corrects="),
        (lambda: Wait(0, predict_weights=True), "a lag of 0 is the same step"),
        (
            lambda: dni_fx.Trainer(
                dni_fx.decouple(CHAIN.build(), ["0"]), F.cross_entropy, optimizer=sgd
            ).delays(),
            "traced at its first call",
        ),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        make()
