"""Pictures of what an object holds, so that a later look tells whether it is still the same."""

from __future__ import annotations

import collections
import ctypes
import datetime
import decimal
import enum
import functools
import logging
import random
import re
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

_C_DATA = ctypes.c_int.__mro__[-2]  # what all values of C come from
_EMPTY: dict[Any, Any] = {}
_VIEWS = type(_EMPTY.keys()) | type(_EMPTY.values()) | type(_EMPTY.items())
IMMUTABLE = (
    *ATOMS,
    re.Pattern,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    logging.Logger,
    logging.LoggerAdapter,
    torch.Generator,
    torch.autograd.Function,
)
"""Kinds of which no content matters, or is looked at elsewhere."""

Seen = dict[int, tuple[int, Any]]
Without = frozenset[tuple[int, Any]]


class Itself:
    """Equal to the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def picture(value: Any, without: Without = frozenset()) -> tuple[Any, ...]:
    """All plain values that an object holds, to be compared with a later picture.

    Tensors, modules, functions and whatever cannot be opened are the same while they are
    themselves; containers and objects are opened.

    Args:
        value: the object.
        without: of what only the type counts: identities of dicts, or of objects' attributes, with
            a key.
    """
    kind = type(value)
    if kind in ATOMS:
        return kind, repr(value) if value != value else value
    parts: list[Any] = []
    try:
        for part in _parts(value, {}, without):
            parts.append(part)
            if len(parts) > _MOST_PARTS:
                return (Itself(value),)
    except RuntimeError:  # changed by another thread meanwhile, or bottomless
        return (Itself(value),)
    return tuple(parts)


def unopened(parts: Any) -> Iterator[tuple[Any, str]]:
    """What was not opened for a picture, and why: it counts as the same while it is the same
    object.
    """
    for part in parts if isinstance(parts, tuple | frozenset) else ():
        if isinstance(part, frozenset):
            known = (*_BY_IDENTITY, *IMMUTABLE, enum.Enum, tuple, frozenset)
            inside = "is an element of a set"
            yield from ((each, inside) for each in part if not isinstance(each, known))
        elif isinstance(part, Itself) and not isinstance(part.value, (*_BY_IDENTITY, *IMMUTABLE)):
            yield part.value, _why_unopened(part.value)


def _why_unopened(value: Any) -> str:
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray):
        return f"is larger than {_LARGEST_ARRAY:,} bytes"
    opened = isinstance(value, _CONTAINERS) or hasattr(value, "__dict__") or slots_of(type(value))
    return f"has more than {_MOST_PARTS:,} parts" if opened else "cannot be opened"


def _parts(value: Any, seen: Seen, without: Without) -> Iterator[Any]:
    kind = type(value)
    if kind in ATOMS:
        yield kind, repr(value) if value != value else value
    elif isinstance(value, enum.Enum):
        yield kind, value.name
    elif isinstance(value, types.MethodType):
        yield value.__func__
        yield from _parts(value.__self__, seen, without)
    elif isinstance(value, _BY_IDENTITY):
        yield Itself(value)
        if isinstance(value, types.FunctionType) and vars(value):
            yield from _parts(vars(value), seen, without)
    elif isinstance(value, weakref.ref):
        yield kind
        yield from _parts(value(), seen, without)
    elif id(value) in seen:
        yield "again", seen[id(value)][0]
    else:
        seen[id(value)] = len(seen), value  # alive, so that no other gets its identity
        yield kind
        yield from _opened(value, seen, without)


def _opened(value: Any, seen: Seen, without: Without) -> Iterator[Any]:
    numpy = sys.modules.get("numpy")
    if isinstance(value, list | tuple | collections.deque):
        yield base_of(value).__len__(value)
        for item in items_of(value):
            yield from _parts(item, seen, without)
    elif isinstance(value, dict):
        yield dict.__len__(value)
        for key, item in base_of(value).items(value):
            yield from _parts(key, seen, without)
            if without and (id(value), key) in without:
                yield type(item)
                continue
            yield from _parts(item, seen, without)
    elif isinstance(value, set | frozenset):
        yield frozenset(items_of(value))
    elif numpy and isinstance(value, numpy.ndarray) and value.nbytes <= _LARGEST_ARRAY:
        yield value.shape, value.dtype, value.tobytes()
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen, without)
    elif isinstance(value, random.Random):
        yield value.getstate()
    elif numpy and isinstance(value, numpy.random.Generator):
        yield from _parts(value.bit_generator.state, seen, without)
    elif isinstance(value, _C_DATA):
        yield from _bytes_of(value)
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value), seen, without)
        yield from _in_slots(value, seen, without)
    elif slots_of(type(value)):
        yield from _in_slots(value, seen, without)
    elif isinstance(value, types.MappingProxyType | _VIEWS):
        inside = dict(getattr(value, "mapping", value))
        yield from _parts(inside, seen, without)
    else:
        yield from _bytes_of(value)


def _bytes_of(value: Any) -> Iterator[Any]:
    """Of what shares its memory: arrays, values of C."""
    try:
        view = memoryview(value)
    except TypeError:
        yield Itself(value)
        return
    yield view.tobytes() if view.nbytes <= _LARGEST_ARRAY else Itself(value)


def _in_slots(value: Any, seen: Seen, without: Without) -> Iterator[Any]:
    for slot in slots_of(type(value)):
        yield from _parts(content(value, slot, "nothing"), seen, without)


def base_of(value: Any) -> Any:
    """The built-in class of a container. Its methods, called by the class, do what they say; those
    of a user's subclass may do anything.
    """
    return next(kind for kind in _CONTAINERS if isinstance(value, kind))


def items_of(value: Any) -> Iterator[Any]:
    """What is in a built-in container, or in one of a class that comes from it."""
    base = base_of(value)
    return iter(base.values(value) if isinstance(value, dict) else base.__iter__(value))


def slots_of(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    """Where a class's objects keep what is in no ``__dict__``: the ``__slots__`` of it and of those
    that it comes from. Members of classes in C are none: they give another object each time.
    """
    if cls not in _SLOTS:
        of_python = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
        members = [(name, m) for known in of_python for name, m in known.items()]
        _SLOTS[cls] = tuple(
            m for n, m in members if type(m) is types.MemberDescriptorType and n != "__weakref__"
        )
    return _SLOTS[cls]


def content(owner: Any, slot: types.MemberDescriptorType, default: Any) -> Any:
    """What is in a slot, whatever attribute of that name the owner's class has."""
    try:
        return slot.__get__(owner)
    except AttributeError:
        return default


_CONTAINERS = (
    list, tuple, collections.deque, collections.OrderedDict, dict, set, frozenset, bytearray,
)  # fmt: skip
_SLOTS: weakref.WeakKeyDictionary[type, tuple[types.MemberDescriptorType, ...]] = (
    weakref.WeakKeyDictionary()
)
