"""Every object that a model, its helpers and a call's arguments can reach, and so may change.

Objects are followed through their attributes, containers through what they hold, functions through
their closures, defaults and the globals that their code names. Of a class, those members count that
some code on the way names: that is more than runs, and far less than everything. The code of torch
and of Python is not read. A walk ends after `MOST` objects.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import items_of, slots_of
from . import caches
from .contents import (
    BARE,
    Contents,
    OfCell,
    OfDict,
    OfIterator,
    OfState,
    contents_of,
    how_far,
    of_class,
    of_globals,
    of_slots,
)
from .ownership import is_library_name

MOST = 200_000
_ATOMS = {
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice),
    *(types.BuiltinFunctionType, types.CodeType, types.MethodWrapperType),
    *(types.WrapperDescriptorType, types.MethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
}  # fmt: skip
# objects of these may hold what matters, though their code does not
_OPEN = (
    "torch.nn",
    "torch.ao",
    "torch.optim",
    "torch.utils",
    "torch.distributions",
    "collections",
    "types",
    "_thread",  # what threads have of their own
)


class Reach:
    """A walk. See the module's docstring.

    Args:
        roots: where it starts.

    Attributes:
        contents: of all that holds something or has a state.
        tensors: all tensors.
        memories: functions that remember, and iterators, with where they are held.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.contents: list[Contents] = []
        self.tensors: list[torch.Tensor] = []
        self.memories: list[tuple[Contents, Any, Any]] = []
        self._empty: list[Any] = []
        self._seen: dict[int, Any] = {}  # by identity, and alive
        self._names = {"forward"}
        self._members: dict[
            str, list[tuple[Contents, str, Any]]
        ] = {}  # of classes, by names that no code has used yet
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._next = list(roots)
        while self._next and len(self._seen) < MOST:
            self._visit(self._next.pop())
        for namespace, names in self._globals.values():
            self._keep(of_globals(namespace, names))

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if kind in BARE:
            self._keep(BARE[kind](value))
            if kind is set:
                self._next += value
        elif isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self._next += [value.grad] if value.is_leaf else []
            self._holder(vars(value))
        elif isinstance(value, nn.Module):
            self._object(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, caches.LRU_CACHE):
            self._next += [value.__wrapped__, *caches.known_results(value)[0].values()]
        elif not self._plain(value) and not isinstance(value, types.ModuleType):
            self._object(value)

    def _plain(self, value: Any) -> bool:
        """Containers, generators and other things that are what they are."""
        if state := _state_of(value):
            self.contents.append(state)
            return True
        if isinstance(value, tuple | frozenset):
            self._next += items_of(value)
        elif isinstance(value, types.MethodType):
            self._next += (value.__self__, value.__func__)
        elif isinstance(value, staticmethod | classmethod):
            self._next.append(value.__func__)
        elif isinstance(value, property):
            self._next += (value.fget, value.fset)
        elif isinstance(value, functools.cached_property):
            self._next.append(value.func)
        elif isinstance(value, functools.partial):
            self._next += (value.func, value.args, value.keywords)
        else:
            return False
        return not hasattr(value, "__dict__")

    def _object(self, value: Any) -> None:
        kept = contents_of(value)
        cls = type(value)
        if kept is not None:
            self._keep(kept)
            if isinstance(value, set):
                self._next += items_of(value)
        elif is_library_name(cls.__module__) and not _is_open(value):
            return
        self._next.append(cls)
        if type(attributes := getattr(value, "__dict__", None)) is dict:
            self._holder(attributes)
        if slots := slots_of(cls):
            self._keep(of_slots(value, slots))

    def _holder(self, attributes: dict[str, Any]) -> None:
        if not attributes:
            self._empty.append(attributes)
        elif id(attributes) not in self._seen:
            self._seen[id(attributes)] = attributes
            self._keep(OfDict(attributes))

    def _keep(self, kept: Contents) -> None:
        self.contents.append(kept)
        atoms, bare, after = _ATOMS, BARE, self._next.append
        for place, value in kept.places():
            kind = type(value)
            if kind in atoms:
                continue
            if kind in bare and not value:  # most tables of most modules
                self._empty.append(value)
                continue
            after(value)
            if kind in caches.REPLACED:
                self.memories.append((kept, place, value))

    def _member(self, kept: Contents, name: str, member: Any) -> None:
        """One that some code names."""
        self._next.append(member)
        if caches.has_stand_in(member):
            self.memories.append((kept, name, member))

    def send_stand_ins(self) -> None:
        """One for each function that remembers, wherever it is found."""
        made = {id(value): caches.stand_in(value) for _, _, value in self.memories}
        for kept, place, value in self.memories:
            kept.put(place, made[id(value)])

    def restore(self) -> list[Contents]:
        """Have everything hold again what it held.

        Returns:
            Of what had changed.
        """
        moved = [
            (kept, place)
            for kept, place, value in self.memories
            if type(value) in caches.ITERATORS
            and how_far(dict(kept.again().places()).get(place)) != how_far(value)
        ]
        for kept, place, value in self.memories:
            kept.put(place, value)
        changed: list[Contents] = [OfIterator(*where) for where in moved]
        changed += [kept for kept in self.contents if kept.restore()]
        grown = [container for container in self._empty if container]
        for container in grown:
            container.clear()
        return changed + [BARE[type(container)](container) for container in grown]

    def _class(self, cls: type) -> None:
        for base in cls.__mro__[1:]:
            self._next.append(base)
        if is_library_name(cls.__module__):
            return
        kept = of_class(cls)
        self.contents.append(kept)
        for name, member in kept.places():
            special = name.startswith("__") and not issubclass(cls, nn.Module)
            if name in self._names or special or name == "__call__":
                self._member(kept, name, member)
            elif type(member) not in _ATOMS:
                self._members.setdefault(name, []).append((kept, name, member))

    def _function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self._keep(OfCell(cell))
        self._next += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self._holder(vars(function))
        namespace = function.__globals__
        if is_library_name(namespace.get("__name__", "")):
            return
        names = set(_names(function.__code__))
        self._found(namespace, names)
        for name in names & sys.modules.keys():  # imported in the function
            if not is_library_name(name):
                self._found(vars(sys.modules[name]), names)
        for name in names - self._names:
            for member in self._members.pop(name, ()):
                self._member(*member)
        self._names |= names

    def _found(self, namespace: dict[str, Any], names: set[str]) -> None:
        """What code that uses these names can find in a Python module, and in those it names."""
        known = self._globals.setdefault(id(namespace), (namespace, set()))[1]
        for name in names & namespace.keys() - known:
            known.add(name)
            value = namespace[name]
            if isinstance(value, types.ModuleType):
                if not is_library_name(value.__name__):
                    self._found(vars(value), names)
            else:
                self._next.append(value)


def _is_open(value: Any) -> bool:
    return isinstance(value, nn.Module) or type(value).__module__.startswith(_OPEN)


def _names(code: types.CodeType) -> Iterator[str]:
    """Of globals and attributes, in code and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _state_of(value: Any) -> Contents | None:
    """Of a random generator or an array; None for anything else."""
    if isinstance(value, torch.Generator):
        return OfState(value, _torch_state, _set_torch_state)
    if isinstance(value, random.Random):
        return OfState(value, random.Random.getstate, random.Random.setstate)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return _state_of(value.bit_generator)
    if isinstance(value, numpy.random.RandomState):
        return OfState(value, lambda g: g.get_state(), lambda g, state: g.set_state(state))
    if isinstance(value, numpy.random.BitGenerator):
        return OfState(value, lambda g: g.state, lambda g, state: setattr(g, "state", state))
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        return OfState(value, lambda a: a.copy(), lambda a, content: a.__setitem__(..., content))
    return None


def _torch_state(generator: torch.Generator) -> bytes:
    with torch._C.DisableTorchFunction():  # no question of the model's, where it is recorded
        return generator.get_state().numpy().tobytes()


def _set_torch_state(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
