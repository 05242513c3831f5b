"""What forward changes outside of the model happens in every call, or the model is refused."""

import collections
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import BakedInError
from dni_fx.passes.trace import effects, tracing

COUNT = {"calls": 0}
KEPT: list[torch.Tensor] = []
TABLES: dict[int, torch.Tensor] = {}
SCALE = None


class Shared:
    last: torch.Tensor | None = None
    losses: list[torch.Tensor] = []  # noqa: RUF012 - what is tested


def count(h):
    COUNT["calls"] += 1
    return h * COUNT["calls"]


def collect(h):
    KEPT.append(h.detach())
    return h + sum(KEPT) * 0.1


def of_class(h):
    Shared.losses.append(h.square().mean())
    out = h if Shared.last is None else h + 0.1 * Shared.last
    Shared.last = h.detach()
    return out


def remember(h, memory=[]):  # noqa: B006 - what is tested
    memory.append(h.detach())
    return h + sum(memory[-2:]) * 0.1


class Helper:
    """An object that a module keeps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, h):
        self.calls += 1
        return h * self.calls


def make_counter():
    counts = collections.Counter()

    def call(h):
        counts["n"] += 1
        return h * counts["n"]

    return call


def make_attribute():
    def call(h):
        call.calls = getattr(call, "calls", 0) + 1
        return h * call.calls

    return call


def make_iterator():
    numbers = itertools.count(1)
    return lambda h: h * next(numbers)


def make_random():
    generator = random.Random(0)
    return lambda h: h * generator.random()


def make_numpy():
    generator = np.random.default_rng(0)
    return lambda h: h * float(generator.random())


def make_array():
    array = np.zeros(2)

    def call(h):
        array[0] += 1
        return h * float(array[0])

    return call


def make_closure():
    previous, calls = None, 0

    def mix(h):
        nonlocal previous, calls
        calls += 1
        out = h if previous is None else h + 0.1 * previous
        previous = h.detach()
        return out * calls

    return mix


def fill_once(h):
    """Caches: neither refused nor opaque."""
    global SCALE
    if SCALE is None:
        SCALE = torch.linspace(0, 1, 8)
    if len(h) not in TABLES:
        TABLES[len(h)] = torch.arange(len(h))[:, None] / 10
    return h * SCALE + TABLES[len(h)]


class Uses(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.inner(x))


class Top(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(count(torch.tanh(self.a(x))))


def forget():
    global SCALE
    SCALE = Shared.last = None
    COUNT["calls"] = 0
    for memory in (KEPT, Shared.losses, TABLES, remember.__defaults__[0]):
        memory.clear()


def make(function):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Uses(function), nn.Linear(8, 3))


def loss(output, target):
    total = F.mse_loss(output, target) + sum(Shared.losses)
    Shared.losses.clear()
    return total


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator))
        for _ in range(3)
    ]


def plain_losses(model):
    optimizer, found = sgd(model.parameters()), []
    for x, y in batches():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def decouple(model):
    return dni_fx.decouple(model, ["0"], example_inputs=batches()[0][:1], gradients="exact")


def trained_losses(model):
    trainer = dni_fx.Trainer(decouple(model), loss, optimizer=sgd)
    return [trainer.step(x, target=y).loss.item() for x, y in batches()]


FUNCTIONS = {
    "global counter": lambda: count,
    "global list": lambda: collect,
    "class": lambda: of_class,
    "default": lambda: remember,
    "closure": make_closure,
    "counter": make_counter,
    "helper object": Helper,
    "attribute of a function": make_attribute,
    "iterator": make_iterator,
    "random": make_random,
    "numpy": make_numpy,
    "array": make_array,
}


@pytest.fixture(autouse=True)
def _forgotten():
    forget()
    yield
    forget()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_in_a_submodule_they_happen_in_every_call(kind):
    expected = plain_losses(make(FUNCTIONS[kind]()))
    forget()
    model = make(FUNCTIONS[kind]())
    assert trained_losses(model) == expected
    assert "opaque" in str(decouple(model).plan)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_control_unwatched_they_are_lost(kind, monkeypatch):
    monkeypatch.setattr(effects.Watched, "changed", lambda *_: None)
    expected = plain_losses(make(FUNCTIONS[kind]()))
    forget()
    assert trained_losses(make(FUNCTIONS[kind]())) != expected


def test_at_the_top_level_they_are_refused_by_name():
    with pytest.raises(BakedInError, match=r"(?s)changes 'calls'.*outside of the model"):
        tracing.trace_calls(Top(), batches()[0][:1], {})
    with pytest.raises(dni_fx.DecouplingError, match="changes 'calls'"):
        dni_fx.decouple(Top(), ["a"], example_inputs=batches()[0][:1])
    assert COUNT["calls"] == 0


def test_a_cache_that_is_filled_once_is_looked_into():
    expected = plain_losses(make(fill_once))
    forget()
    model = make(fill_once)
    assert "opaque" not in str(decouple(model).plan)
    forget()
    assert trained_losses(model) == expected
