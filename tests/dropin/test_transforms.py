"""What an ordinary model takes and a predicting drop-in cannot: one error, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal
from .kit import state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 5


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)
    )


def _made(gradients: str = "linear") -> Any:
    return dni_fx.decouple(_net(), ["1", "3"], example_inputs=(X,), gradients=gradients).as_module()


def _penalty(m: nn.Module) -> Tensor:
    z = X.clone().requires_grad_()
    out = m(z)
    (slope,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    loss = F.cross_entropy(out, Y) + (slope.norm(dim=1) - 1).square().mean()
    loss.backward()
    return loss


def _second_order(m: nn.Module) -> Any:
    F.cross_entropy(m(X), Y).backward(create_graph=True)
    return [p.grad for p in m.parameters()]


def _functional(m: nn.Module) -> Any:
    given = {n: p.detach() for n, p in m.named_parameters()}
    return torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(m, p, (X,)), Y))(
        given
    )


def _forward_mode(m: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


class _Around(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "gradient penalty": _penalty,
    "backward(create_graph=True)": _second_order,
    "hessian": lambda m: torch.autograd.functional.hessian(lambda z: m(z).sum(), X[:2]),
    "torch.func.grad": _functional,
    "torch.func.vmap": lambda m: torch.func.vmap(m)(X[:, None]),
    "torch.func.jvp": lambda m: torch.func.jvp(m, (X,), (X,)),
    "forward mode": _forward_mode,
    "torch.export": lambda m: torch.export.export(m, (X,)),
    "torch.jit.trace": lambda m: torch.jit.trace(m, (X,), check_trace=False),
    "make_fx": lambda m: make_fx(m)(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_refused_while_it_predicts(name: str) -> None:
    m = _made()
    before = state(m)
    with pytest.raises(DecouplingError, match=r"decoupled\.model") as found:
        TRANSFORMS[name](m)
    assert found.value.__cause__ is None
    assert_bits_equal(state(m), before, "after the refusal")
    F.cross_entropy(m(X), Y).backward()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_way_out_and_exact_mode_work(name: str) -> None:
    """Negative control: nothing is refused where nothing is predicted."""
    TRANSFORMS[name](_made().eval().train()._dni_fx.graphs.model)
    TRANSFORMS[name](_made("exact"))


@pytest.mark.parametrize(
    "transform", [torch.jit.script, fx.symbolic_trace], ids=["script", "symbolic_trace"]
)
@pytest.mark.parametrize("training", [True, False])
def test_what_reads_code_is_refused_in_every_mode(
    transform: Callable[[Any], Any], training: bool
) -> None:
    with pytest.raises(DecouplingError, match=r"decoupled\.model"):
        transform(_made().train(training))
    transform(_net())


def test_the_same_for_what_has_it_as_a_submodule() -> None:
    for transform in (torch.jit.script, fx.symbolic_trace):
        with pytest.raises(DecouplingError, match=r"decoupled\.model"):
            transform(_Around(_made()))
    with pytest.raises(DecouplingError, match=r"decoupled\.model"):
        torch.jit.script(_Around(_made().eval()))
    model = _Around(_made().eval())
    assert torch.equal(fx.symbolic_trace(model)(X), model(X))


def test_evaluation_is_the_model_under_every_other_transform() -> None:
    m = _made().eval()
    plain = m._dni_fx.graphs.model
    assert torch.equal(torch.func.vmap(m)(X[:, None]), torch.func.vmap(plain)(X[:, None]))
    exported = torch.export.export(m, (X,)).module()
    assert torch.equal(exported(X), plain(X))


@pytest.mark.parametrize(
    ("kind", "inside"), [("drop-in", True), ("drop-in", False), ("Decoupled", False)]
)
def test_decoupling_twice(kind: str, inside: bool) -> None:
    decoupled = dni_fx.decouple(_net(), ["1"], example_inputs=(X,), gradients="linear")
    twice: nn.Module = decoupled.as_module() if kind == "drop-in" else decoupled
    model = _Around(twice) if inside else twice
    with pytest.raises(DecouplingError, match=r"decoupled\.model"):
        dni_fx.decouple(model, ["body" if inside else "3"], example_inputs=(X,))
    dni_fx.decouple(decoupled.model, ["3"], example_inputs=(X,))


def test_functional_call_without_a_transform_trains_what_it_is_given() -> None:
    m = _made("zero")
    given = {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
    F.cross_entropy(torch.func.functional_call(m, given, (X,)), Y).backward()
    F.cross_entropy(m(X), Y).backward()
    for name, parameter in m.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad), name
