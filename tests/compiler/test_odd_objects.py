"""What a model keeps may be of any class: it is read and put back without that class's own code."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.graphs.pictures import picture
from dni_fx.passes.trace.state import restored

from ..helpers.comparing import assert_bits_equal


class Slotted:
    """Has a slot."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class Shadowed(Slotted):
    """Computes what its base class keeps in a slot."""

    @property
    def value(self) -> list[float]:  # type: ignore[override]
        return [Slotted.value.__get__(self)]  # type: ignore[attr-defined]

    def __init__(self) -> None:
        Slotted.value.__set__(self, 1.0)  # type: ignore[attr-defined]


class Angle(complex):
    """Of a class in C, whose members give another number each time."""


class Refuses:
    """Whatever is asked."""

    def _refuse(self, *_: Any) -> Any:
        raise NotImplementedError(type(self).__name__)

    __len__ = __iter__ = items = keys = values = __getitem__ = clear = extend = update = _refuse
    __contains__ = _refuse


class OddTuple(Refuses, tuple[int, ...]):
    pass


class OddList(Refuses, list[int]):
    pass


class OddDict(Refuses, dict[str, int]):
    pass


class OddOrder(Refuses, collections.OrderedDict[str, int]):
    pass


class OddSet(Refuses, set[int]):
    pass


class OddFrozen(Refuses, frozenset[int]):
    pass


class OddQueue(Refuses, collections.deque[int]):
    pass


KINDS: dict[str, Callable[[], Any]] = {
    "slot": Slotted,
    "shadowed": Shadowed,
    "member": lambda: Angle(1.0, 2.0),
    "tuple": lambda: OddTuple((1, 2)),
    "list": OddList,
    "dict": OddDict,
    "order": OddOrder,
    "set": OddSet,
    "frozen": lambda: OddFrozen((1,)),
    "queue": OddQueue,
}


class Holds(nn.Module):
    """Keeps an object, and what an object holds, beside its layers."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.kept, self.held = kept, {"deep": [kept]}

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not self.held["deep"][0]:  # no assert: pytest's would lead to all its tests
            raise AssertionError
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_keep_objects_of_odd_classes(kind: str) -> None:
    model, x = Holds(KINDS[kind]()), torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,), gradients="exact")
    assert_bits_equal(decoupled(x), model(x), kind)
    assert_bits_equal(decoupled(x[:2]), model(x[:2]), kind)


CHANGES: dict[str, Callable[[Any], None]] = {
    "slot": lambda v: setattr(v, "value", 2.0),
    "shadowed": lambda v: Slotted.value.__set__(v, 2.0),  # type: ignore[attr-defined]
    "list": lambda v: list.append(v, 3),
    "dict": lambda v: dict.__setitem__(v, "a", 1),
    "order": lambda v: collections.OrderedDict.__setitem__(v, "a", 1),
    "set": lambda v: set.add(v, 3),
    "queue": lambda v: collections.deque.append(v, 3),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_odd_objects_are_put_back(kind: str) -> None:
    kept = KINDS[kind]()
    before = picture(kept)
    with restored(Holds(kept)):
        CHANGES[kind](kept)
        assert picture(kept) != before
    assert picture(kept) == before


def test_nothing_stays_changed_where_one_thing_cannot_be_put_back() -> None:
    array = pytest.importorskip("numpy").zeros(2)
    model = Holds(array)
    weight, state = model.a.weight.detach().clone(), torch.get_rng_state()

    def changed() -> None:
        with restored(model), torch.no_grad():
            array[:] = 1.0
            array.flags.writeable = False
            model.a.weight.normal_()

    with pytest.raises(ValueError, match="read-only"):
        changed()
    assert torch.equal(model.a.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)
