"""Modes, guards, and models that change under way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam, sgd
from ..helpers.oracles import composed_check
from ..models.feedforward import Inception, mlp_chain, norm_dropout_chain
from ..models.zoo import BY_NAME
from .kit import CUTS, batches, decouple, fresh, make_trainer


def eager_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()


def test_frozen_norms_stay_in_eval_mode() -> None:
    model, plain = fresh(), fresh()
    for m in (model, plain):
        m[1].eval()
        m[5].eval()
    trainer, optimizer = make_trainer("exact", sgd, model=model), sgd(plain.named_parameters())
    means = model[1].running_mean.clone()
    for step, (x, target) in enumerate(batches(3)):
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
    assert torch.equal(model[1].running_mean, means)
    assert_bits_equal(state_of(model), state_of(plain), "frozen norms")
    assert [model[i].training for i in (0, 1, 3, 5)] == [True, False, True, False]


def test_mode_switched_after_decoupling() -> None:
    """Through the model, one module, or the decoupled model; dropout and norms follow."""
    trainer, plain = make_trainer("exact", sgd), fresh()
    optimizer, model = sgd(plain.named_parameters()), trainer.decoupled.model
    switches: list[Callable[[nn.Module], Any]] = [
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: m[1].eval(),
        lambda m: m[3].eval(),
        lambda m: m.train(),
    ]
    for step, switch in enumerate(switches):
        switch(model)
        switch(plain)
        x, target = batches(5)[step]
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
        assert_bits_equal(state_of(model), state_of(plain), f"switch {step}")


def test_control_flow_on_training() -> None:
    case = BY_NAME["inception"]
    decoupled = dni_fx.decouple(
        case.build(),
        list(case.cuts),
        example_inputs=case.inputs(4, torch.float32)[0],
        gradients="exact",
    )
    assert (
        composed_check(case, torch.float32, decoupled=decoupled, modes=("train", "eval", "train"))
        >= 6
    )
    decoupled = dni_fx.decouple(
        Inception().eval(), ["stem"], example_inputs=case.inputs(4, torch.float32)[0]
    )
    assert composed_check(case, torch.float32, decoupled=decoupled, modes=("eval",)) >= 1


class Guarded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for t in range(x.shape[1]):  # unrolled: another length is another graph
            h = h + self.mix(h[:, t : t + 1]) / (t + 1)
        h = h.tanh()
        if x.shape[0] > 1:
            h = h - h.mean(0)
        return self.head(h.sum(1))


@pytest.mark.parametrize("lazily", [True, False])
@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_guards_retrace_under_the_same_plan(gradients: str, lazily: bool) -> None:
    torch.manual_seed(0)
    model = Guarded()
    plain = copy.deepcopy(model)
    example = None if lazily else (torch.randn(4, 3, 5),)
    decoupled = dni_fx.decouple(
        model, ["embed", "tanh"], example_inputs=example, gradients=gradients
    )
    trainer, optimizer = (
        dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd),
        sgd(plain.named_parameters()),
    )
    for shape in ((4, 3, 5), (2, 4, 5), (1, 3, 5), (4, 3, 5), (3, 3, 5), (1, 4, 5)):
        x, target = torch.randn(shape), torch.randint(0, 3, shape[:1])
        if gradients == "linear":
            plain.load_state_dict(model.state_dict())
        assert_bits_equal(decoupled(x), plain(x), f"composed {shape}")
        trainer.step(x, target=target)
        if gradients == "exact":
            eager_step(plain, optimizer, x, target)
            assert_bits_equal(state_of(model), state_of(plain), f"trained on {shape}")
    count = len(decoupled.graphs.variants)
    assert count <= 4 + (not lazily)  # with examples the self-check adds one for evaluation
    trainer.step(torch.randn(4, 3, 5), target=torch.randint(0, 3, (4,)))
    assert len(decoupled.graphs.variants) == count  # cached


def test_lazy_tracing_trains_as_eager_tracing() -> None:
    lazy = dni_fx.Trainer(
        dni_fx.decouple(fresh(), CUTS, gradients="mlp"), F.cross_entropy, optimizer=adam
    )
    ready = make_trainer("mlp", context=None)
    with pytest.raises(DecouplingError, match="prepare"):
        print(lazy.optimizers)
    ready.decoupled.load_state_dict(ready.decoupled.state_dict())
    x, target = batches(1)[0]
    lazy.decoupled.bind(x)
    lazy.decoupled.load_state_dict(ready.decoupled.state_dict())
    for step in range(2):
        for trainer in (lazy, ready):
            torch.manual_seed(step)
            trainer.step(x, target=target)
    assert_bits_equal(state_of(lazy.decoupled), state_of(ready.decoupled), "lazily traced")
    assert lazy.decoupled.plan == ready.decoupled.plan


@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_parameters_loaded_after_decoupling_are_used(gradients: str) -> None:
    trainer, other, (x, _) = make_trainer(gradients), norm_dropout_chain().eval(), batches(1)[0]
    trainer.decoupled.model.load_state_dict(other.state_dict())
    assert_bits_equal(trainer.decoupled.eval()(x), other(x), "loaded")
    third = norm_dropout_chain().eval()
    trainer.decoupled.model.load_state_dict(
        third.state_dict(), assign=True
    )  # other objects under the same names
    trainer.decoupled.model.eval()
    assert_bits_equal(trainer.decoupled(x), third(x), "assigned")


def test_a_replaced_parameter_or_module_is_noticed() -> None:
    decoupled = decouple("exact")
    model, (x, target) = decoupled.model, batches(1)[0]
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    trainer.step(x, target=target)
    model[4].weight = nn.Parameter(torch.randn(8, 8))
    assert_bits_equal(decoupled.eval()(x), model(x), "another parameter")
    model[8] = nn.Linear(8, 3)
    assert_bits_equal(decoupled(x), model(x), "another module")
    decoupled.train()
    before = [model[4].weight.detach().clone(), model[8].weight.detach().clone()]
    # the new parameter is trained, or an error says that the optimiser does not have it: never
    # silently neither
    try:
        trainer.step(x, target=target)
    except DecouplingError as error:
        assert "Trainer" in str(error) or "optimi" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(before[0], model[4].weight)
        assert not torch.equal(before[1], model[8].weight)


def test_another_dtype_after_decoupling() -> None:
    decoupled = decouple("linear")
    model, (x, target) = decoupled.model, batches(1)[0]
    model.double().eval()
    assert_bits_equal(decoupled(x.double()), model(x.double()), "double after decoupling")
    trainer = dni_fx.Trainer(decouple("exact", model=fresh()), F.cross_entropy, optimizer=sgd)
    trainer.decoupled.double()
    plain = fresh().double()
    optimizer = sgd(plain.named_parameters())
    torch.manual_seed(0)
    trainer.step(x.double(), target=target)
    torch.manual_seed(0)
    eager_step(plain, optimizer, x.double(), target)
    assert_bits_equal(state_of(trainer.decoupled.model), state_of(plain), "trained in double")


@pytest.mark.parametrize("index", [0, 4, 8])
def test_freezing_after_decoupling(index: int) -> None:
    trainer, plain = make_trainer("exact", sgd), fresh()
    optimizer, model = sgd(plain.named_parameters()), trainer.decoupled.model
    for step, (x, target) in enumerate(batches(4)):
        for m in (model, plain):
            m[index].requires_grad_(step in (0, 3))
        torch.manual_seed(step)
        trainer.step(x, target=target)
        torch.manual_seed(step)
        eager_step(plain, optimizer, x, target)
        assert_bits_equal(
            state_of(model), state_of(plain), f"step {step}: layer {index} frozen, then unfrozen"
        )


def test_unfreezing_what_was_frozen_when_decoupled() -> None:
    model = fresh()
    model[4].requires_grad_(False)
    trainer = make_trainer("exact", sgd, model=model)
    model[4].requires_grad_(True)
    before, (x, target) = model[4].weight.detach().clone(), batches(1)[0]
    try:
        trainer.step(x, target=target)
    except DecouplingError as error:
        assert "4.weight" in str(error) or "unfrozen" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(model[4].weight, before)


def test_unfreezing_a_whole_stage_needs_a_new_plan() -> None:
    model = mlp_chain()
    model[0].requires_grad_(False)
    decoupled = dni_fx.decouple(model, ["3"], example_inputs=(batches(1)[0][0],))
    model[0].requires_grad_(True)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    before, (x, target) = model[0].weight.detach().clone(), batches(1)[0]
    trainer.step(x, target=target)  # the value at '3' carried a gradient before and still does
    assert "0.weight" in dict(decoupled.stages[0].named_parameters())
    assert trainer.decoupled.interfaces[0].name == "3"
    assert torch.equal(before, model[0].weight)  # a fresh synthesizer predicts zero
    trainer.step(x, target=target)
    assert not torch.equal(before, model[0].weight)


def test_decoupling_twice_is_independent() -> None:
    model, (x, target) = fresh(), batches(1)[0]
    one, two = decouple("mlp", model=model), decouple("linear", model=model, cuts=["1"])
    assert one.model is two.model
    assert len(one.stages) == 3
    assert len(two.stages) == 2
    first = dni_fx.Trainer(one, F.cross_entropy, optimizer=sgd)
    second = dni_fx.Trainer(two, F.cross_entropy, optimizer=sgd)
    code = one.stages[0].code, two.stages[0].code
    for trainer in (first, second, first):
        trainer.step(x, target=target)
    assert (one.stages[0].code, two.stages[0].code) == code
    one.eval()
    assert_bits_equal(one(x), two(x), "two cuts of one model")
    assert_bits_equal(one(x), model(x), "cut and uncut")


def test_a_stage_decoupled_again() -> None:
    decoupled = decouple("exact", cuts=["6"])
    stage, (x, _) = decoupled.stages[0], batches(1)[0]
    inner = dni_fx.decouple(stage.module, ["1", "4"], example_inputs=(x,), gradients="exact")
    assert len(inner.stages) == 3
    outer = {id(p) for p in stage.parameters()}
    assert {id(p) for p in inner.model.parameters()} == outer
    decoupled.eval()
    stage.module.eval()
    assert_bits_equal(inner(x), stage.module(x), "a stage, cut again")
    trainer = dni_fx.Trainer(inner, lambda output, _: output[0].square().mean(), optimizer=sgd)
    before = decoupled.model[0].weight.detach().clone()
    trainer.step(x)
    assert not torch.equal(before, decoupled.model[0].weight)  # the user's own parameters
