"""What the zoo calls harm is found: each kind, done on purpose."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "zoo_harm.py"


@pytest.fixture(scope="module")
def harm() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("zoo_harm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Net(nn.Module):
    """A model with a little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.count, self.notes, self.draws = 1, {"first": None}, torch.Generator()


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2)


def _moved(model: Any, _x: Any) -> None:
    model.layer.weight.data = model.layer.weight.data.clone()


def _attribute(model: Any, _x: Any) -> None:
    model.count = 2


def _gradient(model: Any, _x: Any) -> None:
    model.layer.weight.grad = torch.zeros(3, 3)


def _fake_in_a_cache(model: Any, _x: Any) -> None:
    model.notes["first"] = [_fake()]


@functools.lru_cache
def _cached() -> torch.Tensor:
    return _fake()


HARMS: dict[str, Callable[[Any, Any], Any]] = {
    "storage of layer.weight": _moved,
    "gradient of layer.weight": _gradient,
    "the model.count": _attribute,
    "layer.weight has other values": lambda model, _: model.layer.weight.data.add_(1),
    "seen has other values": lambda model, _: model.seen.add_(1),
    "requires_grad of the model.seen": lambda model, _: model.seen.requires_grad_(),
    "layer._forward_hooks": lambda model, _: model.layer.register_forward_hook(print),
    "the model.training": lambda model, _: model.eval(),
    "the model.draws": lambda model, _: torch.rand(1, generator=model.draws),
    "input 0 has other values": lambda _, x: x.add_(1),
    "random state of torch": lambda *_: torch.rand(1),
    "random state of Python": lambda *_: random.random(),
    "the model holds a torch._subclasses.fake_tensor.FakeTensor": _fake_in_a_cache,
    "the cache of <function _cached": lambda *_: _cached(),
}


@pytest.mark.parametrize("said", HARMS)
def test_harm_is_found(harm: Any, said: str) -> None:
    model, x = Net(), torch.randn(2, 3)
    before = harm.Untouched(model, (x,))
    HARMS[said](model, x)
    found = before.difference()
    _cached.cache_clear()
    assert said in found


def test_no_harm_is_none(harm: Any) -> None:
    model, x = Net(), torch.randn(2, 3)
    before = harm.Untouched(model, (x,))
    with torch.random.fork_rng():
        model.layer(x)
    assert before.difference() == ""
