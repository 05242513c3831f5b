"""Pictures of what an object holds, so that a later look tells whether it is still the same."""

from __future__ import annotations

import collections
import enum
import functools
import random
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_MOST_PARTS = 20_000  # of one object; a larger one is taken for the same while it is itself
_LARGEST_ARRAY = 1 << 16  # bytes that are compared
ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_BY_IDENTITY = (
    torch.Tensor, nn.Module, torch.Generator, type, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType,
)  # fmt: skip


class Itself:
    """Equal to the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def picture(value: Any) -> tuple[Any, ...]:
    """All plain values that an object holds, to be compared with a later picture.

    Tensors, modules, functions and whatever cannot be opened are the same while they are
    themselves; containers and objects are opened.
    """
    kind = type(value)
    if kind in ATOMS:
        return kind, repr(value) if value != value else value
    parts: list[Any] = []
    try:
        for part in _parts(value, {}):
            parts.append(part)
            if len(parts) > _MOST_PARTS:
                return (Itself(value),)
    except RuntimeError:  # changed by another thread meanwhile, or bottomless
        return (Itself(value),)
    return tuple(parts)


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Any]:
    kind = type(value)
    if kind in ATOMS:
        yield kind, repr(value) if value != value else value
    elif isinstance(value, enum.Enum):
        yield kind, value.name
    elif isinstance(value, types.MethodType):
        yield value.__func__, Itself(value.__self__)
    elif isinstance(value, _BY_IDENTITY):
        yield Itself(value)
    elif id(value) in seen:
        yield "again", seen[id(value)][0]
    else:
        seen[id(value)] = len(seen), value  # alive, so that no other gets its identity
        yield kind
        yield from _opened(value, seen)


def _opened(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Any]:
    numpy = sys.modules.get("numpy")
    if isinstance(value, list | tuple | collections.deque):
        yield len(value)
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, dict | collections.UserDict):
        yield len(value)
        for key, item in value.items():
            yield from _parts(key, seen)
            yield from _parts(item, seen)
    elif isinstance(value, set | frozenset):
        yield frozenset(value)
    elif numpy and isinstance(value, numpy.ndarray) and value.nbytes <= _LARGEST_ARRAY:
        yield value.shape, value.dtype, value.tobytes()
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, random.Random):
        yield value.getstate()
    elif numpy and isinstance(value, numpy.random.Generator):
        yield from _parts(value.bit_generator.state, seen)
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value), seen)
        yield from _in_slots(value, seen)
    elif type(value).__module__ != "builtins" and slot_names(type(value)):
        yield from _in_slots(value, seen)
    else:
        yield Itself(value)


def _in_slots(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Any]:
    for name in slot_names(type(value)):
        yield from _parts(getattr(value, name, "nothing"), seen)


def slot_names(kind: type) -> tuple[str, ...]:
    """Attributes of a class's objects that are in no ``__dict__``."""
    names = _SLOTS.get(kind)
    if names is None:
        own = (vars(base) for base in kind.__mro__ if "__slots__" in vars(base))
        members = (pair for table in own for pair in table.items())
        names = tuple(n for n, m in members if type(m) is types.MemberDescriptorType)
        _SLOTS[kind] = names
    return names


_SLOTS: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()
