"""Sources that wait: late gradients against loops written by hand, corrections, feedback."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.sources import Corrected, Delayed, Mix, Prediction

from ..helpers.optimisers import sgd
from ..helpers.training import state, train
from .late import CUTS, Fixed, batch, chain, trainer_of


def late_by_hand(
    steps: int, *, replay: bool, shrink: float = 1.0, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Late true gradients without dni_fx: stage k of four is 3 - k steps behind.

    DDG: gradients of the whole model as it was when it saw the batch. Features Replay: every stage
    again, on the input that it had then, with its weights of now, and the gradient that the stage
    behind found one step earlier.
    """
    model = chain(dropout)
    optimizers = [sgd(stage.named_parameters()) for stage in model]
    seen: list[dict[str, Any]] = []
    for step in range(steps):
        x, y = batch(step)
        now = copy.deepcopy(model)
        torch.manual_seed(step)
        inputs, states, h = [], [], x
        for stage in model:
            inputs.append(h.detach())
            states.append(torch.get_rng_state())
            h = stage(h)
        after = torch.get_rng_state()
        seen.append({"inputs": inputs, "rng": states, "y": y, "then": now, "sent": {}})
        for optimizer in optimizers:
            optimizer.zero_grad()
        for k in (3, 2, 1, 0):
            if step < 3 - k:
                continue
            old = seen[step - (3 - k)]
            stage = copy.deepcopy((model if replay else old["then"])[k])
            leaf = old["inputs"][k].clone().requires_grad_()
            torch.set_rng_state(old["rng"][k])
            output = stage(leaf)
            if k == 3:
                F.cross_entropy(output, old["y"]).backward()
            else:
                output.backward(old["sent"][k + 1] * shrink)
            old["sent"][k] = leaf.grad
            for parameter, copied in zip(model[k].parameters(), stage.parameters(), strict=True):
                parameter.grad = copied.grad
        torch.set_rng_state(after)
        for optimizer in optimizers:
            optimizer.step()
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shrink", [1.0, 0.5])
@pytest.mark.parametrize("replay", [True, False], ids=["replay", "stash"])
def test_late_gradients_equal_a_loop_by_hand(replay: bool, shrink: float, dropout: float) -> None:
    trainer = trainer_of(partial(Delayed, recompute=replay, shrink=shrink), chain(dropout))
    train(trainer, 7)
    got, want = state(trainer), late_by_hand(7, replay=replay, shrink=shrink, dropout=dropout)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    other = late_by_hand(7, replay=not replay, shrink=shrink, dropout=dropout)
    assert not torch.allclose(
        got["0.linear.weight"], other["0.linear.weight"], rtol=1e-9
    )  # the oracle can tell


def test_nothing_arrives_before_its_time() -> None:
    trainer = trainer_of("delayed")
    start = state(trainer)
    for step, learnt in enumerate(
        ("3.weight", "2.linear.weight", "1.linear.weight", "0.linear.weight")
    ):
        train(trainer, 1, step)
        now = state(trainer)
        assert not torch.equal(now[learnt], start[learnt])
        before = [f"{2 - step - k}.linear.weight" for k in range(3 - step)]
        assert all(torch.equal(now[n], start[n]) for n in before)


def test_more_steps_of_lag_add_up() -> None:
    trainer = trainer_of(partial(Delayed, steps=2))
    start = state(trainer)
    train(trainer, 6)
    assert torch.equal(state(trainer)["0.linear.weight"], start["0.linear.weight"])
    train(trainer, 1, 6)
    assert not torch.equal(state(trainer)["0.linear.weight"], start["0.linear.weight"])


@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_correcting_nothing_is_being_late(recompute: bool) -> None:
    late = trainer_of(partial(Delayed, recompute=recompute))
    corrected = trainer_of(partial(Corrected, source="zero", weight=1.0, recompute=recompute))
    for trainer in (late, corrected):
        train(trainer, 6)
    for name, tensor in state(late).items():
        torch.testing.assert_close(state(corrected)[name], tensor, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_corrections_sum_to_the_true_gradient(recompute: bool) -> None:
    """With weights that hardly move, prediction and correction together are the true gradient."""
    total: dict[str, Tensor] = {}

    def tiny(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters)
        optimizer = torch.optim.SGD(pairs, lr=1e-12)

        def note(*_: Any) -> None:
            for n, p in pairs:
                if p.grad is not None:
                    total[n] = total.get(n, 0) + p.grad

        optimizer.register_step_pre_hook(note)
        return optimizer

    x, y = batch(0)
    trainer = trainer_of(
        partial(Corrected, source=Fixed, weight=1.0, recompute=recompute), optimizer=tiny
    )
    trainer.step(x, target=y)
    early = {n: g.clone() for n, g in total.items()}
    assert trainer.drain() == 3
    model = chain()
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(early["0.linear.weight"], total["0.linear.weight"], rtol=1e-3)


def test_a_share_of_none_is_the_source_alone() -> None:
    alone, mixed = trainer_of("linear"), trainer_of(partial(Mix, source="linear", share=0.0))
    for trainer in (alone, mixed):
        train(trainer, 4)
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(mixed)[name], tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_a_late_share_of_one_is_being_late(recompute: bool, at_once: bool) -> None:
    late = trainer_of(partial(Delayed, recompute=recompute))
    mixed = trainer_of(
        partial(Mix, source="linear", share=1.0, steps=1, at_once=at_once, recompute=recompute)
    )
    for trainer in (late, mixed):
        train(trainer, 6)
    for name, tensor in state(late).items():
        torch.testing.assert_close(state(mixed)[name], tensor, rtol=1e-11, atol=1e-13)


def test_half_of_nothing_is_half_of_the_gradient() -> None:
    """The source says zero: each cut halves what comes."""
    trainer = trainer_of(partial(Mix, source="zero", share=0.5))
    x, y = batch(0)
    true = trainer.true_gradients(x, target=y)
    seen = {}

    class Probe(Mix):
        def complete(
            self, prediction: Prediction, message: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            seen[len(seen)] = super().complete(prediction, message)[0]
            return (seen[len(seen) - 1],)

    probed = trainer_of(partial(Probe, source="zero", share=0.5))
    probed.step(x, target=y)
    for index, (cut, part) in enumerate(zip(reversed(CUTS), (0.5, 0.25, 0.125), strict=True)):
        torch.testing.assert_close(seen[index], true[cut] * part)


def test_feedback_projects_the_error_of_the_output() -> None:
    trainer = trainer_of("feedback")
    x, y = batch(0)
    model = chain()
    hidden = [x]
    for stage in model:
        hidden.append(stage(hidden[-1].detach()))
    output = hidden[-1].detach().requires_grad_()
    F.cross_entropy(output, y).backward()
    given = output.grad.float() @ trainer.decoupled.sources["0"].matrix_0
    hidden[1].backward(given.double())
    grads: dict[str, Tensor] = {}
    trainer.optimizers["stage_0"].register_step_pre_hook(
        lambda *_: grads.update(
            {n: p.grad.clone() for n, p in trainer.decoupled.model[0].named_parameters()}
        )
    )
    trainer.step(x, target=y)
    for name, parameter in model[0].named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
