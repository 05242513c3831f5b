"""What the code of a model refers to outside of itself: globals, closures, defaults, classes.

Code is read, not run: a name is followed as far as the code follows it (``settings.scale``), and a
function that is found on the way is read in its turn. The code of torch and of Python is not read.
"""

from __future__ import annotations

import builtins
import contextvars
import dis
import enum
import functools
import importlib.util
import inspect
import os
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import owner_of
from ...graphs.pictures import ATOMS, IMMUTABLE, base_of, content, items_of, slots_of
from .contents import MISSING, content_of
from .ownership import file_of, is_library, is_library_name, is_users

_MOST = 2_000  # functions that are read
_OPENED = {"SimpleNamespace", "partial", "deque", "OrderedDict", "defaultdict", "UserDict"}
_OPENED |= {"ndarray", "array", "ChainMap", "Counter", "_local"}  # the last of a thread
_MOST_PARTS = 100  # of a container that is searched for functions
_MAKING = {"__init__", "__new__", "__init_subclass__"}
_FUNCTIONS = types.FunctionType | types.BuiltinFunctionType
_COMPUTED = property | functools.cached_property | staticmethod | classmethod | types.FunctionType
_OF_THE_MOMENT = re.compile(
    r"(time\.(time|monotonic|perf_counter|process_time|\w+_ns|ctime|localtime|gmtime|strftime)"
    r"|datetime\.(.*\.)?(now|today|utcnow)|secrets\..*|uuid\.uuid[14]|socket\.gethostname"
    r"|os\.(getcwd|listdir|scandir|stat|getpid|urandom)"
    r"|os\.path\.(exists|isfile|isdir|getmtime|getsize)"
    r"|io\.open|open|input)"
)  # what no look at a value tells to be the same
_NO_CONTENT = (types.BuiltinFunctionType, typing.TypeVar, weakref.ref)
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_STORED, _LOADED = {"STORE_FAST", "STORE_DEREF"}, {"LOAD_FAST", "LOAD_DEREF"}
_NAME = {"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"}

Read = Callable[[], Any]


class Outside:
    """Reads functions, and tells what they refer to.

    Args:
        hold: is told a place, for people, and how to read what is there.
        mode: is told the name of a function of torch's that tells a mode.
        modes: the names of these functions.

    Attributes:
        unseen: what is referred to, and cannot be looked at anew, with its place.
    """

    def __init__(
        self,
        hold: Callable[[str, Read], None],
        mode: Callable[[str], None],
        modes: Mapping[Any, str],
    ) -> None:
        self._hold, self._mode, self._modes = hold, mode, modes
        self._seen: dict[Any, Any] = {}
        self._code = self._file = ""  # that is read
        self._names: set[str] = set()  # that code uses
        self._waiting: dict[str, list[Any]] = {}  # inherited methods that none uses yet
        self.unseen: dict[str, None] = {}

    def function(self, function: Any) -> None:
        """A function that the model calls."""
        pending = [function]
        while pending and len(self._seen) < _MOST:
            pending += self._read(pending.pop())
        if pending:
            self.unseen[f"what code refers to beyond the first {_MOST:,} functions"] = None

    def held(self, value: Any) -> None:
        """Something that the model keeps: functions in it may be called, classes looked at."""
        for each in functions_in(value):
            self.function(each)

    def _read(self, function: Any) -> Iterator[Any]:
        """What one function refers to; other functions that it leads to."""
        if isinstance(function, type | types.ModuleType):
            yield from self._members(function)
            return
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
        code = function.__code__
        self._file = file_of(function)
        self._code = f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for name in {*_names(code)} - self._names:
            self._names.add(name)
            yield from self._waiting.pop(name, ())
        for chain in set(_chains(code, function.__globals__.get("__package__"))):
            yield from self._follow(chain, cells, function.__globals__)

    def _members(self, owner: Any) -> Iterator[Any]:
        """What objects of a class, or code that is handed a Python module, find there."""
        if id(owner) in self._seen:
            return
        self._seen[id(owner)] = owner
        if isinstance(owner, types.ModuleType):
            self._hold(owner.__name__, functools.partial(_atoms_of, owner))
        elif not issubclass(owner, enum.Enum):
            self._hold(owner.__qualname__, functools.partial(_values_of, owner))
            for name, function in _methods(owner):
                implied = name in vars(owner) or (name[:2] == "__" and name not in _MAKING)
                if implied or name in self._names:
                    yield function
                else:
                    self._waiting.setdefault(name, []).append(function)

    def _follow(
        self, chain: tuple[str, ...], cells: dict[str, Any], namespace: dict[str, Any]
    ) -> Iterator[Any]:
        name, *attributes = chain
        read: Read
        if isinstance(name, _Imported):
            read = functools.partial(sys.modules.get, str(name), MISSING)
        elif name in cells:
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
        if isinstance(value, nn.Module):  # its attributes are noted where they are read
            self._hold(place, read)
        elif value is not MISSING:
            self._look_up(value, ".".join(chain))
            yield from self._end(value, place, read)
        else:
            self._look_up(vars(builtins).get(name), name)

    def _look_up(self, value: Any, chain: str) -> None:
        """Note what is never twice the same, by the name that it has where it comes from."""
        if isinstance(value, types.BuiltinFunctionType | types.FunctionType):
            name = f"{value.__module__}.{value.__name__}".removeprefix("builtins.")
        elif isinstance(value, types.ModuleType | type):
            name = f"{value.__name__}.{chain.partition('.')[2]}"
        else:
            return
        if _OF_THE_MOMENT.fullmatch(name):
            self._tell(f"what '{chain}' gives in {self._code}: it may be another each time")

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
                yield from [value] if is_users(value) else []
        elif isinstance(value, contextvars.ContextVar):
            self._hold(place, lambda: _in_context(read()))
            yield from functions_in(_in_context(value))
        elif _is_opened(value):
            self._hold(place, read)
            yield from functions_in(value)
        elif isinstance(value, types.ModuleType):
            yield from functions_in(value)
        elif not isinstance(value, (*_NO_CONTENT, *IMMUTABLE)):
            what = f"what the {type(value).__name__} '{place}' in {self._code} holds"
            self._tell(f"{what}: it is of a library's class")

    def _tell(self, what: str) -> None:
        """Of the user's own code: installed packages could do far more than they do."""
        if owner_of(self._file) == "user":
            self.unseen[what] = None


def functions_in(value: Any, depth: int = 3) -> Iterator[Any]:
    """Functions among what a value holds, and classes of its objects that are the user's."""
    if str(type(value).__module__).startswith("dni_fx."):
        return  # what stands where nobody may read
    if isinstance(value, types.FunctionType | types.MethodType):
        yield value
    elif isinstance(value, functools.partial):
        yield from functions_in((value.func, value.args, value.keywords), depth)
    elif isinstance(value, list | tuple | dict):
        if depth and base_of(value).__len__(value) < _MOST_PARTS:
            for part in items_of(value):
                yield from functions_in(part, depth - 1)
    elif isinstance(value, type | types.ModuleType):
        yield from [value] if is_users(value) else []
    elif isinstance(value, weakref.ref):
        yield from functions_in(value(), depth)
    elif not isinstance(value, torch.Tensor | nn.Module):
        cls = type(value)
        if not is_library_name(cls.__module__):
            yield cls
            if depth and type(held := getattr(value, "__dict__", None)) is dict:
                yield from functions_in(held, depth - 1)
            if depth:
                yield from functions_in([content(value, s, None) for s in slots_of(cls)], depth - 1)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The functions of a class, and of the user's classes that it comes from, with their names."""
    if issubclass(cls, nn.Module):
        return
    for base in _own_bases(cls):
        for name, member in vars(base).items():
            if isinstance(member, staticmethod | classmethod | property):
                yield name, member.fget if isinstance(member, property) else member.__func__
            elif isinstance(member, functools.cached_property):
                yield name, member.func
            elif isinstance(member, types.FunctionType):
                yield name, member
            elif hasattr(type(member), "__get__"):
                yield from ((name, found) for found in functions_in(member))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _own_bases(cls: type) -> Iterator[type]:
    return (base for base in cls.__mro__ if not is_library_name(base.__module__))


def _values_of(cls: type) -> dict[tuple[int, str], Any]:
    """What objects of a class share."""
    return {
        (index, name): value
        for index, base in enumerate(_own_bases(cls))
        for name, value in vars(base).copy().items()
        if not (name.startswith("__") or name == "_abc_impl" or _is_member(value))
    }


def _is_member(value: Any) -> bool:
    """Whether it is read by a method of Python's own."""
    kind = type(value)
    return hasattr(kind, "__get__") and is_library_name(kind.__module__)


def _atoms_of(module: types.ModuleType) -> dict[str, Any]:
    known = vars(module).copy()
    return {n: v for n, v in known.items() if type(v) in ATOMS and not n.startswith("__")}


def _chains(code: types.CodeType, package: str | None) -> Iterator[tuple[str, ...]]:
    """Names that code begins at, each with the attributes that it takes of them at once. What the
    code imports itself begins with the name of a Python module.
    """
    chain: tuple[str, ...] = ()
    imported: dict[str, tuple[str, ...]] = {}  # by the local names that stand for it
    constants: list[Any] = [None, None]
    root: tuple[str, ...] = ()
    current = root
    for step in dis.get_instructions(code):
        if chain and step.opname in _ATTRIBUTE:
            chain = (*chain, step.argval)
            continue
        if chain:
            yield chain
        chain = (step.argval,) if step.opname in _NAME else ()
        if step.opname == "LOAD_CONST":
            constants = [constants[-1], step.argval]
        elif step.opname == "IMPORT_NAME":
            root = current = (
                _Imported(_absolute(step.argval, constants[0], constants[1], package)),
            )
        elif step.opname == "IMPORT_FROM":
            current = (*root, step.argval)
        elif step.opname in _STORED and root:
            imported[step.argval], current = current, root
        elif step.opname == "POP_TOP":
            root = ()
        elif step.opname in _LOADED and step.argval in imported:
            chain = imported[step.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _chains(constant, package)


class _Imported(str):
    """Name of a Python module, and not of a variable."""


def _absolute(name: str, level: Any, wanted: Any, package: str | None) -> str:
    """The full name of a Python module that code imports."""
    if level and package:
        return importlib.util.resolve_name("." * level + name, package)
    return name if wanted else name.partition(".")[0]


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
    known = known or kind.__module__.startswith("torch.distributions")
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


def _defaults(function: types.FunctionType) -> Any:
    return function.__defaults__, function.__kwdefaults__
