"""A gradient that does not arrive where the graph says that one must is an error, never a zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from .refusals import X, Y, everything


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class _Detaching(nn.Module):
    """Stands before or behind a layer and lets no gradient through."""

    def __init__(self, inner: nn.Module, behind: bool) -> None:
        super().__init__()
        self.inner, self.behind = inner, behind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x if self.behind else x.detach())
        return y.detach() if self.behind else y


def _broken(decoupled: dni_fx.Decoupled, path: str, stage: int, behind: bool) -> None:
    """Something that the tracer never saw stands in a stage's graph."""
    module: Any = decoupled.graphs.variant.split.stages[stage].module
    setattr(module, path, _Detaching(module.get_submodule(path), behind))


@pytest.mark.parametrize("gradients", ["linear", "local", "delayed", "exact"])
@pytest.mark.parametrize(
    ("path", "stage", "behind", "named"),
    [
        ("2", 1, True, "interface '1'"),
        ("2", 1, False, "interface '1'"),
        ("4", 2, False, "interface '3'"),
        ("0", 0, True, r"parameter '0\.weight'"),
    ],
)
def test_in_the_trainer(gradients: str, path: str, stage: int, behind: bool, named: str) -> None:
    decoupled = dni_fx.decouple(
        _net(), ["1", "3"], example_inputs=(X,), gradients=gradients, context=dni_fx.one_hot(3)
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    _broken(decoupled, path, stage, behind)
    before = everything(trainer)

    def steps() -> None:
        for _ in range(3):  # a late source pulls back some steps later
            trainer.step(X, target=Y)

    with pytest.raises(DecouplingError, match=rf"stage_{stage}.*no gradient arrived at {named}"):
        steps()
    if gradients != "delayed":
        assert_bits_equal(everything(trainer), before, "after the refusal")


@pytest.mark.parametrize(
    ("gradients", "path", "stage", "behind", "named"),
    [
        ("linear", "2", 1, False, "interface '1'"),  # of a head nobody hears it
        ("linear", "0", 0, True, r"parameter '0\.weight'"),
        ("local", "0", 0, True, r"parameter '0\.weight'"),
    ],
)
def test_in_the_drop_in(gradients: str, path: str, stage: int, behind: bool, named: str) -> None:
    decoupled = dni_fx.decouple(
        _net(), ["1", "3"], example_inputs=(X,), gradients=gradients, context=dni_fx.one_hot(3)
    )
    m = decoupled.as_module()
    _broken(decoupled, path, stage, behind)
    with pytest.raises(DecouplingError, match=rf"no gradient arrived at {named}"), m.context(Y):
        m(X)


def test_an_exchanged_parameter() -> None:
    """The optimiser would hold the old one, and the stage stand still: the new one is adopted."""
    net = _net()
    decoupled = dni_fx.decouple(net, ["1", "3"], example_inputs=(X,), gradients="linear")
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    trainer.step(X, target=Y)
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    before = net[2].weight.detach().clone()
    trainer.step(X, target=Y)
    assert not torch.equal(net[2].weight, before)


class _Sized(nn.Module):
    """Uses of a value for its shape or type alone, and results of which only some count."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kind, self.scale = kind, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        a = self.first(x).relu()
        b = self.second(a).tanh()
        h = {
            "expand_as": lambda: b + self.scale.expand_as(a),
            "view_as": lambda: b.view_as(a),
            "type_as": lambda: b.type_as(a),
            "to": lambda: b.to(a),
            "broadcast": lambda: torch.broadcast_tensors(b, a)[0],
            "split": lambda: torch.cat([b[:, :4], torch.split(a, 4, 1)[1]], 1),
            "half": lambda: b.chunk(2, 1)[0].repeat(1, 2),
            "no_grad": lambda: b + self._quietly(a),
            "setitem": lambda: self._overwritten(a, b),
            "stack": lambda: torch.stack([a, b]).amax(0),
        }[self.kind]()
        return self.third(h)

    @torch.no_grad()
    def _quietly(self, a: Tensor) -> Tensor:
        return self.second(a)

    @staticmethod
    def _overwritten(a: Tensor, b: Tensor) -> Tensor:
        h = a * 2
        h[:] = b
        return h


KINDS = (
    *("expand_as", "view_as", "type_as", "to", "broadcast", "split", "half", "no_grad"),
    *("setitem", "stack"),
)


@pytest.mark.parametrize("gradients", ["zero", "exact", "linear"])
@pytest.mark.parametrize("cuts", [["first"], ["second"], ["first", "second"]])
@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_no_gradient_anyway_is_no_mistake(
    kind: str, cuts: list[str], gradients: str
) -> None:
    """Negative control: plain training leaves out the same."""
    model = _Sized(kind)
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(X,), gradients=gradients)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    for _ in range(2):
        trainer.step(X, target=Y)
    if gradients != "exact":
        F.cross_entropy(decoupled.as_module()(X), Y).backward()


def test_an_output_that_the_loss_passes_over_is_no_mistake() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).relu()
            return self.a(h), self.b(h)

    decoupled = dni_fx.decouple(Two(), ["body", "a"], example_inputs=(X,), gradients="exact")
    dni_fx.Trainer(decoupled, lambda o, t: F.cross_entropy(o[0], t), optimizer=sgd).step(
        X, target=Y
    )


def test_a_graph_that_was_used_up_is_named() -> None:
    """What two stages use was computed before the call."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).relu() * shift) * shift.mean()
            return y

    weight = torch.ones(8, requires_grad=True)
    decoupled = dni_fx.decouple(
        Conditioned(), ["first"], example_inputs=(X, (weight * 2).exp()), gradients="linear"
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    shift = (weight * 2).exp()
    trainer.step(X, shift, target=Y)
    with pytest.raises(DecouplingError, match="used up"):
        trainer.step(X, shift, target=Y)
    trainer.step(X, shift.detach().requires_grad_(), target=Y)


class _Kept(nn.Module):
    """Keeps a term of the loss, made of what the second layer is given, or what it gives."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.late, self.term = late, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.late:
            self.term = h.mean()
        h = self.b(h)
        if self.late:
            self.term = h.mean()
        result: Tensor = self.c(h)
        return result


def _kept_trainer(model: _Kept, cuts: list[str]) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(X,), gradients="exact")
    return dni_fx.Trainer(decoupled, lambda o, y: F.cross_entropy(o, y) + model.term, optimizer=sgd)


@pytest.mark.parametrize("cuts", [["b"], ["a", "b"]])
def test_what_the_model_keeps_for_the_loss_crosses(cuts: list[str]) -> None:
    """What is kept is made behind the cut, of a value that nothing else there needs."""
    model, alone = _Kept(True), _Kept(True)
    _kept_trainer(model, cuts).step(X, target=Y)
    (F.cross_entropy(alone(X), Y) + alone.term).backward()
    sgd(alone.parameters()).step()
    for (name, want), got in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert_bits_equal(got, want, name)


def test_what_a_stage_before_the_last_keeps_is_no_part_of_the_loss() -> None:
    """Also where that stage's part of it has no parameter."""
    model = _Kept(False)
    trainer = _kept_trainer(model, ["a", "b"])
    with pytest.raises(DecouplingError, match="attribute 'term' of the model"):
        trainer.step(X, target=Y)
