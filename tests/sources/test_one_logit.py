"""Heads whose loss has no slope by construction: refused, at decouple or in the first step."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.sources import Critic, Distill, Local, Sobolev

from ..helpers.optimisers import sgd

INPUTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS[:, 0] > 0).float()


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))


def _column(target: Tensor) -> Tensor:
    return target.float().unsqueeze(1)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.squeeze(1), target)


def _bce(logits: Tensor, context: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, context, reduction="none").mean(-1)


def _hinge(logits: Tensor, context: Tensor) -> Tensor:
    return (1 - logits * (2 * context - 1)).relu().mean(-1)


def _trained(gradients: Any, steps: int = 3) -> tuple[nn.Sequential, nn.Sequential]:
    """A model before and after some steps."""
    net = _net()
    before = copy.deepcopy(net)
    decoupled = dni_fx.decouple(
        net, ["1", "3"], example_inputs=(INPUTS,), gradients=gradients, context=_column
    )
    trainer = dni_fx.Trainer(decoupled, _loss, optimizer=sgd)
    for _ in range(steps):
        trainer.step(INPUTS, target=LABELS)
    return before, net


@pytest.mark.parametrize(
    "gradients",
    ["local", "critic", "sobolev", "distill", "joint:local", partial(Distill, loss=_bce)],
)
def test_cross_entropy_over_one_logit_is_refused_at_decouple(gradients: Any) -> None:
    with pytest.raises(DecouplingError, match=r"interface '1'.*Pass loss="):
        dni_fx.decouple(
            _net(), ["1", "3"], example_inputs=(INPUTS,), gradients=gradients, context=_column
        )


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, c: F.cross_entropy(p, c, reduction="none"),
        lambda p, c: p.detach().mean(-1),
        lambda p, c: p.sign().mean(-1),
        lambda p, c: c.mean(-1),
    ],
)
@pytest.mark.parametrize("kind", [Local, Critic, Sobolev])
def test_a_loss_of_ones_own_without_a_slope_is_refused_in_the_first_step(
    loss: Any, kind: type
) -> None:
    with pytest.raises(DecouplingError, match=r"stage_0, which sends '1'.*Pass loss="):
        _trained(partial(kind, loss=loss), 1)


@pytest.mark.parametrize(
    "gradients",
    [
        partial(Local, loss=_bce),
        partial(Local, loss="mse"),
        partial(Local, loss=_hinge),
        partial(Critic, loss=_bce),
        partial(Distill, loss="mse"),
    ],
)
def test_other_losses_over_one_logit_train_every_stage(gradients: Any) -> None:
    before, after = _trained(gradients)
    for place in (0, 2, 4):
        assert not torch.equal(before[place].weight, after[place].weight)


def test_a_batch_without_a_slope_is_no_mistake() -> None:
    """Where the hinge is satisfied nothing flows back, but other logits would have a slope."""
    spec = dni_fx.plan.TensorSpec((12, 8), torch.float32)
    head = Local((spec,), dni_fx.plan.TensorSpec((12, 1), torch.float32), loss=_hinge)
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.fill_(2.0)
    (gradient,) = head((INPUTS,), torch.ones(12, 1)).gradients
    assert not gradient.any()


def test_ignored_labels_alone_are_no_mistake() -> None:
    decoupled = dni_fx.decouple(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        ["1"],
        example_inputs=(INPUTS,),
        gradients=partial(Local, loss=lambda p, c: -(c * p.log_softmax(-1)).sum(-1)),
        context=dni_fx.one_hot(3),
    )
    trainer = dni_fx.Trainer(
        decoupled, lambda o, t: F.cross_entropy(o, t.clamp(min=0)), optimizer=sgd
    )
    for label in (-100, 1):
        trainer.step(INPUTS, target=torch.full((12,), label))
