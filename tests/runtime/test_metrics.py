"""Reports and true gradients, and sources that are references themselves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import PlanMismatchError

from ..helpers.comparing import assert_bits_equal, frozen, state_of
from ..helpers.optimisers import sgd
from ..models.feedforward import mlp_chain
from .kit import CUTS, SOURCES, batches, make_trainer


def test_metrics() -> None:
    trainer = make_trainer("mlp", metrics_every=3)
    data = batches(8)
    reports = [trainer.step(x, target=target) for x, target in data]
    assert [r.step for r in reports] == list(range(1, 9))
    assert [r.interfaces["6"].step for r in reports] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert math.isnan(reports[0].interfaces["6"].cosine)  # a fresh synthesizer predicts zero
    assert reports[0].interfaces["6"].relative_error == pytest.approx(1.0)
    assert -1 <= reports[-1].interfaces["6"].cosine <= 1
    assert reports[-1].interfaces["6"].reference == "true"
    assert reports[-1].interfaces["3"].reference == "bootstrapped"
    trainer.request_metrics()
    assert trainer.step(*data[0][:1], target=data[0][1]).interfaces["6"].step == 8
    assert not reports[-1].loss.requires_grad
    assert not reports[-1].outputs.requires_grad


def test_metrics_do_not_change_training() -> None:
    often, rarely = make_trainer("mlp", metrics_every=1), make_trainer("mlp", metrics_every=1000)
    for trainer in (often, rarely):
        torch.manual_seed(0)
        trainer.fit(batches(5), progress=False)
    assert_bits_equal(
        state_of(often.decoupled), state_of(rarely.decoupled), "with and without metrics"
    )


@pytest.mark.parametrize("gradients", SOURCES)
def test_true_gradients_equal_autograd_and_change_nothing(gradients: str) -> None:
    trainer, data = make_trainer(gradients, accumulate=2), batches(3)
    for x, target in data:  # stops within an update, so gradients are held
        trainer.step(x, target=target)
    x, target = data[0]
    held = {n: None if p.grad is None else p.grad for n, p in trainer.decoupled.named_parameters()}
    before = frozen(held), state_of(trainer.decoupled), torch.get_rng_state(), trainer.steps
    true = trainer.true_gradients(x, target=target)
    after = frozen(held), state_of(trainer.decoupled), torch.get_rng_state(), trainer.steps
    assert_bits_equal(after, before, "after true_gradients")
    assert all(p.grad is held[n] for n, p in trainer.decoupled.named_parameters())

    model = copy.deepcopy(trainer.decoupled.model)
    values: dict[str, Tensor] = {}
    for name in CUTS:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            values[name] = output

        model[int(name)].register_forward_hook(keep)
    F.cross_entropy(model(x), target).backward()
    assert_bits_equal(true, {n: v.grad for n, v in values.items()}, "true gradients")


def test_zero_lets_nothing_through() -> None:
    trainer, (x, target) = make_trainer("zero", sgd), batches(1)[0]
    before = state_of(trainer.decoupled.model)
    for _ in range(3):
        trainer.step(x, target=target)
    after = dict(trainer.decoupled.model.named_parameters())
    for name, parameter in after.items():
        if name[0] in "045":
            assert torch.count_nonzero(parameter.grad) == 0
            assert torch.equal(parameter, before[name])
    assert not torch.equal(after["8.weight"], before["8.weight"])


def test_stale_is_the_gradient_of_the_step_before() -> None:
    trainer = dni_fx.Trainer(
        dni_fx.decouple(mlp_chain(), ["3"], example_inputs=(torch.randn(4, 6),), gradients="stale"),
        F.cross_entropy, optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )  # fmt: skip
    data, model = batches(3), trainer.decoupled.model
    late: Tensor | None = None
    for x, target in data:
        true = trainer.true_gradients(x, target=target)["3"]
        trainer.step(x, target=target)
        got = model[2].weight.grad
        h = model[3](model[2](model[1](model[0](x))))
        expected = (
            torch.zeros_like(got)
            if late is None
            else torch.autograd.grad(h, model[2].weight, late)[0]
        )
        assert_bits_equal(got, expected, "gradient before the cut")
        late = true


def test_a_new_mode_that_cannot_be_cut_says_so() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(self.b(h).relu() if self.training else h)

    model, (x, target) = Shortcut(), batches(1)[0]
    decoupled = dni_fx.decouple(model, ["b"], example_inputs=(x,))
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    model.eval()
    assert_bits_equal(decoupled(x), model(x), "evaluation without the cut")
    with pytest.raises(PlanMismatchError, match="'b'"):
        trainer.step(x, target=target)
    model.train()
    trainer.step(x, target=target)
