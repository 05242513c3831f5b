"""One test for every bug of cutting and training that was found and mended: what broke, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.runtime.emitted import Leaf

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal
from ..models.zoo import BY_NAME


def test_an_interface_named_like_a_module_method() -> None:
    """A cast makes a node ``to``, which a module table refuses as a key."""
    case = BY_NAME["autocast_inside"]
    model = case.build(torch.float32)
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(model, ["to"], example_inputs=args, example_kwargs=kwargs)
    assert "to" in decoupled.sources
    assert decoupled.stages[0].step is not None


def test_masked_logits_may_cross_a_cut() -> None:
    """Minus infinity is a value like any other in front of a softmax; it was taken for a
    failure.
    """

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.a(x).masked_fill(torch.eye(4, dtype=torch.bool), float("-inf"))
            return self.b(logits.softmax(-1))

    decoupled = dni_fx.decouple(
        Masked(), ["masked_fill"], example_inputs=(torch.randn(4, 4),), gradients="exact"
    )
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    assert trainer.step(torch.randn(4, 4), target=torch.tensor([0, 1, 1, 0])).loss.isfinite()


def test_cuts_that_coincide_in_evaluation_mode() -> None:
    """A drop that is the identity in evaluation mode left two cuts at one place."""
    case = BY_NAME["row_drop"]
    model = case.build(torch.float32)
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        model, ["relu", "drop@0"], example_inputs=args, example_kwargs=kwargs
    )
    decoupled.eval()
    torch.testing.assert_close(decoupled(*args, **kwargs), model(*args, **kwargs))


def test_a_source_that_cannot_run_without_data() -> None:
    """The plan asks for a source's cost on the meta device; a source of the user's own may not run
    there.
    """

    class Stubborn(dni_fx.GradientSource):
        def predict(self, values, context=None):  # type: ignore[no-untyped-def]
            from dni_fx.sources import Prediction

            return Prediction((torch.full_like(values[0], float(values[0].sum()) * 0.0),))

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    decoupled = dni_fx.decouple(
        model, ["1"], example_inputs=(torch.randn(3, 4),), gradients=Stubborn
    )
    assert "?" in str(decoupled.plan)


def test_gradients_keep_their_layout() -> None:
    """``.grad`` takes its tensor's strides; later sums then run in another order than
    backpropagation's.
    """
    leaf = Leaf(torch.randn(3, 4).t(), keep_layout=True)
    gradient = torch.randn(4, 3)
    leaf.view().backward(gradient)
    found = leaf.gradient()
    assert found is not None
    assert found.stride() == gradient.stride()


def test_parameters_of_every_mode_are_trained() -> None:
    """A trainer made after a call in evaluation mode left the auxiliary head without an
    optimiser.
    """

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            return self.head(h) + self.aux(h) if self.training else self.head(h)

    model = Auxiliary()
    x = torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    decoupled.eval()(x)
    decoupled.train()
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    owned = {p for o in trainer.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert owned == set(model.parameters())


def test_a_value_named_loss() -> None:
    """Exact mode keeps the loss's own gradient under that name, which a submodule may have as
    well.
    """

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.loss, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            return self.b(h) + self.loss(h).sum(1, keepdim=True)

    model, x, y = WithLoss(), torch.randn(3, 4), torch.tensor([0, 1, 1])
    F.cross_entropy(model(x), y).backward()
    want = [p.grad for p in model.parameters()]
    decoupled = dni_fx.decouple(model, ["relu", "loss"], example_inputs=(x,), gradients="exact")
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.0)
    )
    trainer.step(x, target=y)
    assert_bits_equal([p.grad for p in model.parameters()], want, "exact")


def test_a_frozen_module_used_twice_before_a_later_stage() -> None:
    """The pull-back that is repeated for shared parameters asked autograd for the gradient of a
    frozen one.
    """

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.b = (
                nn.Linear(4, 4),
                nn.Linear(4, 4).requires_grad_(False),
                nn.Linear(4, 4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.b(self.shared(self.shared(self.a(x))))
            return self.shared(h)

    model = Frozen()
    decoupled = dni_fx.decouple(
        model, ["b"], example_inputs=(torch.randn(3, 4),), gradients="linear"
    )
    assert decoupled.graphs.variant.split.reused
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    for _ in range(2):
        trainer.step(torch.randn(3, 4), target=torch.tensor([0, 1, 3]))
    assert all(p.grad is None for p in model.shared.parameters())
    assert all(p.grad is not None for p in model.a.parameters())


def test_views_whose_history_a_write_rebuilt_cross_no_cut_together() -> None:
    """Autograd rebuilds a view's history after a write: three partial gradients then add up in
    another order.
    """

    class Rebuilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole = self.a(x)
            part = whole[..., :2]
            part[:, 0] = torch.relu(part)[:, -1]
            return self.b(whole + whole), part

    points = {p.name: p for p in dni_fx.list_cut_points(Rebuilt(), (torch.randn(3, 4),))}
    assert "share memory" in points["after"].reason
    assert points["a"].legal


def test_a_value_that_only_dead_code_uses_is_no_interface() -> None:
    """Its source sent zeros where backpropagation sends nothing, and the sum had another memory
    layout.
    """

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c, self.head = (
                nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            second = self.norm(first)
            third = self.b(second)
            self.c(third), self.c(second)
            return self.head(torch.cat([second, first, third.detach().mean() + second[:, :0]], -1))

    decoupled = dni_fx.decouple(
        Dead(), ["b"], example_inputs=(torch.randn(3, 4),), gradients="stale"
    )
    assert [i.name for i in decoupled.interfaces] == ["a", "norm"]
    assert decoupled.plan.report is not None
    assert decoupled.plan.report.plain == ("b",)
    result = decoupled.stages[0].step(decoupled.bind(torch.randn(3, 4)))
    assert not result.outputs["b"].requires_grad
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    trainer.step(torch.randn(3, 4), target=torch.tensor([0, 1, 1]))
    assert decoupled.model.get_parameter("b.weight").grad is None


def test_writes_through_a_view_of_a_value_with_other_uses() -> None:
    """Autograd adds three partial gradients at the base; a cut between them would add two of them
    first.
    """

    class ThroughView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            base = self.a(x)
            view = base.view(-1, 2, 2)
            other = base - 1
            return self.head(view.add_(view).flatten(1)), other

    points = {p.name: p for p in dni_fx.list_cut_points(ThroughView(), (torch.randn(3, 4),))}
    assert "share memory" in points["sub"].reason

    class UsedTwiceBefore(ThroughView):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            part = self.a(x)[..., :2]
            twice = part + part
            return part.add_(self.head(self.a(torch.cat([twice, twice], -1)))), twice

    points = {p.name: p for p in dni_fx.list_cut_points(UsedTwiceBefore(), (torch.randn(3, 4),))}
    assert "share memory" in points["add"].reason


def test_a_value_without_gradient_that_a_later_write_gives_one() -> None:
    """``requires_grad`` was read when tracing was over, after the write."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.a(x)
            with torch.no_grad():
                value = self.frozen(x)
            square = value * value
            return self.head(value.add_(h)), square

    decoupled = dni_fx.decouple(
        Late(), ["frozen"], example_inputs=(torch.randn(3, 4),), gradients="exact"
    )
    assert [i.name for i in decoupled.interfaces] == ["a"]
    trainer = dni_fx.Trainer(
        decoupled,
        lambda out, _: out[0].sum() + out[1].sum(),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    trainer.step(torch.randn(3, 4))


def test_two_writes_through_a_view_behind_a_cut() -> None:
    """The later stage writes to a copy, which is no view: no history is rebuilt, and sums run in
    another order.
    """

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            part = self.a(x)[..., :2]
            once = part.add_(part)
            copy = once.reshape(-1, 2, 1).clone()
            return self.head(once.add_(once)), copy

    points = {p.name: p for p in dni_fx.list_cut_points(Twice(), (torch.randn(3, 4),))}
    assert "share memory" in points["getitem"].reason


@pytest.mark.parametrize(
    "take", [lambda x: x.unbind(1), lambda x: x.split(1, 1), lambda x: list(x.chunk(x.size(1), 1))]
)
def test_another_number_of_parts_is_another_graph(take: Any) -> None:
    """What ``unbind`` and the like return was taken to be of the same number for every input."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(x.shape[0], 3)
            for part in take(x):
                total = torch.tanh(self.inner(part.reshape(-1, 3)) + total)
            return self.outer(total)

    model = Steps()
    decoupled = dni_fx.decouple(model, cuts=["inner"], example_inputs=(torch.randn(4, 3, 3),))
    for length in (3, 5, 2, 3):
        x = torch.randn(4, length, 3)
        assert torch.equal(decoupled(x), model(x))
