"""Plain values that a model's code sees are guards: each call equals the model, or is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_fx
from dni_fx.errors import TracingError
from dni_fx.graphs.variants import layouts_of
from dni_fx.passes.trace import held
from dni_fx.passes.trace.tracing import trace_calls

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with something between them that each test chooses."""

    def __init__(self, between: Callable[..., torch.Tensor], **attributes: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        result: torch.Tensor = self.b(self.between(self, h, x, *more))
        return result


def cut(model: nn.Module, *inputs: Any) -> dni_fx.Decoupled:
    return dni_fx.decouple(model, ["a"], example_inputs=inputs, gradients="exact")


def assert_equal(decoupled: dni_fx.Decoupled, *inputs: Any) -> None:
    assert torch.equal(decoupled(*inputs), decoupled.model(*inputs))


def assert_holds(model: nn.Module, *calls: tuple[Any, ...]) -> None:
    """Each call equals the model, in this order and back again."""
    decoupled = cut(model, *calls[0])
    for inputs in (*calls, *reversed(calls)):
        assert_equal(decoupled, *inputs)


def by_values(net: Net, h: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return h if mask.all() else h * mask


def by_equality(net: Net, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return h * 2 if torch.equal(x, y) else h


def by_shape_of_both(net: Net, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return h + 1 if x.is_same_size(y) else h * 3


def by_nonzero(net: Net, h: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return h if mask.nonzero().shape[0] > 2 else -h


def by_strides(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h if x.is_contiguous() else h * 2


def by_stride(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h / x.stride()[0]


def by_dtype(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h if h.dtype is torch.float32 else h * 2


def by_text(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h if str(x.shape[0]) in "468" else h * 2


MASKS = [torch.tensor(v)[:, None] for v in ([True] * 4, [True, False] * 2, [False] * 4)]


@pytest.mark.parametrize("decision", [by_values, by_nonzero], ids=lambda f: f.__name__)
def test_values_of_inputs_are_asked_before_each_call(decision: Any) -> None:
    assert_holds(Net(decision), *[(X, mask) for mask in MASKS])


def test_values_of_inputs_are_asked_of_a_model_traced_on_fake_tensors() -> None:
    wide = Net(by_values)
    wide.a, wide.b = nn.Linear(6, 700_000), nn.Linear(700_000, 3)
    assert_holds(wide, *[(X, mask) for mask in MASKS[:2]])


def test_two_inputs_compared() -> None:
    assert_holds(Net(by_equality), (X, X.clone()), (X, X + 1))
    assert_holds(Net(by_shape_of_both), (X, X.clone()), (X, X[:1]))


@pytest.mark.parametrize("decision", [by_strides, by_stride], ids=lambda f: f.__name__)
def test_strides_are_looked_at_though_the_shape_is_known(decision: Any) -> None:
    square = torch.randn(6, 6)
    assert_holds(Net(decision), (square,), (square.t(),))


def test_sizes_as_text() -> None:
    assert_holds(Net(by_text), (X,), (torch.randn(5, 6),), (torch.randn(8, 6),))


def test_a_dtype_that_autocast_decides() -> None:
    model = Net(by_dtype)
    decoupled = cut(model, X)
    assert_equal(decoupled, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(decoupled, X)
    assert_equal(decoupled, X)


def test_the_number_of_stored_values() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(graph, h) / graph._nnz()

    assert_holds(Net(between), (X, torch.eye(4).to_sparse()), (X, torch.ones(4, 4).to_sparse()))


def test_what_depends_on_parameters_is_refused_with_its_line() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h if torch.where(h[:, 0] > 0)[0].numel() else -h

    with pytest.raises(TracingError, match=r"test_guards\.py:\d+"):
        cut(Net(between), X)


def test_export_holds_for_the_shapes_that_it_saw() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = h * torch.FloatTensor([1, 2, 3, 4, 5, 6])
        return (h * 10 if x.shape[0] > 6 else h) / x.shape[0]

    model = Net(between)
    assert cut(model, X).plan.report.rung == "export"
    assert_holds(model, *[(torch.randn(n, 6),) for n in (4, 5, 8)])


# ---- attributes ----------------------------------------------------------------------------------


def scaled(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    value = net.held
    if isinstance(value, SimpleNamespace):
        value = value.inner["scale"]
    if isinstance(value, list):
        value = value[-1]
    return h * (2 if value == "twice" else 1) if isinstance(value, str) else h * value


ATTRIBUTES = {
    "number": (1.0, 2.0),
    "flag": (False, True),
    "text": ("once", "twice"),
    "tensor": (torch.ones(6), torch.arange(6.0)),
    "object": (SimpleNamespace(inner={"scale": 1.0}), SimpleNamespace(inner={"scale": 3.0})),
    "list": ([1, 2], [1, 3]),
    "tensor of another shape": (torch.ones(6), torch.ones(4, 1) * 2),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_attribute_that_changes_between_calls(kind: str) -> None:
    first, second = ATTRIBUTES[kind]
    model = Net(scaled, held=first)
    decoupled = cut(model, X)
    for value in (first, second, first):
        model.held = value
        assert_equal(decoupled, X)


def test_what_an_object_holds_changes_in_place() -> None:
    model = Net(scaled, held=SimpleNamespace(inner={"scale": 1.0}))
    decoupled = cut(model, X)
    model.held.inner["scale"] = 4.0
    assert_equal(decoupled, X)


def test_the_control_without_guards_on_attributes_goes_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(held.Reads, "attribute", lambda *args: None)
    model = Net(scaled, held=1.0)
    decoupled = cut(model, X)
    model.held = 2.0
    with pytest.raises(AssertionError):
        assert_equal(decoupled, X)


def test_training_with_annealing_equals_backpropagation() -> None:
    plain = Net(scaled, held=1.0)
    model, target = copy.deepcopy(plain), torch.arange(4) % 3
    sgd = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    trainer = dni_fx.Trainer(cut(model, X), F.cross_entropy, optimizer=sgd)
    optimizer = sgd(plain.parameters())
    for value in (1.0, 2.0, torch.full((6,), 0.5)):
        plain.held = model.held = value
        trainer.step(X, target=target)
        optimizer.zero_grad()
        F.cross_entropy(plain(X), target).backward()
        optimizer.step()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


@pytest.mark.parametrize("gradients", ["exact", "linear"])
def test_training_and_evaluation_see_the_same_attribute(gradients: str) -> None:
    model = dni_fx.decouple(
        Net(scaled, held=1.0), ["a"], example_inputs=(X,), gradients=gradients
    ).as_module()
    model.held = 10.0
    trained = model(X)
    model.eval()
    assert torch.equal(trained, model(X))


def test_an_attribute_that_nobody_reads_makes_no_new_graph() -> None:
    model = Net(scaled, held=1.0)
    decoupled = cut(model, X)
    for step in range(3):
        model.step = step
        assert_equal(decoupled, X)
    assert len(decoupled.graphs.variants) == 1


def test_tracing_again_and_again_is_said_once_with_its_reason() -> None:
    model = Net(scaled, held=0.0)
    decoupled = cut(model, X)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(30):
            model.held = float(step)
            assert_equal(decoupled, X)
    assert [str(w.message) for w in said if "'held'" in str(w.message)] != []
    assert len(said) == 1


def test_a_tensor_kept_from_call_to_call() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = h + net.memory
        net.memory = h.detach().mean(0)
        return h

    plain = Net(between, memory=torch.zeros(6))
    model = copy.deepcopy(plain)
    decoupled = cut(model, X)
    assert torch.equal(model.memory, plain.memory)
    for _ in range(3):
        assert torch.equal(decoupled(X), plain(X))
        assert torch.equal(model.memory, plain.memory)


def test_a_cut_between_the_read_and_the_write_of_a_kept_tensor_is_illegal() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.memory = nn.Linear(6, 6), nn.Linear(6, 6), torch.zeros(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.b(torch.tanh(self.a(x + self.memory)))
            self.memory = h.detach().mean(0)
            return torch.tanh(h) * 2

    points = {p.name: p for p in dni_fx.list_cut_points(Keeping(), (X,))}
    assert not points["a"].legal
    assert "self.memory" in points["a"].reason
    assert points["tanh_1"].legal


# ---- modules, modes, functions -------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


def test_a_hook_on_a_container_after_decoupling_runs() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3))
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(X,), gradients="exact")
    handle = model[1].register_forward_hook(lambda module, args, output: output * 0.5)
    assert_equal(decoupled, X)
    handle.remove()
    assert_equal(decoupled, X)


def test_a_forward_that_is_replaced_is_called() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3))
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(X,), gradients="exact")
    model[1].forward = lambda x: x * 2
    assert_equal(decoupled, X)


def by_grad_mode(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 3 if torch.is_grad_enabled() else h


def by_requires_grad(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * 3 if h.requires_grad else h


@pytest.mark.parametrize("decision", [by_grad_mode, by_requires_grad], ids=lambda f: f.__name__)
def test_grad_mode(decision: Any) -> None:
    decoupled = cut(Net(decision), X)
    assert_equal(decoupled, X)
    with torch.no_grad():
        assert_equal(decoupled, X)
        assert_equal(decoupled, X)
    assert_equal(decoupled, X)
    assert len(decoupled.graphs.variants) == 2


def test_an_argument_whose_content_changes() -> None:
    options = SimpleNamespace(scale=1.0)
    decoupled = cut(Net(lambda net, h, x, o: h * o.scale), X, options)
    for options.scale in (1.0, 2.0, 1.0):
        assert_equal(decoupled, X, options)


@pytest.mark.parametrize("make", [list, lambda: SimpleNamespace(entries=[])])
def test_writing_into_an_argument_is_refused_by_its_name(make: Any) -> None:
    class Filling(Net):
        def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:  # type: ignore[override]
            h = torch.tanh(self.a(x))
            (cache if isinstance(cache, list) else cache.entries).append(h)
            result: torch.Tensor = self.b(h)
            return result

    with pytest.raises(TracingError, match="argument 'cache'"):
        cut(Filling(scaled), X, make())


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clamp(-1.0, 1.0)


clip = Clip.apply  # the usual idiom, bound before anything is recorded


def test_a_custom_function_called_by_an_alias_keeps_its_backward() -> None:
    plain = Net(lambda net, h, x: clip(h))
    model = copy.deepcopy(plain)
    decoupled = cut(model, X)
    assert decoupled.plan.report.rung == "calls"
    large = lambda output, _: output.square().mean() * 1e4  # noqa: E731
    trainer = dni_fx.Trainer(decoupled, large, optimizer=lambda p: torch.optim.SGD(p, 1e-2))
    trainer.step(X)
    optimizer = torch.optim.SGD(plain.parameters(), 1e-2)
    large(plain(X), None).backward()
    optimizer.step()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


def test_an_alias_is_the_function_again_after_a_trace() -> None:
    code = torch.autograd.Function.apply.__func__.__code__
    trace_calls(Net(lambda net, h, x: clip(h)), (X,), {})
    assert torch.autograd.Function.apply.__func__.__code__ is code
    x = X.clone().requires_grad_()
    (clip(x) * 5).sum().backward()
    assert x.grad is not None
    assert x.grad.max() == 1.0


def test_two_functions_of_one_name_are_two() -> None:
    def make(factor: float) -> Any:
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * factor

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
                return gradients[0] * factor

        return Scale

    once, twice = make(1.0), make(2.0)
    decision = lambda net, h, x: (once if net.training else twice).apply(h)  # noqa: E731
    model = Net(decision)
    decoupled = cut(model, X)
    for mode in (True, False, True):
        model.train(mode)
        assert_equal(decoupled, X)


# ---- globals -------------------------------------------------------------------------------------

FACTOR = 1.0
SETTINGS = {"shift": 0.0}


def shifted(h: torch.Tensor) -> torch.Tensor:
    return h + SETTINGS["shift"]


class Global(Net):
    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        result: torch.Tensor = self.b(shifted(torch.tanh(self.a(x))) * FACTOR)
        return result


def test_globals_that_forward_and_its_helpers_refer_to(monkeypatch: pytest.MonkeyPatch) -> None:
    decoupled = cut(Global(scaled), X)
    assert_equal(decoupled, X)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert_equal(decoupled, X)
    monkeypatch.setitem(SETTINGS, "shift", 1.0)
    assert_equal(decoupled, X)


# ---- modules that are written to from outside ----------------------------------------------------


class Neuron(nn.Module):
    """Keeps a state between calls, so that it is one opaque node."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state.shape != x.shape:
            self.state = torch.zeros_like(x)
        self.state = 0.9 * self.state + x
        return self.state.sigmoid()


class Resetting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.neuron, self.b = nn.Linear(6, 6), Neuron(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.neuron.state = torch.zeros_like(x)
        return self.b(self.neuron(self.a(x)))


def test_a_write_into_an_opaque_module_happens_in_every_call() -> None:
    model = Resetting()
    plain = copy.deepcopy(model)
    decoupled = cut(model, X)
    for x in (X, X, X[:2]):
        assert torch.equal(decoupled(x), plain(x))


def test_in_a_submodule_such_a_write_is_inside_one_opaque_node() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Resetting(), nn.Linear(3, 3))
    plain = copy.deepcopy(model)
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(X,), gradients="exact")
    for _ in range(2):
        assert torch.equal(decoupled(X), plain(X))


def test_a_tensor_equals_itself() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h * 2 if torch.equal(h, h) else h

    assert_holds(Net(between), (X,), (X[:2],))


def test_requires_grad_that_is_assigned() -> None:
    def between(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        leaf = x.clone()
        leaf.requires_grad = True  # as feature extractors do before checkpoints
        return h + leaf

    assert_holds(Net(between), (X,), (X[:2],))


# ---- what is asked in a region of the model's own ------------------------------------------------


def kind_in_a_region(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        made = F.linear(h, net.a.weight)
    return h * 2 if made.dtype == torch.bfloat16 else h


def value_in_a_region(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        coarse = x.mm(x.t())
    return h * 2 if (coarse > 4).any() else h


def value_from_outside(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    fine = x.mm(x.t())
    with torch.autocast("cpu", torch.bfloat16):
        is_larger = bool((fine > 4).any())
    return h * 2 if is_larger else h


def test_a_graph_holds_for_other_sizes_though_a_region_made_the_kind() -> None:
    decoupled = cut(Net(kind_in_a_region), X)
    assert decoupled.has_graph_for(torch.randn(7, 6))
    assert_equal(decoupled, torch.randn(7, 6))


@pytest.mark.parametrize("between", [value_in_a_region, value_from_outside])
@pytest.mark.parametrize("first", [4.0, 4.0078125, 4.03125])  # the second is 4 in half precision
def test_values_are_computed_in_the_region_that_they_belong_to(
    between: Callable[..., torch.Tensor], first: float
) -> None:
    def x_of(square: float) -> torch.Tensor:
        x = torch.zeros(1, 6)
        x[0, :2] = torch.tensor([2.0, (square - 4) ** 0.5])
        return x

    model = Net(between)
    assert between(model, torch.ones(1), x_of(4.0078125)) == 1 + (between is value_from_outside)
    assert_holds(model, *((x_of(square),) for square in (first, 4.0, 4.0078125, 4.03125)))


def test_autocast_of_the_accelerator_counts_as_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = "current_accelerator"
    monkeypatch.setattr(torch.accelerator, asked, lambda **_: torch.device("cuda"))
    before = layouts_of([X])
    for kind in ("cpu", "cuda"):
        was = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, not was)
        try:
            assert layouts_of([X]) != before
        finally:
            torch.set_autocast_enabled(kind, was)
    assert layouts_of([X]) == before
