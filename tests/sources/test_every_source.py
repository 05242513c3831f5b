"""Every kind of source inside the trainer: it trains every stage, is asked once, and knows nothing
of what comes.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dni_fx
from dni_fx.plan import CutPlan
from dni_fx.sources import SOURCES, Critic, Joint

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import ONE_HOT, batch, state, train, trainer_of
from ..models.cases import Case
from ..models.small import CHAIN, CONVOLUTIONS, CROSSING
from .kit import noted

NAMES = [name for name in SOURCES if name not in ("exact", "conv")]


@pytest.mark.matrix
@pytest.mark.parametrize("inputs", [None, "auto"])
@pytest.mark.parametrize("case", [CHAIN, CROSSING, CONVOLUTIONS], ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_source_trains_every_stage_on_every_graph(
    name: str, case: Case, inputs: str | None
) -> None:
    trainer = trainer_of(
        name, case, inputs=inputs, synthesizer_optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    before, sources = state(trainer), copy.deepcopy(trainer.decoupled.synthesizers.state_dict())
    train(trainer, 6, case=case)
    trainer.drain()
    for parameter, _ in trainer.decoupled.model.named_parameters():
        if parameter.endswith("weight"):  # biases before batch norm have no gradient
            learns = name != "zero" or parameter.startswith(
                ("3." if case is CHAIN else "5.", "head")
            )
            moved = not torch.equal(state(trainer)[parameter], before[parameter])
            assert moved == learns, parameter
    for key, value in trainer.decoupled.synthesizers.state_dict().items():
        if key.endswith("weight") and "norm" not in key:
            assert not torch.equal(value, sources[key]), f"{key} has not learnt"
    assert trainer.drain() == 0


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("zero", "stale", "delayed", "mix", "feedback")]
)
def test_one_forward_of_each_source_a_step(name: str) -> None:
    trainer = trainer_of(name, CROSSING)
    calls: list[int] = []
    for source in trainer.decoupled.sources.values():
        source.register_forward_hook(lambda module, *_: calls.append(id(module)))
    train(trainer, 5)
    assert len(calls) == 5 * len(set(calls))


@pytest.mark.parametrize("name", ["linear", "critic", "sobolev", "distill", "local"])
def test_sources_predict_before_the_stages_behind_have_run(name: str) -> None:
    """Perturbing a later stage leaves the gradients of earlier ones untouched."""
    grads = []
    for scale in (1.0, 3.0):
        trainer = trainer_of(name)
        train(trainer, 2)
        with torch.no_grad():
            trainer.decoupled.model[3].weight.mul_(scale)
        seen: dict[str, Tensor] = {}
        noted(trainer, 1, seen)
        train(trainer, 1, first=2)
        grads.append(seen)
    assert_bits_equal(grads[0], grads[1], name)


@pytest.mark.parametrize(
    "option", ["joint:critic", Joint(Critic), "joint:linear", "joint:corrected"]
)
def test_one_source_for_a_boundary(option: Any) -> None:
    trainer = trainer_of(option, CROSSING)
    decoupled = trainer.decoupled
    by_stage: dict[int, set[int]] = {}
    for interface in decoupled.interfaces:
        by_stage.setdefault(interface.producer, set()).add(id(decoupled.sources[interface.name]))
    assert all(len(ids) == 1 for ids in by_stage.values())
    sizes = [len(decoupled.sources[i.name].specs) for i in decoupled.interfaces]
    assert sum(1 / n for n in sizes) == len(by_stage)
    assert len(trainer.synthesizer_optimizers) == len(by_stage)
    train(trainer, 3)
    x, y = batch(0)
    assert set(trainer.diagnose(x, target=y)) == {i.name for i in decoupled.interfaces}


def test_a_joint_linear_source_is_two_alone() -> None:
    """Networks are one per value there, so only the seeds of their (zero) start could differ."""
    joint, alone = (trainer_of(g, CROSSING) for g in ("joint:linear", "linear"))
    for trainer in (joint, alone):
        train(trainer, 4)
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(joint)[name], tensor)


def test_a_plan_keeps_joint_sources_and_inputs() -> None:
    trainer = trainer_of("joint:critic", CROSSING, inputs="linear")
    plan = CutPlan.from_json(trainer.decoupled.plan.to_json())
    assert plan == trainer.decoupled.plan
    again = dni_fx.decouple(CROSSING.build(), plan, example_inputs=(batch(0)[0],), context=ONE_HOT)
    assert again.state_dict().keys() == trainer.decoupled.state_dict().keys()


@pytest.mark.parametrize("name", ["local", "feedback", "critic"])
def test_accumulated_gradients_have_the_size_of_one_loss(name: str) -> None:
    """Two equal batches, each counting half, make the update of one."""
    found = []
    for accumulate in (1, 2):
        trainer = trainer_of(
            name, accumulate=accumulate, synthesizer_optimizer=partial(torch.optim.SGD, lr=0.0)
        )
        seen: dict[str, Tensor] = {}
        noted(trainer, 2, seen)
        for _ in range(accumulate):
            x, y = batch(0)
            trainer.step(x, target=y)
        found.append(seen)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)
