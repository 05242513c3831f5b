"""Whatever listing, decoupling or a refused step does: the model, its helpers, its generators and
the call's arguments are as before.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import itertools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import dni_fx
from dni_fx.passes.cut import checking
from dni_fx.passes.trace import caches, storages, tracing
from dni_fx.passes.trace.state import restored

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Large models are traced on fake tensors, and their memory is watched."""
    if request.param == "large":
        monkeypatch.setattr(tracing, "SMALL", 0)
        monkeypatch.setattr(storages, "AT_ONCE", 0)
    return str(request.param)


class Inner(nn.Module):
    """Does something to itself between two layers."""

    def __init__(self, act: Callable[[Inner, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.spare = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))
        self.act = act
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.act(self, h)
        return self.b(torch.tanh(h))


def around(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), inner)


def seen(model: nn.Module) -> dict[str, Any]:
    """Which memory every tensor sees, how, and what is there."""
    return {
        name: (
            t.untyped_storage()._cdata,
            t.untyped_storage().nbytes(),
            t.stride(),
            t.device,
            t._version,
            t.requires_grad,
            t.is_leaf,
            t.detach().clone().numpy().tolist(),
        )
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }


def transform(model: nn.Module, *args: Any) -> None:
    dni_fx.list_cut_points(model, args)
    dni_fx.plan_cuts(model, args, stages=2, costs="analytic")
    dni_fx.plan_cuts(model, args, stages=2, costs="measured")
    dni_fx.decouple(model, ["0"], example_inputs=args, gradients="exact")


def exchanged(m: Inner, _: Tensor) -> None:
    for a, b in zip(m.spare.parameters(), m.a.parameters(), strict=True):
        a.data = a.data * 0.9 + b.data * 0.1


def written_through_data(m: Inner, _: Tensor) -> None:
    m.spare.weight.data.mul_(0.5)


def set_to_other_memory(m: Inner, _: Tensor) -> None:
    m.spare.weight.set_(torch.ones(6, 6))


def resized(m: Inner, h: Tensor) -> None:
    m.count.resize_(h.shape[1]).fill_(1.0)


def rebound(m: Inner, h: Tensor) -> None:
    m.count = m.count + h.mean()


def written_through_a_view(m: Inner, _: Tensor) -> None:
    m.count[1:].add_(1.0)


def unfrozen(m: Inner, _: Tensor) -> None:
    m.spare.weight.requires_grad_(not m.spare.weight.requires_grad)


def rescaled_rows(m: Inner, _: Tensor) -> None:
    torch.embedding_renorm_(m.spare.weight, torch.tensor([0, 1]), 0.01, 2.0)


def many_at_once(m: Inner, _: Tensor) -> None:
    torch._foreach_mul_(list(m.spare.parameters()), 0.5)


WRITES = (
    exchanged, written_through_data, set_to_other_memory, resized, rebound, written_through_a_view,
    rescaled_rows, many_at_once,
)  # fmt: skip


@pytest.mark.parametrize("act", WRITES, ids=lambda f: f.__name__)
def test_memory_is_as_before(act: Any, size: str) -> None:
    model, x = around(Inner(act)), torch.randn(4, 6)
    before = seen(model)
    transform(model, x)
    assert seen(model) == before
    model(x).sum().backward()


def test_flags_are_as_before(size: str) -> None:
    model, x = around(Inner(unfrozen)), torch.randn(4, 6)
    before = seen(model)
    dni_fx.list_cut_points(model, (x,))
    assert seen(model) == before


def test_memory_written_by_numpy_is_as_before() -> None:
    """No operator says so; small memory is copied at once."""

    def act(m: Inner, _: Tensor) -> None:
        m.count.numpy()[:] = 3.0

    model, x = around(Inner(act)), torch.randn(4, 6)
    before = seen(model)
    transform(model, x)
    assert seen(model) == before


def test_a_graph_that_holds_a_buffer_finds_it_untouched(size: str) -> None:
    inner = Inner(written_through_a_view)
    loss = (inner.count * inner.a.weight[0, :2]).sum()
    transform(around(inner), torch.randn(4, 6))
    loss.backward()


class Helper:
    """Holds things of all kinds, deep down."""

    __slots__ = ("__dict__", "last")

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"deep": [collections.deque(maxlen=3), {1}, bytearray(b"ab")]}
        self.by_key = collections.defaultdict(list)
        self.ordered = collections.OrderedDict(a=1)
        self.array = np.zeros(3)
        self.spaces = types.SimpleNamespace(n=0)
        self.last: Any = None

    def take(self, h: Tensor) -> None:
        queue, members, text = self.seen["deep"]
        queue.append(h)
        members.add(2)
        text.extend(b"c")
        self.by_key["h"].append(h)
        self.ordered["b"] = self.ordered.pop("a")
        self.array[:] = 1.0
        self.spaces.n += 1
        self.last = self.new = h

    def content(self) -> Any:
        queue, members, text = self.seen["deep"]
        return (
            *(list(queue), set(members), bytes(text), dict(self.by_key), [*self.ordered.items()]),
            *(self.array.tolist(), self.spaces.n, self.last, sorted(vars(self))),
        )  # fmt: skip


def test_helper_objects_are_as_before(size: str) -> None:
    helper = Helper()
    model = around(Inner(lambda m, h: m.helper.take(h.detach()), helper=helper))
    before = copy.deepcopy(helper.content())
    transform(model, torch.randn(4, 6))
    assert helper.content() == before
    model(torch.randn(4, 6))
    assert helper.content() != before


def test_closures_globals_and_class_bodies_are_as_before(size: str) -> None:
    calls = 0

    class Counts:
        total = 0
        kept: list[Tensor] = []  # noqa: RUF012

    def act(m: Inner, h: Tensor) -> None:
        nonlocal calls
        global CALLS
        calls += 1
        CALLS += 1
        Counts.total += 1
        Counts.kept.append(h)
        DEFAULT(h)

    before = CALLS
    transform(around(Inner(act)), torch.randn(4, 6))
    assert (calls, CALLS, Counts.total, Counts.kept) == (0, before, 0, [])
    assert DEFAULT.__defaults__ == ([],)


CALLS = 0


def DEFAULT(h: Tensor, kept: list[Tensor] = []) -> None:  # noqa: B006
    kept.append(h)


class Arguments(nn.Module):
    """Leaves its values in an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        h = torch.tanh(self.a(x))
        cache.seen["deep"][0].append(h.detach())
        cache.last = h
        return self.b(h)


def test_arguments_are_as_before(size: str) -> None:
    """Of an object of the user's own, for which the model is refused."""
    helper, x = Helper(), torch.randn(4, 6)
    before = copy.deepcopy(helper.content())
    with pytest.raises(dni_fx.DecouplingError, match="changes what is in argument 'cache'"):
        dni_fx.decouple(Arguments(), ["a"], example_inputs=(x, helper), gradients="exact")
    assert helper.content() == before


def test_generators_are_as_before(size: str) -> None:
    held = {
        "own": torch.Generator().manual_seed(3),
        "python": random.Random(3),
        "numpy": types.SimpleNamespace(rng=np.random.default_rng(3), old=np.random.RandomState(3)),
        "counter": itertools.count(),
    }

    def act(m: Any, h: Tensor) -> None:
        torch.rand(2, generator=m.own)
        m.numpy.rng.random()
        m.numpy.old.rand()
        m.python.random()
        next(m.counter)

    transform(around(Inner(act, **held)), torch.randn(4, 6))
    other = random.Random(3), np.random.default_rng(3), np.random.RandomState(3)
    assert_bits_equal(
        torch.rand(2, generator=held["own"]),
        torch.rand(2, generator=torch.Generator().manual_seed(3)),
        "torch",
    )
    assert held["python"].random() == other[0].random()
    assert held["numpy"].rng.random() == other[1].random()
    assert held["numpy"].old.rand() == other[2].rand()
    assert next(held["counter"]) == 0


def test_settings_of_torch_are_as_before(size: str) -> None:
    def act(_: Any, __: Tensor) -> None:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
        torch.set_autocast_dtype("cpu", torch.float16)

    def settings() -> Any:
        return (
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_autocast_dtype("cpu"),
        )

    before = settings()
    dni_fx.list_cut_points(around(Inner(act)), (torch.randn(4, 6),))
    assert settings() == before


# ---- memories of functions ----------------------------------------------------------------------


@functools.lru_cache
def table(n: int) -> Tensor:
    return torch.arange(n).float()[:, None] / n


@functools.cache
def drawn(n: int) -> Tensor:
    return torch.randn(n, 1)


BY_LENGTH: dict[int, Tensor] = {}


def remembered(n: int) -> Tensor:
    if n not in BY_LENGTH:
        BY_LENGTH[n] = torch.ones(n, 1)
    return BY_LENGTH[n]


class Tables:
    """A method that remembers, and a class that does."""

    shared: dict[int, Tensor] = {}  # noqa: RUF012

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def of(self, n: int, *, scale: int) -> Tensor:
        return torch.ones(n, 1) * scale

    def __call__(self, n: int) -> Tensor:
        return self.shared.setdefault(n, self.of(n, scale=2))


TABLES = Tables()
HIDDEN = {"table": functools.lru_cache(lambda n: torch.ones(n, 1))}


def out_of_sight(n: int) -> Tensor:
    """No reading of this code leads to the cache."""
    return globals()["HID" + "DEN"]["table"](n)


class Looks(nn.Module):
    """Adds something that a function remembers."""

    def __init__(self, look: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.look = nn.Linear(6, 6), nn.Linear(6, 3), look

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + self.look(int(x.shape[1])))


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    for cached in (table, drawn, Tables.of, HIDDEN["table"]):
        cached.cache_clear()
    BY_LENGTH.clear()
    Tables.shared.clear()


def held_now() -> list[Any]:
    """All that the functions above remember."""
    cached = [caches.known_results(c)[0] for c in (table, drawn, Tables.of, HIDDEN["table"])]
    return [dict(c) for c in (*cached, BY_LENGTH, Tables.shared)]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
@pytest.mark.parametrize("look", [table, drawn, remembered, TABLES], ids=lambda f: str(f)[:20])
def test_memories_of_functions_are_as_before(
    look: Any, nested: bool, warm: bool, size: str
) -> None:
    model = around(Looks(look)) if nested else Looks(look)
    x, y = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    if warm:
        look(5)
    before = held_now()
    decoupled = dni_fx.decouple(
        model, ["0" if nested else "a"], example_inputs=(x,), gradients="exact"
    )
    after = held_now()
    assert [list(c) for c in after] == [list(c) for c in before]
    assert all(c[k] is v for c, b in zip(after, before, strict=True) for k, v in b.items())
    for value in (x, y):
        want = model(value)
        assert type(want) is Tensor
        if look is not drawn or warm:
            assert_bits_equal(decoupled(value), want, "decoupled")
        assert not any(isinstance(t, FakeTensor) for c in held_now() for t in c.values())


@pytest.mark.usefixtures("forgotten")
def test_a_fake_tensor_in_a_cache_out_of_sight_is_found(size: str) -> None:
    model, x = Looks(out_of_sight), torch.randn(2, 5, 6)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,), gradients="exact")
    assert type(model(x)) is Tensor
    assert_bits_equal(decoupled(x), model(x), "decoupled")


@pytest.mark.usefixtures("forgotten")
def test_the_tests_see_what_a_cache_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: no stand-ins, and nobody looks for what outlives a trace."""
    monkeypatch.setattr(tracing, "SMALL", 0)
    monkeypatch.setattr(caches, "REPLACED", frozenset())
    monkeypatch.setattr(caches, "_forget", lambda _: None)
    tracing.trace_calls(Looks(table), (torch.randn(2, 5, 6),), {})
    assert isinstance(table(5), FakeTensor)


def test_fake_tensors_are_taken_out_of_where_they_are_held() -> None:
    held: list[Any] = []
    with contextlib.suppress(KeyError), caches.fakes() as mode:
        assert not gc.isenabled()  # so that what is made here is young at the end
        held += [mode.from_tensor(torch.zeros(2)), "the rest"]
        circle: list[Any] = [mode.from_tensor(torch.zeros(3))]
        circle.append(circle)
        del circle
        raise KeyError
    assert held == ["the rest"]
    assert not mode.alive()
    assert gc.isenabled()


def living() -> int:
    """Tensors that somebody holds, be it a graph."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # without asking proxies


@pytest.mark.parametrize("costs", ["analytic", "measured"])
def test_weighing_a_model_keeps_nothing_of_it(costs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node; the control keeps outputs in their own graphs, which nothing takes apart."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    plan = functools.partial(dni_fx.plan_cuts, model, (x,), stages=2, costs=costs)
    plan()  # what torch and the package keep for all models
    before = living()
    plan()
    assert living() == before
    hooks = torch.autograd.graph.saved_tensors_hooks

    def held(pack: Callable[[Tensor], Any], unpack: Any) -> Any:
        return hooks(lambda t: (pack(t), t)[1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", held)
    plan()
    assert living() > before


def test_the_tests_see_memory_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: nobody watches operators."""
    monkeypatch.setattr(storages, "AT_ONCE", 0)
    monkeypatch.setattr(storages.Tensors, "protect", lambda *_: None)
    inner = Inner(written_through_data)
    before = inner.spare.weight.clone()
    with restored(inner):
        inner(torch.randn(4, 6))
    assert not torch.equal(inner.spare.weight, before)


# ---- what torch compiles, quantised models, blame -----------------------------------------------


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.cond(h.sum() > 0, torch.tanh, torch.sigmoid, (h,)))


class Compiled(Cond):
    """A compiled function inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(fused(self.a(x)))


@torch.compile(backend="eager")
def fused(h: Tensor) -> Tensor:
    return torch.sin(h) + 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("make", [Cond, Compiled])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_what_torch_compiles_inside_runs_afterwards(
    make: type[nn.Module], warm: bool, size: str
) -> None:
    torch._dynamo.reset()
    model, x = around(make()), torch.randn(4, 6)
    if warm:
        model(x)
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    assert_bits_equal(decoupled(x), model(x), "decoupled")
    model(torch.randn(7, 6)).sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_buffers_that_forward_resizes(size: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model, x = quantization.prepare_qat(model), torch.randn(4, 6)
    before = seen(model)
    dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    assert seen(model) == before
    model(x).sum().backward()


class NoModes(nn.Module):
    """Refuses to be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("watched")
        return self.a(x)


def test_a_model_fails_only_if_it_fails_without_modes(size: str) -> None:
    x = torch.randn(4, 6)
    assert checking.Yardstick(NoModes(), (x,), {}).first
    with pytest.raises(dni_fx.DecouplingError, match="itself fails"):
        _ = checking.Yardstick(NoModes(), (torch.randn(4, 5),), {}).first


# ---- refused steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [None, *WRITES], ids=lambda f: f.__name__ if f else "max_norm")
def test_a_refused_step_changes_nothing(act: Any, size: str) -> None:
    if act is None:
        model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 6))
        model[0].weight.data.mul_(5)
        x = torch.randint(9, (3, 4))
    else:
        model, x = around(Inner(act, helper=Helper())), torch.randn(4, 6)
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    before = [t.detach().clone() for t in model.state_dict().values()]
    trainer = dni_fx.Trainer(decoupled, lambda o, _: o.sum() * float("nan"), optimizer=sgd)
    for _ in range(2):
        with pytest.raises(dni_fx.DecouplingError):
            trainer.step(x)
        assert_bits_equal(list(model.state_dict().values()), before, "after a refused step")


def test_a_refused_step_leaves_plain_attributes() -> None:
    def act(m: Any, h: Tensor) -> None:
        m.calls += 1
        m.helper.take(h.detach())

    helper = Helper()
    model, x = around(Inner(act, calls=0, helper=helper)), torch.randn(4, 6)
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    before = copy.deepcopy(helper.content())
    trainer = dni_fx.Trainer(decoupled, lambda o, _: o.sum() * float("nan"), optimizer=sgd)
    with pytest.raises(dni_fx.DecouplingError):
        trainer.step(x)
    assert model[1].calls == 0
    assert helper.content() == before
