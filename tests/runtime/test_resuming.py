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
from dni_fx.errors import DecouplingError

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


class Auxiliary(nn.Module):
    """Uses a head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        return self.head(h) + self.aux(h) if self.training else self.head(h)


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 1])


def auxiliary(steps: int) -> dni_fx.Trainer:
    """Trained in evaluation mode, so that no optimiser has the auxiliary head yet; in training
    mode from now on.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Auxiliary().eval()
        decoupled = dni_fx.decouple(model, ["a"], example_inputs=(X,), check=False)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=adam)
    for _ in range(steps):
        trainer.step(X, target=Y)
    decoupled.train()
    return trainer


def groups(trainer: dni_fx.Trainer) -> dict[str, list[int]]:
    """How many parameters are in each group of each stage's optimiser."""
    made = trainer.optimizers.items()
    return {n: [len(g["params"]) for g in o.param_groups] for n, o in made}


def test_a_state_from_before_a_newer_graph_is_loaded() -> None:
    first, second = auxiliary(3), auxiliary(0)
    state = copy.deepcopy(first.state_dict())
    second.decoupled(X)  # a graph with parameters that no optimiser has
    second.load_state_dict(state)
    assert groups(second) == {"stage_0": [2], "stage_1": [2]}
    for trainer in (first, second):
        trainer.step(X, target=Y)
        assert groups(trainer) == {"stage_0": [2], "stage_1": [2, 2]}
    assert_bits_equal(whole(second), whole(first), "after the load")


def test_a_state_from_after_a_newer_graph_is_loaded() -> None:
    first, second = auxiliary(2), auxiliary(0)
    first.step(X, target=Y)
    state = copy.deepcopy(first.state_dict())
    second.decoupled(X)
    second.decoupled.eval()(X)  # the graph that is active is not the newest
    second.load_state_dict(state)
    assert_bits_equal(whole(second), whole(first), "after the load")


@pytest.mark.parametrize("newer", [True, False])
def test_a_state_with_other_groups_is_refused_and_changes_nothing(newer: bool) -> None:
    """The state has a group more than the trainer, or the trainer one more than the state."""
    first, second = auxiliary(2), auxiliary(1)
    (first if newer else second).step(X, target=Y)
    state = copy.deepcopy(first.state_dict())
    before, sizes = whole(second), groups(second)
    with pytest.raises(DecouplingError, match=r"stage_1.*groups of") as caught:
        second.load_state_dict(state)
    assert "a group of its own" in str(caught.value)
    assert groups(second) == sizes
    assert_bits_equal(whole(second), before, "after the refusal")


def test_sources_are_looked_at_though_stages_take_in_what_is_new() -> None:
    first, second = auxiliary(2), auxiliary(0)
    first.step(X, target=Y)
    second.decoupled(X)
    state = copy.deepcopy(first.state_dict())
    (source,) = state["synthesizer_optimizers"].values()
    source["param_groups"] *= 2
    before, sizes = whole(second), groups(second)
    with pytest.raises(DecouplingError, match=r"'a'.*groups of"):
        second.load_state_dict(state)
    assert groups(second) == sizes
    assert_bits_equal(whole(second), before, "after the refusal")


def test_a_refused_load_leaves_an_unowned_graph_unowned() -> None:
    trainer = auxiliary(1)
    trainer.decoupled(X)
    state = copy.deepcopy(trainer.state_dict())
    state["decoupled"]["model.a.weight"] = torch.zeros(5, 4)
    before, sizes = whole(trainer), groups(trainer)
    with pytest.raises(DecouplingError, match="does not fit"):
        trainer.load_state_dict(state)
    assert groups(trainer) == sizes
    assert_bits_equal(whole(trainer), before, "after the refusal")


def test_a_state_is_loaded_twice() -> None:
    """An optimiser that went on in the state's own tensors would change it."""
    trainer, data = make_trainer("linear", adam), batches(4)
    for x, target in data[:2]:
        trainer.step(x, target=target)
    state = copy.deepcopy(trainer.state_dict())
    after = []
    for _ in range(2):
        trainer.load_state_dict(state)
        for x, target in data[2:]:
            trainer.step(x, target=target)
        after.append(whole(trainer))
    assert_bits_equal(after[1], after[0], "the same state, loaded again")


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
