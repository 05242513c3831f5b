"""What code refers to outside of a model, what a model is made of, and what export would bake in
are guards: each call equals the model, or is refused. All were found by hostile programs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import is_grad_enabled, nn

import dni_fx
from dni_fx.errors import TracingError
from dni_fx.graphs.pictures import picture

from .test_guards import Block, Net, X, assert_equal, assert_holds, cut

SETTINGS = types.SimpleNamespace(scale=1.0)
LIBRARY = types.ModuleType("settings_of_somebody")
LIBRARY.scale = 1.0  # type: ignore[attr-defined]


class Options:
    scale = 1.0


class Helper:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0

    def use(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale


HELPER = Helper()


def scaled_by_default(h: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return h * by


def change_default(value: float) -> None:
    scaled_by_default.__defaults__ = (value,)


OUTSIDE: dict[str, tuple[Callable[..., Any], Callable[[float], None]]] = {
    "object": (lambda net, h, x: h * SETTINGS.scale, lambda v: setattr(SETTINGS, "scale", v)),
    "class": (lambda net, h, x: h * Options.scale, lambda v: setattr(Options, "scale", v)),
    "helper": (lambda net, h, x: HELPER.use(h), lambda v: setattr(HELPER, "scale", v)),
    "module": (lambda net, h, x: h * LIBRARY.scale, lambda v: setattr(LIBRARY, "scale", v)),
    "default": (lambda net, h, x: scaled_by_default(h), change_default),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_code_refers_to(kind: str) -> None:
    between, change = OUTSIDE[kind]
    decoupled = cut(Net(between), X)
    for value in (2.0, 3.0, 1.0):
        change(value)
        assert_equal(decoupled, X)


def test_closures() -> None:
    factor = 1.0
    decoupled = cut(Net(lambda net, h, x: h * factor), X)
    factor = 2.0
    assert_equal(decoupled, X)


HELD: dict[str, tuple[Any, Callable[..., Any], Callable[[Any], Any]]] = {
    "slots": (Helper, lambda net, h, x: h * net.held.scale, lambda o: setattr(o, "scale", 2.0)),
    "partial": (
        lambda: functools.partial(scaled_by_default, by=1.0),
        lambda net, h, x: net.held(h),
        lambda f: f.keywords.update(by=2.0),
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_objects_that_change_in_place(kind: str) -> None:
    make, between, change = HELD[kind]
    model = Net(between, held=make())
    decoupled = cut(model, X)
    change(model.held)
    assert_equal(decoupled, X)


def test_attributes_that_are_asked_for_before_they_are_there() -> None:
    model = Net(lambda net, h, x: h * getattr(net, "extra", 1.0))
    decoupled = cut(model, X)
    model.extra = 2.0
    assert_equal(decoupled, X)
    del model.extra
    assert_equal(decoupled, X)


def test_the_mode_of_a_module_that_is_called_as_a_whole() -> None:
    model = Net(lambda net, h, x: h * 2 if net.other.training else h, other=nn.Dropout(0.5))
    decoupled = cut(model, X)
    model.other.eval()
    assert_equal(decoupled, X)


# ---- what a model is made of ---------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layers: Any = nn.ModuleList([Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        for layer in self.layers:
            h = layer(h)
        result: torch.Tensor = self.b(h) * len(self.layers)
        return result


class Half(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h / 2


def test_children_are_added_exchanged_and_taken_away() -> None:
    model = Layers()
    decoupled = cut(model, X)
    model.layers.append(Half())
    assert_equal(decoupled, X)
    model.layers[1] = nn.Tanh()
    assert_equal(decoupled, X)
    del model.layers[1:]  # makes a new table
    assert_equal(decoupled, X)
    model.layers.append(Half())
    assert_equal(decoupled, X)
    model.layers = nn.ModuleList([Half()])
    assert_equal(decoupled, X)


def test_methods_and_classes_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    decoupled = cut(model, X)
    monkeypatch.setattr(Block, "forward", lambda self, h: h * 3)
    assert_equal(decoupled, X)
    model.layers[0].__class__ = Half
    assert_equal(decoupled, X)


def test_a_replaced_parameter_of_a_leaf_is_trained() -> None:
    model = Layers()
    decoupled = cut(model, X)
    trainer = dni_fx.Trainer(decoupled, lambda out, _: out.square().mean(),
                             optimizer=lambda p: torch.optim.SGD(p, 0.1))  # fmt: skip
    trainer.step(X)
    model.a.weight = nn.Parameter(torch.ones(6, 6) / 6)
    trainer.step(X)
    assert not torch.equal(model.a.weight, torch.ones(6, 6) / 6)


def test_the_dtype_of_parameters() -> None:
    model = Net(lambda net, h, x: h * 2 if h.dtype is torch.float64 else h)
    model.forward = types.MethodType(  # type: ignore[method-assign]
        lambda net, x: net.b(net.between(net, net.a(x.to(net.a.weight.dtype)), x)), model
    )
    decoupled = cut(model, X)
    model.double()
    assert_equal(decoupled, X)


# ---- tensors and modes ---------------------------------------------------------------------------


def test_one_tensor_given_twice() -> None:
    between = lambda net, h, x, y: h * 2 if x is y else h + y.sum()  # noqa: E731
    assert_holds(Net(between), (X, X), (X, X.clone()))


@pytest.mark.parametrize("look", [lambda x: x.is_contiguous(), lambda x: x.storage_offset() == 6])
def test_the_layout_of_an_input_that_is_part_of_another(look: Any) -> None:
    wide = torch.randn(9, 6)
    between = lambda net, h, x: h * 2 if look(x) else h  # noqa: E731
    assert_holds(Net(between), (wide[::2][:4],), (wide[1:5],), (X,), (X[:1].expand(4, 6),))


def test_a_function_that_gives_back_its_argument_in_some_calls() -> None:
    """Under autocast ``to`` is an identity, and both names lead to one tensor."""
    decoupled = cut(Net(lambda net, h, x: net.a(h) + net.a(h).to(torch.bfloat16).to(h.dtype)), X)
    between = Net(lambda net, h, x: (k := net.a(h)).to(torch.bfloat16).to(k.dtype) - k)
    for each in (decoupled, cut(between, X)):
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled):
                assert_equal(each, X)


def test_an_opaque_module_that_gives_back_its_argument_in_some_calls() -> None:
    class Sometimes(nn.Module):
        def forward(self, h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return h + 1 if keep.float().sum().item() > 1 else h

    model = Net(lambda net, h, x, keep: h - net.other(h, keep), other=Sometimes())
    assert_holds(model, (X, torch.zeros(4)), (X, torch.ones(4)))


def by_alias(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 3 if is_grad_enabled() else h


def by_grad_fn(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 3 if h.grad_fn is None else h


def with_gradients(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        k = h.detach().requires_grad_()
        (g,) = torch.autograd.grad(k.square().sum(), k)
    return h + g


def by_constant(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = h * torch.FloatTensor([1, 2, 3, 4, 5, 6])
    return by_grad_fn(net, h, x) if x.requires_grad else h


@pytest.mark.parametrize("decision", [by_alias, by_grad_fn, with_gradients, by_constant])
def test_grad_mode_asked_in_other_ways(decision: Any) -> None:
    decoupled = cut(Net(decision), X)
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            assert_equal(decoupled, X)


def test_whether_a_parameter_has_a_gradient() -> None:
    model = Net(lambda net, h, x: h if net.a.weight.grad is None else h * 2)
    decoupled = cut(model, X)
    model.a.weight.grad = torch.ones(6, 6)
    assert_equal(decoupled, X)


def test_regions_are_part_of_a_graph() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, net.training):
            return torch.mm(h, torch.ones(6, 6)).float()

    model = Net(between)
    decoupled = cut(model, X)
    for mode in (True, False, True):
        model.train(mode)
        assert_equal(decoupled, X)


def test_pictures_tell_parts_apart() -> None:
    """By what they hold, and by which of two alike it is that comes again."""
    first, other = [functools.partial(max, k) for k in (1, 2)]
    assert picture([first, other]) != picture([first, functools.partial(max, 3)])
    one, two = [1.0], [2.0]
    assert picture([one, two, one]) != picture([one, two, two])


class First(nn.Module):
    """Makes an attribute in its first call."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.scale = 2.0
        self.rows = len(h)
        return h * self.scale


def test_what_a_first_call_makes_is_made_by_the_stages() -> None:
    model = Net(lambda net, h, x: net.block(h), block=First())
    decoupled = cut(model, X)
    assert "opaque" not in str(decoupled.plan)
    assert not hasattr(model.block, "scale")
    output = decoupled(X)
    assert (model.block.scale, model.block.rows) == (2.0, len(X))
    assert torch.equal(output, model(X))
    model.block.scale = 3.0
    assert_equal(decoupled, X)
    decoupled(X[:2])
    assert (model.block.scale, model.block.rows) == (3.0, 2)


def test_what_is_kept_is_written_in_whatever_stage_writes_it() -> None:
    """A tensor that a module keeps is read by each stage, and none writes to a copy."""

    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        net.held.add_(1)
        return h * net.held

    decoupled = dni_fx.decouple(
        Net(between, held=torch.zeros(())), ["a", "mul"], example_inputs=(X,), gradients="exact"
    )
    for calls in (1, 2, 3):
        decoupled(X)
        assert decoupled.model.held == calls


# ---- export --------------------------------------------------------------------------------------


def exported(net: Net, h: torch.Tensor) -> torch.Tensor:
    return h * torch.FloatTensor([1, 2, 3, 4, 5, 6])


def test_export_holds_what_its_code_read() -> None:
    model = Net(lambda net, h, x: exported(net, h) * net.held * SETTINGS.scale, held=1.0)
    decoupled = cut(model, X)
    assert decoupled.plan.report.rung == "export"
    model.held = 2.0
    assert_equal(decoupled, X)
    SETTINGS.scale = 3.0
    assert_equal(decoupled, X)
    SETTINGS.scale = 1.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale * SETTINGS.scale


def test_export_holds_what_a_block_read() -> None:
    """While it is exported a block is called by export itself, through a stand-in."""
    model = Net(lambda net, h, x: net.block(exported(net, h)), block=Scaled())
    decoupled = cut(model, X)
    assert decoupled.plan.report.rung == "export"
    model.block.scale = 2.0
    assert_equal(decoupled, X)
    SETTINGS.scale = 3.0
    assert_equal(decoupled, X)
    SETTINGS.scale = 1.0
    model.block.register_forward_hook(lambda module, args, output: output * 2)
    assert_equal(decoupled, X)


TABLE = torch.ones(6)


def test_a_global_tensor_is_read_in_every_call() -> None:
    global TABLE
    decoupled = cut(Net(lambda net, h, x: h * TABLE), X)
    assert decoupled.plan.report.rung == "calls"
    TABLE.fill_(2.0)
    assert_equal(decoupled, X)
    TABLE = torch.full((6,), 3.0)
    assert_equal(decoupled, X)


class Asks(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * 2 if h._is_view() else h + 1


def test_a_module_that_asks_where_its_input_comes_from_is_refused() -> None:
    """A stage's input is a view, whatever the model's value is."""
    with pytest.raises(TracingError, match="history"):
        cut(Net(lambda net, h, x: net.block(h), block=Asks()), X)


def keeps(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    net.held.append(h.detach().sum())
    return exported(net, h)


def counts(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = exported(net, h)
    COUNTS.append(len(COUNTS))
    return h


COUNTS: list[int] = []


def hooks(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return exported(net, h)


@pytest.mark.parametrize("between", [keeps, counts, hooks])
def test_export_refuses_what_it_would_lose(between: Any) -> None:
    with pytest.raises(TracingError):
        dni_fx.decouple(
            Net(between, held=[]), ["a"], example_inputs=(X,), gradients="exact", check=False
        )


def texts(net: Net, h: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return exported(net, h) * len(str(lengths.tolist()))


def test_export_does_not_hold_text_of_what_it_keeps_symbolic() -> None:
    """Export's numbers have names: as text, '[u0, u1]' is what code would see."""
    model = Net(texts)
    with pytest.raises(TracingError, match="text of a number"):
        dni_fx.decouple(
            model, ["a"], example_inputs=(X, torch.tensor([2, 3])), gradients="exact", check=False
        )
