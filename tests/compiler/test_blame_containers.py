"""Containers: those that a callee changes, that hold tensors as arguments, and that are inputs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.passes.trace import interpreting

from ..helpers.comparing import assert_bits_equal


class Doubled(torch.autograd.Function):
    """Writes into its argument in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        options["seen"] = len(options)
        options["list"].append(1)
        ctx.options = options
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.options["back"] = True
        return gradient * 2, None


class Opaque(nn.Module):
    """Called as a whole, since it reads values; changes its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, options: dict[Any, Any]) -> Tensor:
        options["scale"] = 2.0 if x.sum().item() > -1e9 else 0.0
        options.pop("m")
        options[0] = "a number as a key"
        result: Tensor = self.layer(x) * options["scale"]
        return result


class Outer(nn.Module):
    """Hands a dict to a function and to an opaque module, and reads it afterwards."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), Opaque(), nn.Linear(8, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "function":
            h = Doubled.apply(h, {"m": 1, "list": []})
        elif self.how == "module":
            h = self.b(h, {"m": 1, "list": [], 3: 4})
        else:
            options: dict[Any, Any] = {"m": 1, "list": []}
            h = self.b(Doubled.apply(h, options), options)
            h = h * options["scale"] * options["seen"] * len(options["list"])
        result: Tensor = self.c(h)
        return result


def assert_same_step(model: nn.Module, cuts: Any, x: Any, **kwargs: Any) -> dni_fx.Decoupled:
    """The stages' output and gradients are the model's, bit for bit."""
    args = x if isinstance(x, tuple) else (x,)
    how = {"cuts": cuts} if isinstance(cuts, list) else {"stages": cuts}
    decoupled = dni_fx.decouple(model, example_inputs=args, gradients="exact", **how, **kwargs)
    results = []
    for called in (model, decoupled):
        model.zero_grad()
        output = called(*args)
        output.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"output": output, **grads})
    assert_bits_equal(results[1], results[0], "step")
    return decoupled


@pytest.mark.parametrize("how", ["function", "module", "read afterwards"])
@pytest.mark.parametrize("cuts", [3, ["a"]], ids=["search", "named"])
def test_containers_that_a_callee_changes(how: str, cuts: Any) -> None:
    decoupled = assert_same_step(Outer(how), cuts, torch.randn(4, 8))
    assert decoupled.plan.report.rung != "export"
    assert_bits_equal(decoupled(torch.ones(2, 8)), decoupled.model(torch.ones(2, 8)), "again")
    assert any("a list or dict that it is given" in n for n in decoupled.plan.report.notes)


def test_frozen_containers_reach_a_callee_as_they_are_in_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: fx's own containers, which cannot be changed."""
    monkeypatch.setattr(interpreting, "_own", lambda value: value)
    with pytest.raises(TypeError, match="does not support mutation"):
        dni_fx.plan_cuts(Outer("function"), (torch.randn(4, 8),), stages=3, costs="measured")


class Collects(nn.Module):
    """Puts a tensor into the list that it is given: its output, or one that only it knows."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.layer, self.own = nn.Linear(8, 8), own

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        h: Tensor = self.layer(x)
        if h.sum().item() > -1e9:
            found.append(h.tanh() if self.own else h)
        return h


class Collecting(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), Collects(own), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        h = self.b(self.a(x), found)
        result: Tensor = self.c(h + found[0])
        return result


def test_tensors_that_an_opaque_module_puts_into_a_list() -> None:
    assert_same_step(Collecting(own=False), ["b"], torch.randn(4, 8))
    inner = nn.Sequential(nn.Linear(8, 8), Collecting(own=True), nn.Linear(3, 3))
    decoupled = assert_same_step(inner, ["0"], torch.randn(4, 8))
    assert "'1' is one opaque node" in "".join(decoupled.plan.report.notes)
    with pytest.raises(DecouplingError, match=r"put into a list that is an argument.*\.py:\d+"):
        dni_fx.decouple(Collecting(own=True), ["a"], example_inputs=(torch.randn(4, 8),))


# ---- containers that hold tensors, as arguments --------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Fields:
    first: Tensor
    count: int = 2

    def total(self) -> Tensor:
        return self.first * self.count


class Batch(collections.UserDict):  # type: ignore[type-arg]
    """What tokenisers return."""


class Keyed(dict):  # type: ignore[type-arg]
    def total(self) -> Tensor:
        total: Tensor = self["first"] + self["second"]
        return total


CONTAINERS = {
    "pair": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Fields(a),
    "user dict": lambda a, b: Batch(first=a, second=b, third=None),
    "dict of a class": lambda a, b: Keyed(first=a, second=b),
    "nested": lambda a, b: {"x": [Pair(a, b), Fields(b)], 3: (Keyed(first=a, second=b),)},
    "number keys": lambda a, b: {0: a, (1, 2): b},
}


def total(value: Any) -> Tensor:
    """Adds up what any of the containers holds, by its own methods where it has some."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Pair):
        return value.first + value.second
    if hasattr(value, "total"):
        return value.total()  # type: ignore[no-any-return]
    values = value.values() if isinstance(value, Mapping) else value
    return torch.stack([total(v) for v in values if v is not None]).sum(0)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, value: Any) -> Tensor:
        h = total(value)
        result: Tensor = self.layer(h) if h.sum().item() > -1e9 else h
        return result


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_that_an_opaque_module_is_given(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.whole, self.c = (nn.Linear(8, 8) for _ in range(4))
            self.whole = Whole()

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            result: Tensor = self.c(self.whole(CONTAINERS[kind](first, self.b(first))))
            return result

    decoupled = assert_same_step(Model(), ["a", "b"], torch.randn(4, 8))
    assert len(decoupled.stages) == 3
    assert all(compile(stage.code, "stage", "exec") for stage in decoupled.stages)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_as_inputs(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, value: Any) -> Tensor:
            result: Tensor = self.c(torch.tanh(self.a(total(value))))
            return result

    make = CONTAINERS[kind]
    model, batch = Model(), make(torch.randn(4, 8), torch.randn(4, 8))
    decoupled = assert_same_step(model, ["a"], batch if kind != "pair" else (batch,))
    other = make(torch.randn(4, 8), torch.randn(4, 8))
    assert_bits_equal(decoupled(other), model(other), "another batch")
    assert total(batch).shape == (4, 8)


# ---- packed sequences ----------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 2, 4])


class Packs(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(10, 3)
        self.r = kind(6, 5, layers, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            torch.tanh(self.a(x)), lengths, batch_first=True, enforce_sorted=False
        )
        packed, _ = self.r(packed)
        packed = PackedSequence(packed.data * 2, *packed[1:])
        padded, _ = pad_packed_sequence(packed, batch_first=True)
        result: Tensor = self.b(padded)
        return result


class Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pre, self.m = nn.Linear(6, 6), inner

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        result: Tensor = self.m(torch.tanh(self.pre(x)), lengths)
        return result


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    for model, cuts in ((Packs(kind), ["a", "r"]), (Within(Packs(kind, 2)), ["pre", "m.a"])):
        decoupled = assert_same_step(model, cuts, (torch.randn(3, 5, 6), LENGTHS))
        for lengths in (torch.tensor([1, 5, 3]), torch.tensor([5, 5, 5])):
            x = torch.randn(3, 5, 6)
            assert_bits_equal(decoupled(x, lengths), model(x, lengths), "other lengths")


def test_lengths_read_as_numbers_make_what_reads_them_opaque() -> None:
    class Listed(Packs):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(x, torch.tensor(lengths.tolist()))

    model = Within(Listed(nn.LSTM))
    decoupled = assert_same_step(model, ["pre"], (torch.randn(3, 5, 6), LENGTHS))
    assert "'m' is one opaque node" in "".join(decoupled.plan.report.notes)
    x, lengths = torch.randn(3, 5, 6), torch.tensor([1, 5, 3])
    assert_bits_equal(decoupled(x, lengths), model(x, lengths), "other lengths")


# ---- inputs whose tensors cannot be seen ---------------------------------------------------------


class Store:
    __slots__ = ("values",)

    def __init__(self, **values: Tensor) -> None:
        self.values = values


class Data:
    """A graph as torch-geometric holds it: tensors two steps away."""

    def __init__(self, **values: Tensor) -> None:
        self.store = Store(**values)

    @property
    def x(self) -> Tensor:
        return self.store.values["x"]


class TakesData(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, graph: Any) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.a(graph.x)))
        return result


@pytest.mark.parametrize("width", [6, 600_000], ids=["real tensors", "fake tensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_argument_that_holds_tensors_is_named(width: int, nested: bool) -> None:
    model = TakesData(width)
    if nested:
        model.forward = lambda graph: TakesData.forward(model, graph[0])  # type: ignore[assignment]
    data = Data(x=torch.randn(4, 6))
    told = r"argument 'graph' of TakesData is or holds a Data, .*\(one is \.store\.values\['x'\]\)"
    for call in (
        lambda: dni_fx.list_cut_points(model, ([data] if nested else data,)),
        lambda: dni_fx.decouple(model, ["a"], example_inputs=([data] if nested else data,)),
    ):
        with pytest.raises(DecouplingError, match=told) as caught:
            call()
        assert "vmap" not in str(caught.value)
        assert "export" not in str(caught.value)


class Slotted:
    __slots__ = "__kept"  # one name alone, and private

    def __init__(self, kept: Tensor) -> None:
        self.__kept = kept

    @property
    def x(self) -> Tensor:
        return self.__kept


def test_attributes_in_slots_are_looked_into_whatever_they_are_called() -> None:
    with pytest.raises(DecouplingError, match=r"one is \._Slotted__kept"):
        dni_fx.list_cut_points(TakesData(6), (Slotted(torch.randn(4, 6)),))


def test_plain_objects_and_modules_are_taken() -> None:
    """Negative control: an object without tensors, and a module, which is no data."""

    class Options:
        scale = 2.0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, options: Options, act: nn.Module) -> Tensor:
            result: Tensor = self.b(act(self.a(x)) * options.scale)
            return result

    assert_same_step(Model(), ["a"], (torch.randn(4, 6), Options(), nn.Tanh()))


def test_mappings_hold_the_targets_of_a_trainer_too() -> None:
    """A batch that a collator returns is a mapping and no dict."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x).relu())
            return result

    x = torch.randn(4, 6)
    decoupled = dni_fx.decouple(Model(), ["a"], example_kwargs={"x": x})
    make = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=make)
    batch = Batch(x=x, labels=torch.randint(3, (4,)))
    trainer.fit([batch], progress=False)
    assert trainer.steps == 1
    assert sorted(batch) == ["labels", "x"]
