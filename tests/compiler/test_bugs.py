"""One test for every bug that was found and mended: what broke, and why."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import CutError
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


def test_size_one_buffers_survive_tracing() -> None:
    """Fake tensors pass writes to one-element tensors on to the real ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(3, 4),))
    assert int(model[1].num_batches_tracked) == 0


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


def test_modes_that_differ_in_a_constant_only() -> None:
    """Graphs were taken for equal whose plain tensor attributes were not."""

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            self.scales = (torch.ones(4), torch.full((4,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) * (self.scales[0] if self.training else self.scales[1]))

    model, x = Switched(), torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    decoupled.eval()
    assert_bits_equal(decoupled(x), model(x), "evaluation")


def test_a_function_named_like_a_module() -> None:
    """``F.relu`` next to a module ``relu`` left a value without a name."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.b(F.relu(self.a(x))))

    model, x = Both(), torch.randn(3, 4)
    names = [p.name for p in dni_fx.list_cut_points(model, (x,)) if p.legal]
    for name in names[:-1]:
        dni_fx.decouple(model, [name], example_inputs=(x,))
    assert len(names) == len(set(names))


def test_autocast_is_as_before_after_a_failure_inside_a_region() -> None:
    """A stage that failed within its own autocast region left it open, and stale casts in the
    cache.
    """

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fail = nn.Linear(4, 4), nn.Linear(4, 2), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu"):
                return self.b(self.a(x).view(-1, 2, 2).flatten(1)).float()

    model = Failing()
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(torch.randn(3, 4),))
    model.b.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with contextlib.suppress(RuntimeError):
        decoupled(torch.randn(3, 4))
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    assert not torch.is_autocast_enabled("cpu")


def test_caches_are_emptied_after_tracing() -> None:
    """A dictionary that forward fills kept traced sizes as keys."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, torch.Tensor] = {}
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            if n not in self.cache:
                self.cache[n] = torch.ones(n, 1)
            return self.b(self.a(x) * self.cache[n])

    model = Caching()
    dni_fx.decouple(model, ["a"], example_inputs=(torch.randn(3, 4),))
    assert model.cache == {}


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


def test_a_small_model_that_spares_fake_tensors_its_questions_is_looked_into() -> None:
    """Attention masks are skipped if nothing is padded, which only real tensors are asked; those
    came first and last.

    Small models are run on real tensors, and the whole encoder became one opaque node.
    """

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            unpadded = not isinstance(mask, torch._subclasses.FakeTensor) and bool(mask.all())
            for layer in self.layers:
                x = torch.tanh(layer(x if unpadded else x * mask))
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x, mask))

    model, x = Model(), torch.randn(3, 4)
    cuts = [f"encoder.layers.{i}" for i in range(3)]
    decoupled = dni_fx.decouple(model, cuts, example_inputs=(x, torch.tensor([1.0, 1.0, 1.0, 0.0])))
    assert len(decoupled.stages) == 4
    for mask in (torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4)):
        torch.testing.assert_close(decoupled(x, mask), model(x, mask), rtol=0, atol=0)


def test_hooks_that_a_first_call_installs_are_taken_off_again() -> None:
    """A module that hooks itself up at its first call did so in every trial of the tracer, for
    good.
    """

    class Collector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.hooked = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []
            if not self.hooked:
                for layer in self.layers:
                    layer.register_forward_hook(
                        lambda module, _, output: module.found.append(output)
                    )
                self.hooked = True
            for layer in self.layers:
                object.__setattr__(layer, "found", found)
                x = layer(x)
            return torch.stack(found).sum(0)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Collector(), nn.Linear(4, 2))

    x, cut, plain = torch.randn(3, 4), model(), model()
    dni_fx.decouple(cut, ["0"], example_inputs=(x,))
    assert not any(m._forward_hooks for m in cut.modules())
    assert torch.equal(cut(x), plain(x))
    with pytest.raises(
        CutError,
        match=r"'0\.layers\.1': lies in '0', which is one opaque node: .*call the model once",
    ):
        dni_fx.decouple(model(), ["0.layers.1"], example_inputs=(x,))


def test_weights_cast_while_tracing_are_not_kept() -> None:
    """Autocast keeps cast weights: a run after a trace on fake tensors was given fake ones."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            unpadded = not isinstance(mask, torch._subclasses.FakeTensor) and bool(mask.all())
            return x if unpadded else x * mask

    model, x, mask = Model(), torch.randn(3, 4), torch.tensor([1.0, 1.0, 1.0, 0.0])
    with torch.autocast("cpu", torch.bfloat16):
        model(x, mask)
        decoupled = dni_fx.decouple(model, ["layers.0", "layers.1"], example_inputs=(x, mask))
        assert torch.is_autocast_cache_enabled()
        found, wanted = (
            torch.autograd.grad(f(x, mask).sum(), list(model.parameters()))
            for f in (decoupled, model)
        )
    assert len(decoupled.stages) == 3
    assert all(map(torch.equal, found, wanted))


def test_a_value_in_a_formatted_string_is_read() -> None:
    """An expert chosen by ``f"expert_{index}"`` was the example's for every input."""

    class Experts(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[f"expert_{x.sum().gt(0).long()}"](x)

    torch.manual_seed(0)
    experts = Experts({f"expert_{i}": nn.Linear(4, 4) for i in range(2)})
    model, x = nn.Sequential(nn.Identity(), experts, nn.Linear(4, 2)), torch.ones(3, 4)
    decoupled = dni_fx.decouple(model, ["1"], example_inputs=(x,))
    for inputs in (x, -x):
        assert torch.equal(decoupled(inputs), model(inputs))
