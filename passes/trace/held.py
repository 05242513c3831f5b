"""Plain values that a model's code has read while it was traced, and whether they are still so.

A graph holds fast what Python saw: the numbers, flags and strings among the attributes of the
modules that were looked into, what helper objects and arguments hold, hooks that were not there,
and modes of torch that were asked for. Each becomes a guard here, looked at in every call.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import picture
from .state import MODULE_INTERNALS

_NOT_READ_BY_FORWARD = MODULE_INTERNALS | {
    "_compiled_call_impl", "call_super_init", "dump_patches", "_version",
}  # fmt: skip
# what code may ask torch for, without a tensor in hand
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_MODES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    *((n, ()) for n in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")),
    *((n, ()) for n in ("get_default_dtype", "is_anomaly_enabled")),
    *((n, ()) for n in ("are_deterministic_algorithms_enabled", "get_float32_matmul_precision")),
    *(("is_autocast_enabled", (d,)) for d in _DEVICES),
    *(("get_autocast_dtype", (d,)) for d in _DEVICES),
)
LIBRARY = str(torch.__path__[0])  # torch's own code is not what the user writes
_DEEPEST = 3  # functions that call functions, whose globals are looked at
_PLAIN_GLOBALS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, torch.Tensor)
MODES = frozenset(name for name, _ in _MODES)
GRAD = "is_grad_enabled"
GRAD_MODE = f"torch.{GRAD}"  # the place of its guard


@dataclass(frozen=True)
class Held:
    """A value that a graph holds fast.

    Attributes:
        place: what was read, for people.
        read: reads it again.
        was: what was read while the graph was recorded, or its picture.
        opened: whether it is a picture, since the object may change.
    """

    place: str
    read: Callable[[], Any]
    was: Any
    opened: bool = True

    def holds(self) -> bool:
        """Whether it is still the same."""
        try:
            now = self.read()
        except AttributeError:
            return False
        return bool((picture(now) if self.opened else now) == self.was)


class Reads:
    """Notes what is read in one recording.

    Attributes:
        tensors: where tensors that are attributes were read, by identity: module and name.
    """

    def __init__(self) -> None:
        # as it is around the model, whatever regions the model enters itself
        self._ambient = {(n, a): getattr(torch, n)(*a) for n, a in _MODES}
        self.tensors: dict[int, tuple[nn.Module, str]] = {}
        self._held: dict[tuple[int, str], Held] = {}
        self._alive: list[Any] = []
        self._seen: set[types.FunctionType] = set()

    @property
    def held(self) -> tuple[Held, ...]:
        """All that was read."""
        return tuple(self._held.values())

    def attribute(self, module: nn.Module, path: str | None, name: str, value: Any) -> None:
        """A module's attribute was read."""
        if (
            name in _NOT_READ_BY_FORWARD
            or name.startswith("__")
            or (id(module), name) in self._held
            or type(module).__module__.startswith("dni_fx.")  # stand-ins, with fields of their own
        ):
            return
        if isinstance(value, torch.Tensor):
            if name in vars(module):
                self.tensors[id(value)] = module, name
                self._alive.append(value)
                self._hold(module, path, name, functools.partial(_facts, module, name))
            return
        if isinstance(value, types.MethodType | nn.Module):
            return
        if isinstance(getattr(type(module), name, None), property):
            return  # what it reads is noted by itself
        self._hold(module, path, name, functools.partial(getattr, module, name))

    def _hold(
        self, module: nn.Module, path: str | None, name: str, read: Callable[[], Any]
    ) -> None:
        place = f"'{path}.{name}'" if path else f"'{name}'"
        self._held[id(module), name] = Held(place, read, picture(read()))

    def visited(self, module: nn.Module, path: str) -> None:
        """A module was looked into: it must stay what it was, without hooks."""
        read = functools.partial(_character, module)
        self._held[id(module), ""] = Held(f"hooks of '{path}'", read, read(), opened=False)
        self._globals_of(type(module).forward, _DEEPEST)

    def _globals_of(self, function: Any, depth: int) -> None:
        """Plain values outside the function that its code refers to, and functions of the same kind
        that it calls.
        """
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType) or function in self._seen:
            return
        self._seen.add(function)
        if function.__code__.co_filename.startswith(LIBRARY):
            return
        table = function.__globals__
        for name in _names_of(function.__code__):
            value = table.get(name)
            if isinstance(value, _PLAIN_GLOBALS):
                read = functools.partial(table.get, name)
                self._held[id(table), name] = Held(f"global {name}", read, picture(value))
            elif depth:
                self._globals_of(value, depth - 1)

    def mode(self, name: str, args: tuple[Any, ...] = ()) -> None:
        """One of torch's modes was asked for."""
        if (name, args) in self._ambient:
            read = functools.partial(getattr(torch, name), *args)
            was = picture(self._ambient[name, args])
            self._held[hash(args), name] = Held(f"torch.{name}", read, was)


def _names_of(code: types.CodeType) -> set[str]:
    """Global names that a function's code loads, those of functions inside it included."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return own.union(*(_names_of(c) for c in inner))


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
    )


def _facts(module: nn.Module, name: str) -> Any:
    """What a graph holds fast of a tensor that it reads in every call."""
    value = getattr(module, name)
    if not isinstance(value, torch.Tensor):
        return value
    strides = value.stride() if value.layout is torch.strided else None
    return value.shape, strides, value.dtype, value.device, value.layout, value.requires_grad


def _character(module: nn.Module) -> tuple[Any, ...]:
    return type(module), is_hooked(module), vars(module).get("forward")
