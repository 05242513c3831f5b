"""The trainer's state: resuming is bit-equal, keys are plain, the user's model is untouched."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam, sgd
from .kit import CUTS, SOURCES, batches, decouple, fresh, make_trainer, whole


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gradients", SOURCES)
def test_resuming_is_bit_equal(gradients: str, accumulate: int, optimizer: Any) -> None:
    first, data = make_trainer(gradients, optimizer, accumulate=accumulate), batches(10)
    for x, target in data[:5]:  # with accumulate=3 this stops within an update
        first.step(x, target=target)
    first.drain()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    for x, target in data[5:]:
        first.step(x, target=target)
    torch.manual_seed(123)
    second = make_trainer(gradients, optimizer, accumulate=accumulate)
    for x, target in batches(2):  # what it did before does not matter
        second.step(-x, target=target)
    second.drain()
    second.load_state_dict(torch.load(file, weights_only=True))
    for x, target in data[5:]:
        second.step(x, target=target)
    for trainer in (first, second):
        trainer.drain()
    assert_bits_equal(whole(second), whole(first), f"{gradients}: resumed")


def test_loading_does_not_share_memory_with_the_state() -> None:
    trainer, (x, target) = make_trainer("mlp", accumulate=2), batches(1)[0]
    trainer.step(x, target=target)
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    other = make_trainer("mlp", accumulate=2)
    other.load_state_dict(state)
    for _ in range(3):
        other.step(x, target=target)
    assert_bits_equal(state, kept, "a loaded state, after training on")


def test_state_keys() -> None:
    model = fresh()
    keys = list(model.state_dict())
    decoupled = decouple("mlp", model=model)
    prefixes = {key.split(".")[0] for key in decoupled.state_dict()}
    assert prefixes == {"model", "synthesizers"}
    assert [
        k.removeprefix("model.") for k in decoupled.state_dict() if k.startswith("model.")
    ] == keys
    assert {
        k.split(".")[1] for k in decoupled.state_dict() if k.startswith("synthesizers.")
    } == set(CUTS)
    assert {n.split(".")[0] for n, _ in decoupled.named_parameters()} == {"model", "synthesizers"}
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=adam)
    before = set(decoupled.state_dict())
    trainer.fit(batches(3), progress=False)
    assert set(decoupled.state_dict()) == before  # complete as soon as it is traced
    fresh().load_state_dict(model.state_dict())


def test_the_users_model_is_untouched() -> None:
    model = fresh()
    model[0].register_forward_hook(lambda *_: None)
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    mark = model.forward
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    state, gradient, generator = state_of(model), model[0].weight.grad, torch.get_rng_state()
    modes, hooks = (
        [m.training for m in model.modules()],
        [dict(m._forward_hooks) for m in model.modules()],
    )
    tables = [sorted(vars(m)) for m in model.modules()]
    for gradients in SOURCES:
        decouple(gradients, model=model)
    assert type(model) is nn.Sequential
    assert model.forward == mark
    assert "forward" not in vars(model)
    assert tensors == {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert_bits_equal(state_of(model), state, "model after decouple")
    assert_bits_equal(torch.get_rng_state(), generator, "generator after decouple")
    assert model[0].weight.grad is gradient
    assert bool((gradient == 1).all())
    assert modes == [m.training for m in model.modules()]
    assert hooks == [dict(m._forward_hooks) for m in model.modules()]
    assert tables == [sorted(vars(m)) for m in model.modules()]
    copy.deepcopy(model)
