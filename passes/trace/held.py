"""Plain values that a model's code has read while it was traced, and whether they are still so.

A graph holds fast what Python saw: the numbers, flags and strings among the attributes of the
modules that were looked into, what helper objects and arguments hold, hooks that were not there,
and modes of torch that were asked for. Each becomes a guard here, looked at in every call.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import ATOMS, Itself, Without, picture, unopened
from .contents import MISSING
from .outside import Outside
from .ownership import LIBRARY
from .settings import casts, device_kinds
from .state import MODULE_INTERNALS
from .values import tensors_in

_NOT_READ_BY_FORWARD = MODULE_INTERNALS | {
    "_compiled_call_impl", "call_super_init", "dump_patches", "_version", "forward",
}  # fmt: skip
# what code may ask torch for, without a tensor in hand
_MODES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    *((n, ()) for n in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")),
    *((n, ()) for n in ("get_default_dtype", "is_anomaly_enabled")),
    *((n, ()) for n in ("are_deterministic_algorithms_enabled", "get_float32_matmul_precision")),
)
_CASTS = ("get_autocast_dtype", "is_autocast_enabled")  # asked of a kind of device
# tables whose entries code goes through, of modules that are lists and the like; where an entry of
# another module was exchanged, the variant notices it without (``Variant.bound``)
TABLES = ("_modules", "_parameters", "_buffers")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# hooks on all modules there are
_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = tuple(
    table for name in HOOKS if (table := getattr(torch.nn.modules.module, f"_global{name}", None))
    is not None
)  # fmt: skip
_NOTHING = (picture(MISSING), picture(None))
_FIXED = (*ATOMS, types.BuiltinFunctionType, type)
MODES = frozenset([*_CASTS, *(name for name, _ in _MODES)])
GRAD = "is_grad_enabled"
GRAD_MODE = f"torch.{GRAD}"  # the place of its guard


class Held:
    """A value that a graph holds fast.

    Args:
        place: what was read, for people.
        read: reads it again.
        was: what was read while the graph was recorded; `MISSING` to read it now.
        opened: whether its picture is compared, since the object may change.
        without: what its picture leaves out.

    Attributes:
        was: the value, or its picture.
    """

    __slots__ = ("_fixed", "_opened", "_without", "place", "read", "was")

    def __init__(
        self,
        place: str,
        read: Callable[[], Any],
        was: Any = MISSING,
        opened: bool = True,
        without: Without = frozenset(),
    ) -> None:
        self.place, self.read, self._opened, self._without = place, read, opened, without
        was = read() if was is MISSING else was
        # where the same object cannot be another value
        self._fixed = was if type(was) in _FIXED else MISSING
        self.was = picture(was, without) if opened else was

    def holds(self) -> bool:
        """Whether it is still the same."""
        try:
            now = self.read()
        except AttributeError:
            return False
        if now is self._fixed and now is not MISSING:
            return True
        now = picture(now, self._without) if self._opened else now
        return bool(now == self.was)

    def values(self) -> str:
        """What it was and is, in brackets; nothing where it is no number, flag or text."""
        now = MISSING
        with contextlib.suppress(AttributeError):
            now = self.read()
        known = isinstance(self.was, tuple) and len(self.was) == 2 and type(now) in ATOMS
        return f" ({self.was[1]!r} before, {now!r} now)" if known else ""


class Reads:
    """Notes what is read in one recording.

    Args:
        copies: whether the graph holds copies of tensors that are plain attributes.
        without: what is set in every call before it is read.

    Attributes:
        tensors: where tensors that are attributes were read, by identity: module and name.
    """

    def __init__(self, copies: bool = False, without: Without = frozenset()) -> None:
        self._copies, self._without = copies, without
        # as it is around the model, whatever regions the model enters itself
        asked = (*_MODES, *((n, (kind,)) for n in _CASTS for kind in device_kinds()))
        self._ambient = {(n, a): getattr(torch, n)(*a) for n, a in asked}
        self.tensors: dict[int, tuple[nn.Module, str]] = {}
        self._held: dict[Any, Held] = {}
        self._alive: list[Any] = []
        self._outside = Outside(self._refers, self.mode, _BY_FUNCTION)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Autocast as it is around the model, whatever regions the model is in."""
        with contextlib.ExitStack() as stack:
            for kind, *now in casts():
                was = [self._ambient[name, (kind,)] for name in _CASTS]
                if was != now:
                    stack.enter_context(torch.autocast(kind, *was))
            yield

    @property
    def held(self) -> tuple[Held, ...]:
        """All that was read."""
        return tuple(self._held.values())

    def baked_in(self) -> list[str]:
        """What no guard notices a change of, with its place, for the plan."""
        found = dict(self._outside.unseen)
        for held in self._held.values():
            for value, why in unopened(held.was):
                found[f"what the {type(value).__name__} in {held.place} holds: it {why}"] = None
        return [f"baked in: {text}" for text in found]

    def attribute(
        self, module: nn.Module, path: str | None, name: str, value: Any, outlined: bool = False
    ) -> None:
        """A module's attribute was read; `MISSING` where it has none of that name.

        Args:
            module: whose it is.
            path: of the module.
            name: of the attribute.
            value: what was read.
            outlined: whether tensors in it may be others of the same shapes and kinds.
        """
        key = id(module), name
        stand_in = type(module).__module__.startswith("dni_fx.")  # with fields of its own
        if key in self._held or stand_in:
            return
        if name in TABLES and path and isinstance(module, _CONTAINERS):  # no list made on the way
            self._hold(key, path, name, functools.partial(_Entries, module, name), False)
        elif name == "__dict__":
            self._hold(key, path, name, functools.partial(_own, module))
        elif name in _NOT_READ_BY_FORWARD or name.startswith("__"):
            return
        elif isinstance(value, torch.Tensor):
            if self._copies:
                self._hold(key, path, name, functools.partial(getattr, module, name, MISSING))
            elif name in vars(module):
                self.tensors[id(value)] = module, name
                self._alive.append(value)
                self._hold(key, path, name, functools.partial(_facts, module, name))
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            self._method(module, path, name, value)
        elif not isinstance(value, nn.Module):
            member = getattr(type(module), name, None)
            if isinstance(member, property):  # what it reads is noted by itself
                self._outside.function(member.fget)
                return
            read = functools.partial(_outline if outlined else getattr, module, name, MISSING)
            self._hold(key, path, name, read)
            self._outside.held(value)

    def facts(self, module: nn.Module, path: str, name: str) -> None:
        """The shape, or the like, of a tensor of a module's was asked for."""
        self._hold((id(module), name), path, name, functools.partial(_facts, module, name))

    def _method(
        self, module: nn.Module, path: str | None, name: str, method: types.MethodType
    ) -> None:
        function = method.__func__
        code = getattr(function, "__code__", None)
        if code is not None and not code.co_filename.startswith(LIBRARY):
            read = functools.partial(_function_of, name, module)
            self._hold((id(module), name), path, name, read)
            self._outside.function(function)

    def _hold(
        self, key: Any, path: str | None, name: str, read: Callable[[], Any], opened: bool = True
    ) -> None:
        place = f"'{path}.{name}'" if path else f"'{name}'"
        self._held[key] = self._holds(place, self._baked(read) if opened else read, opened)

    def _holds(self, place: str, read: Callable[[], Any], opened: bool = True) -> Held:
        return Held(place, read, opened=opened, without=self._without)

    def _refers(self, place: str, read: Callable[[], Any]) -> None:
        """Code that runs refers to something outside of the model."""
        self._held[id(read), ""] = self._holds(f"'{place}' in the code", self._baked(read))
        self._alive.append(read)

    def is_empty(self, module: nn.Module, name: str) -> bool:
        """Whether an attribute was not read, or there was none, or None."""
        held = self._held.get((id(module), name))
        return held is None or held.was in _NOTHING

    def training(self, module: nn.Module, path: str | None) -> None:
        """The mode of a module was read from outside of it."""
        self._hold((id(module), "training"), path, "training", lambda: module.training)

    def gradient(self, name: str, parameter: torch.Tensor) -> None:
        """Whether a parameter has a gradient was asked."""
        read = lambda: parameter.grad is None  # noqa: E731
        self._held[id(parameter), "grad"] = Held(f"'{name}.grad'", read)

    def visited(self, module: nn.Module, path: str) -> None:
        """A module was looked into: it must stay what it was, without hooks."""
        read = functools.partial(_character, module)
        self._held[id(module), ""] = Held(f"hooks of '{path}'", read, opened=False)
        self._outside.function(type(module).forward)
        self._outside.held(vars(module).get("forward"))

    def foreign(self, module: nn.Module) -> None:
        """A module was called that is none of the model's."""
        read = functools.partial(_inside, module)
        name = type(module).__name__
        self._held[id(module), ""] = Held(f"'{name}' outside of the model", read, opened=False)

    def mode(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        """One of torch's modes was asked for; with any arguments where these are not known."""
        for known, was in self._ambient.items():
            if known == (name, args) or (known[0] == name and args is None):
                read = functools.partial(getattr(torch, name), *known[1])
                self._held["mode", known] = Held(f"torch.{name}", read, was)

    def _baked(self, read: Callable[[], Any]) -> Callable[[], Any]:
        """Where tensors are copied into the graph, what is in them is held fast, too."""
        return functools.partial(_with_versions, read) if self._copies else read


def broken(held: Sequence[Held]) -> Held | None:
    """The first value that has changed."""
    return next((h for h in held if not h.holds()), None)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )


def _facts(module: nn.Module, name: str) -> Any:
    """What a graph holds fast of a tensor that it reads in every call."""
    return _facts_of(getattr(module, name))


def _outline(module: nn.Module, name: str, default: Any) -> Any:
    """What an attribute holds, but of tensors only shapes and kinds."""
    parts = picture(getattr(module, name, default))
    return [_facts_of(p.value) if isinstance(p, Itself) else p for p in parts]


def _facts_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    strides = value.stride() if value.layout is torch.strided else None
    return value.shape, strides, value.dtype, value.device, value.layout, value.requires_grad


def _character(module: nn.Module) -> tuple[Any, ...]:
    kind = type(module)
    hooks = (*_hooks_of(module),) if is_hooked(module) else ()
    return kind, kind.forward, hooks, vars(module).get("forward")


def _inside(module: nn.Module) -> tuple[Any, ...]:
    """What a module is, and all that is registered with it."""
    return *_character(module), module.training, *(_Entries(module, name) for name in TABLES)


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    for table in (*(getattr(module, name) for name in HOOKS), *_GLOBAL_HOOKS):
        yield from table.values()


class _Entries:
    """What is registered with a module; equal where it is the same things."""

    __slots__ = ("table",)

    def __init__(self, module: nn.Module, name: str) -> None:
        self.table = vars(module)[name].copy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Entries) or len(self.table) != len(other.table):
            return False
        pairs = zip(self.table.items(), other.table.items(), strict=True)
        return all(v is w and k == n for (k, v), (n, w) in pairs)

    __hash__ = None  # type: ignore[assignment]


def _with_versions(read: Callable[[], Any]) -> tuple[Any, list[int]]:
    value = read()
    return value, [t._version for t in tensors_in(value) if not t.is_inference()]


def _own(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _NOT_READ_BY_FORWARD}


def _function_of(name: str, module: nn.Module) -> Any:
    return getattr(getattr(module, name, None), "__func__", MISSING)


# as code may have bound them to names of its own
_BY_FUNCTION = {getattr(torch, name): name for name in MODES}
