"""What objects share (their class, a weak reference, memory), what code imports itself, and modules
that are none of the model's are guards: each call equals the model. Each kind has relatives.
"""

from __future__ import annotations

import array
import collections
import ctypes
import math
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dni_fx.passes.trace import recorder

from .test_guards import Net, X, assert_equal, assert_holds, cut

TABLE = {"scale": 1.0}
ELSEWHERE = types.ModuleType("somebody_elsewhere")
PRIOR = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))


class Computed:
    def __get__(self, owner: Any, kind: Any) -> float:
        return TABLE["scale"]


class Base:
    scale = 1.0

    def inherited(self) -> float:
        return TABLE["scale"]


class Options(Base):
    computed = Computed()


class Slotted:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = Options()


def factor(h: torch.Tensor) -> torch.Tensor:
    return h * factor.scale  # type: ignore[attr-defined]


def set_all(value: float) -> None:
    Base.scale = value
    ELSEWHERE.scale = value  # type: ignore[attr-defined]
    TABLE["scale"] = value
    factor.scale = value  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def as_they_were(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "somebody_elsewhere", ELSEWHERE)
    set_all(1.0)
    yield
    set_all(1.0)


def imports(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import somebody_elsewhere as other  # type: ignore[import-not-found]

    return h * other.scale


def imports_from(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    from somebody_elsewhere import scale

    return h * scale


def named_again(net: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    other = ELSEWHERE
    return h * other.scale


SHARED: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
    "class": (lambda net, h, x: h * net.kept.scale, Base()),
    "inherited class": (lambda net, h, x: h * net.kept.scale, Options()),
    "inherited method": (lambda net, h, x: h * net.kept.inherited(), Options()),
    "descriptor": (lambda net, h, x: h * net.kept.computed, Options()),
    "in slots": (lambda net, h, x: h * net.kept.inner.scale, Slotted()),
    "class itself": (lambda net, h, x: h * net.kept.scale, Options),
    "Python module": (lambda net, h, x: h * net.kept.scale, ELSEWHERE),
    "function": (lambda net, h, x: net.kept(h) * net.kept.scale, factor),
    "import": (imports, None),
    "import from": (imports_from, None),
    "another name": (named_again, None),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_objects_share(kind: str) -> None:
    between, kept = SHARED[kind]
    decoupled = cut(Net(between, kept=kept), X)
    for value in (1.0, 2.0, 3.0, 1.0):
        set_all(value)
        assert_equal(decoupled, X)


def test_a_weak_reference() -> None:
    kept = Slotted().inner
    decoupled = cut(Net(lambda net, h, x: h * net.kept().scale, kept=weakref.ref(kept)), X)
    for value in (2.0, 3.0):
        kept.scale = value
        assert_equal(decoupled, X)


def test_a_distribution_in_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    decoupled = cut(Net(lambda net, h, x: h - PRIOR.log_prob(h)), X)
    for value in (2.0, 3.0):
        monkeypatch.setattr(PRIOR, "loc", torch.tensor(value))
        assert_equal(decoupled, X)


Put = Callable[[Any, float], Any]
TABLES = {"scale": 1.0}
MEMORY: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Put]] = {
    "array": (lambda: array.array("d", [1]), lambda k: k[0], lambda k, v: k.__setitem__(0, v)),
    "bytes": (lambda: bytearray(b"1"), lambda k: k[0], lambda k, v: k.__setitem__(0, int(v))),
    "value of C": (
        lambda: ctypes.c_double(1),
        lambda k: k.value,
        lambda k, v: setattr(k, "value", v),
    ),
    "view of a dict": (
        lambda: TABLE.values(),
        lambda k: next(iter(k)),
        lambda k, v: TABLE.update(scale=v),
    ),
    "mapping that is read": (
        lambda: types.MappingProxyType(TABLE),
        lambda k: k["scale"],
        lambda k, v: TABLE.update(scale=v),
    ),
    "chain of maps": (
        lambda: collections.ChainMap({}, {"scale": 1.0}),
        lambda k: k["scale"],
        lambda k, v: k.maps[1].update(scale=v),
    ),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_that_is_shared(kind: str) -> None:
    make, read, put = MEMORY[kind]
    model = Net(lambda net, h, x: h * read(net.kept), kept=make())
    decoupled = cut(model, X)
    for value in (2.0, 3.0):
        put(model.kept, value)
        assert_equal(decoupled, X)


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).requires_grad_(False).eval()


def double(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


FOREIGN: dict[str, Callable[[nn.Module], Any]] = {
    "child": lambda m: m.__setitem__(0, nn.Linear(6, 6)),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(6, 6))),
    "hook": lambda m: m[0].register_forward_hook(double),
    "forward": lambda m: setattr(m[0], "forward", lambda h: h * 3),
    "attribute": lambda m: (m.train(), setattr(m[1], "p", 0.0)),
    "memory": lambda m: m[0].weight.data.fill_(2.0),
}


@pytest.mark.parametrize("place", ["global", "list"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_modules_that_are_none_of_the_models(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = teacher()
    monkeypatch.setitem(TABLES, "teacher", own)
    between = {
        "global": lambda net, h, x: h + TABLES["teacher"](h),
        "list": lambda net, h, x: h + net.kept[0](h),
    }[place]
    decoupled = cut(Net(between, kept=[own]), X)
    assert_equal(decoupled, X)
    FOREIGN[kind](own)
    assert_equal(decoupled, X)


def test_another_one_in_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GUIDE", teacher())
    decoupled = cut(Net(lambda net, h, x: h + GUIDE(h)), X)  # type: ignore[name-defined]  # noqa: F821
    monkeypatch.setitem(globals(), "GUIDE", teacher())
    assert_equal(decoupled, X)


@pytest.mark.parametrize("kind", ["child", "parameter", "hook", "forward"])
def test_it_is_the_guard_that_sees_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(recorder.Reads, "foreign", lambda *_: None)
    own = teacher()
    model = Net(lambda net, h, x: h + net.kept[0](h), kept=(own,))
    decoupled = cut(model, X)
    FOREIGN[kind](own)
    assert not torch.equal(decoupled(X), model(X))


def test_a_module_that_forward_makes_costs_no_trace() -> None:
    model = Net(lambda net, h, x: h + nn.ReLU()(h))
    decoupled = cut(model, X)
    for size in (4, 7):
        assert_equal(decoupled, torch.randn(size, 6))
    assert len(decoupled.graphs.variants) == 1


@pytest.mark.parametrize("ask", [np.log, np.sqrt, np.float64(2).__mul__, math.log])
def test_functions_of_numpy_take_sizes(ask: Callable[[Any], float]) -> None:
    """They are guards, as for functions of ``math``."""
    others = [torch.randn(n, 6) for n in (5, 7)]
    assert_holds(Net(lambda net, h, x: h * float(ask(x.shape[0]))), (X,), *((o,) for o in others))


def test_a_number_that_is_annealed_is_named() -> None:
    """After four traces, once, with its values; each call is right."""
    model = Net(lambda net, h, x: h / net.temperature, temperature=1.0)
    decoupled = cut(model, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            model.temperature = 2.0 + step
            assert_equal(decoupled, X)
    (said,) = [str(w.message) for w in caught if "traced" in str(w.message)]
    assert "because of 'temperature'" in said
    assert "(4.0 before, 5.0 now)" in said
    assert "register_buffer" in said


def test_one_in_a_buffer_is_not() -> None:
    """Negative control: no other trace, the same numbers."""
    model = Net(lambda net, h, x: h / net.temperature)
    model.register_buffer("temperature", torch.tensor(1.0))
    decoupled = cut(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            model.temperature.fill_(2.0 + step)
            assert_equal(decoupled, X)
    assert len(decoupled.graphs.variants) == 1
