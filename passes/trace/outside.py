"""What the code of a model refers to outside of itself: globals, closures, defaults, classes.

Code is read, not run: a name is followed as far as the code follows it (``settings.scale``), and a
function that is found on the way is read in its turn. The code of torch and of Python is not read.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import ATOMS, base_of, items_of, picture
from .contents import MISSING, content_of

TORCH, OURS = str(torch.__path__[0]), str(Path(picture.__code__.co_filename).parents[1])
LIBRARY = (TORCH, OURS)  # code that is not what the user writes
_MOST = 2_000  # functions that are read
_LIBRARIES = (sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", "dni_fx"}
_OPENED = (
    "SimpleNamespace",
    "partial",
    "deque",
    "OrderedDict",
    "defaultdict",
    "UserDict",
    "ndarray",
    "_local",  # of a thread
)
_MOST_PARTS = 100  # of a container that is searched for functions
_FUNCTIONS = types.FunctionType | types.BuiltinFunctionType
_COMPUTED = property | functools.cached_property | staticmethod | classmethod | types.FunctionType
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_NAME = {"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"}

Read = Callable[[], Any]


class Outside:
    """Reads functions, and tells what they refer to.

    Args:
        hold: is told a place, for people, and how to read what is there.
        mode: is told the name of a function of torch's that tells a mode.
        modes: the names of these functions.
    """

    def __init__(
        self,
        hold: Callable[[str, Read], None],
        mode: Callable[[str], None],
        modes: Mapping[Any, str],
    ) -> None:
        self._hold, self._mode, self._modes = hold, mode, modes
        self._seen: dict[Any, Any] = {}

    def function(self, function: Any) -> None:
        """A function that the model calls."""
        pending = [function]
        while pending and len(self._seen) < _MOST:
            pending += self._read(pending.pop())

    def held(self, value: Any) -> None:
        """Something that the model keeps: functions in it may be called."""
        for each in functions_in(value):
            self.function(each)

    def _read(self, function: Any) -> Iterator[Any]:
        """What one function refers to; other functions that it leads to."""
        function = getattr(function, "__func__", function)
        if isinstance(function, functools.partial):
            yield from functions_in(function)
        if not isinstance(function, types.FunctionType) or id(function) in self._seen:
            return
        self._seen[id(function)] = function
        if is_library(function):
            return
        if wrapped := vars(function).get("__wrapped__"):
            yield wrapped
        if function.__defaults__ or function.__kwdefaults__:
            name = function.__name__
            self._hold(f"defaults of {name}", functools.partial(_defaults, function))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for chain in set(_chains(function.__code__)):
            yield from self._follow(chain, cells, function.__globals__)

    def _follow(
        self, chain: tuple[str, ...], cells: dict[str, Any], namespace: dict[str, Any]
    ) -> Iterator[Any]:
        name, *attributes = chain
        read: Read
        if name in cells:
            read = functools.partial(content_of, cells[name])
        else:
            read = functools.partial(namespace.get, name, MISSING)
        place = name
        value = read()
        if _is_environment(value, attributes):
            self._hold("os.environ", _environment)
            return
        for attribute in attributes:
            inner = _inner(value, attribute)
            if inner is None:
                break
            yield from functions_in(value)
            read, place = functools.partial(inner, read), f"{place}.{attribute}"
            value = read()
        if value is not MISSING and not isinstance(value, nn.Module):
            yield from self._end(value, place, read)

    def _end(self, value: Any, place: str, read: Read) -> Iterator[Any]:
        """What the code gets in the end."""
        if isinstance(value, _FUNCTIONS) and value in self._modes:
            self._mode(self._modes[value])
        elif isinstance(value, types.FunctionType):
            if not is_library(value):
                self._hold(place, read)
                yield value
        elif isinstance(value, type):
            if not is_library_name(value.__module__):
                self._hold(place, read)
                yield from _methods(value)
        elif isinstance(value, contextvars.ContextVar):
            self._hold(place, lambda: _in_context(read()))
            yield from functions_in(_in_context(value))
        elif _is_opened(value):
            self._hold(place, read)
            yield from functions_in(value)


def is_library(function: types.FunctionType) -> bool:
    """Whether the code is torch's or Python's."""
    return function.__code__.co_filename.startswith(LIBRARY) or is_library_name(
        function.__globals__.get("__name__", "")
    )


def functions_in(value: Any, depth: int = 3) -> Iterator[Any]:
    """Functions among what a value holds, and methods of objects of the user's classes."""
    if isinstance(value, types.FunctionType | types.MethodType):
        yield value
    elif isinstance(value, functools.partial):
        yield from functions_in((value.func, value.args, value.keywords), depth)
    elif isinstance(value, list | tuple | dict):
        if depth and base_of(value).__len__(value) < _MOST_PARTS:
            for part in items_of(value):
                yield from functions_in(part, depth - 1)
    elif not isinstance(value, type | torch.Tensor | nn.Module):
        yield from _methods(type(value))


def _methods(cls: type) -> Iterator[Any]:
    if is_library_name(cls.__module__) or issubclass(cls, nn.Module):
        return
    for member in vars(cls).values():
        if isinstance(member, staticmethod | classmethod | property):
            yield member.fget if isinstance(member, property) else member.__func__
        elif isinstance(member, types.FunctionType):
            yield member


def _chains(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """Names that code begins at, each with the attributes that it takes of them at once."""
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if chain and step.opname in _ATTRIBUTE:
            chain = (*chain, step.argval)
            continue
        if chain:
            yield chain
        chain = (step.argval,) if step.opname in _NAME else ()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _chains(constant)


def _inner(value: Any, attribute: str) -> Callable[[Read], Any] | None:
    """How to read an attribute of what is read; None where it takes more than reading, or where
    nothing is looked into.
    """
    if isinstance(value, types.ModuleType):
        known = is_library_name(value.__name__)
        return None if known else lambda read: vars(read()).get(attribute, MISSING)
    kind = value if isinstance(value, type) else type(value)
    if is_library_name(kind.__module__) and kind.__name__ not in _OPENED:
        if not isinstance(value, types.FunctionType):
            return None
    elif isinstance(value, nn.Module) or (
        kind is not value and isinstance(inspect.getattr_static(kind, attribute, None), _COMPUTED)
    ):
        return None  # a method, or a property, may read all of its object
    return lambda read: getattr(read(), attribute, MISSING)


def _is_opened(value: Any) -> bool:
    """Whether what an object holds is compared; not of those of Python's own classes."""
    kind = type(value)
    if isinstance(value, types.BuiltinFunctionType | types.ModuleType):
        return False
    known = isinstance(value, torch.Tensor) or kind in ATOMS or kind.__name__ in _OPENED
    return known or kind.__module__ == "builtins" or not is_library_name(kind.__module__)


def _is_environment(value: Any, attributes: list[str]) -> bool:
    """Whether code reads the variables of the process."""
    value = getattr(value, attributes[0], value) if value is os and attributes else value
    return value is os.environ or value is os.getenv


def _environment() -> str:
    return "\n".join(map("=".join, os.environ.items()))


def _in_context(variable: Any) -> Any:
    known = isinstance(variable, contextvars.ContextVar)  # it may have been replaced
    return variable.get(MISSING) if known else variable


def is_library_name(module: Any) -> bool:
    """Whether a Python module is torch's, NumPy's, Python's or ours."""
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def _defaults(function: types.FunctionType) -> Any:
    return function.__defaults__, function.__kwdefaults__
