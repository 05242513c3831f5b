"""Leads what a model calls to the recorder, for as long as a recording lasts."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .calls import unvalidated
from .contents import MISSING
from .held import MODES, TABLES
from .ownership import LIBRARY, OURS, TORCH
from .recorder import Recorder

# torch's own, whose code is exchanged while something is recorded: names that were bound to
# ``SomeFunction.apply`` at import (the usual idiom) must lead to the recorder, too
_APPLY = torch.autograd.Function.__dict__["apply"].__func__
_ORIGINAL = types.FunctionType(
    _APPLY.__code__, _APPLY.__globals__, "apply", _APPLY.__defaults__, _APPLY.__closure__
)
_CONTAINERS = f"{TORCH}/nn/modules/"  # hand out what is registered with a module
# These remember torch's functions, as long as the process lives: not those in their place, which
# would keep the recorder, and with it every value of the model
_OVERRIDES = (
    torch.overrides.get_ignored_functions,
    torch.overrides.get_default_nowrap_functions,
    torch.overrides.get_testing_overrides,
    torch.overrides.get_overridable_functions,
)
_leads: list[Callable[[Any, Any, Any], Any]] = []  # of the recordings under way, innermost last
_APPLY.__globals__["_dni_fx_leads"] = _leads


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Route module calls, attributes read, custom functions and autocast regions of this thread to
    the recorder.
    """
    try:
        with (
            _routed(recorder, regions=True),
            unvalidated(),
            recorder.fake or contextlib.nullcontext(),
            recorder,
        ):
            yield
    finally:
        recorder.sizes.looks.over = True


def watching(watcher: Any) -> contextlib.AbstractContextManager[None]:
    """Tell what a model's code reads, and which modules it calls, while something else runs it.

    Args:
        watcher: is told, as a recorder is.
    """
    return _routed(watcher, regions=False)


@contextlib.contextmanager
def _routed(recorder: Any, regions: bool) -> Iterator[None]:
    for remember in _OVERRIDES:
        remember()
    thread = threading.get_ident()
    routes = _Routes(recorder, lambda: not recorder.paused and threading.get_ident() == thread)
    _leads.append(routes.apply)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in routes.table(regions):
                stack.enter_context(_replaced(owner, name, value))
            yield
    finally:
        _leads.pop()


class _Routes:
    """What stands in the place of torch's own functions meanwhile."""

    def __init__(self, recorder: Any, watches: Callable[[], bool]) -> None:
        self.recorder, self.watches = recorder, watches
        self._entered: list[Any] = []  # autocast regions, innermost last

    def table(self, regions: bool) -> Iterator[tuple[Any, str, Any]]:
        """Where, under which name, and what: by which modules and custom functions are called,
        plain values read and, if asked for, autocast regions entered.
        """
        yield _APPLY, "__code__", _Shell.__dict__["apply"].__func__.__code__
        if regions:
            yield torch.autocast, "__enter__", self._enter(torch.autocast.__enter__)
            yield torch.autocast, "__exit__", self._leave(torch.autocast.__exit__)
        yield nn.Module, "__call__", self._call(nn.Module.__call__)
        yield nn.Module, "__getattribute__", self._attribute()
        yield nn.Module, "__setattr__", self._assign(nn.Module.__setattr__)
        for name in MODES:
            yield torch, name, self._mode(name, getattr(torch, name))

    def apply(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """In place of ``Function.apply``."""
        if self.watches():
            return self.recorder.call_function(cls, args)
        return _ORIGINAL(cls, *args, **kwargs)

    def _call(self, original: Any) -> Any:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.watches():
                return self.recorder.call_module(original, module, args, kwargs)
            return original(module, *args, **kwargs)

        return call

    def _attribute(self) -> Any:
        def attribute(module: Any, name: str) -> Any:
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                if self.watches() and not _is_registered(module, name) and not by_library(2):
                    self.recorder.read_attribute(module, name, MISSING)
                raise
            if self.watches() and not _is_internal(name, sys._getframe(1).f_code.co_filename):
                self.recorder.read_attribute(module, name, value)
            return value

        return attribute

    def _assign(self, original: Any) -> Any:
        def assign(module: nn.Module, name: str, value: Any) -> None:
            if self.watches():
                self.recorder.visits.writes(module, name, value)
            original(module, name, value)

        return assign

    def _mode(self, name: str, original: Any) -> Any:
        def mode(*args: Any) -> Any:
            if self.watches() and not by_library(2):
                self.recorder.reads.mode(name, args)
            return original(*args)

        return mode

    def _enter(self, original: Any) -> Any:
        def enter(region: Any) -> Any:
            if self.watches():
                self._entered.append(region)
                self.recorder.autocasts.append(
                    (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
                )
            return original(region)

        return enter

    def _leave(self, original: Any) -> Any:
        def leave(region: Any, *error: Any) -> Any:
            if self._entered and self._entered[-1] is region:
                self._entered.pop()
                self.recorder.autocasts.pop()
            return original(region, *error)

        return leave


def by_library(depth: int) -> bool:
    """Whether it is torch's code, or ours, that calls."""
    return sys._getframe(depth).f_code.co_filename.startswith(LIBRARY)


def _is_internal(name: str, file: str) -> bool:
    """Whether reading an attribute there is no affair of the model's."""
    if file.startswith(OURS):
        return True
    if name == "__dict__":
        return file.startswith(TORCH)
    return name in TABLES and file.startswith(TORCH) and not file.startswith(_CONTAINERS)


def _is_registered(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter, buffer or module of this name."""
    own = object.__getattribute__(module, "__dict__")
    return any(name in own.get(table, ()) for table in ("_parameters", "_buffers", "_modules"))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute, meanwhile."""
    own = name in vars(owner) or name == "__code__"
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # it was inherited


class _Shell:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """In place of ``Function.apply``, with its names and its one free variable."""
        __class__  # type: ignore[name-defined]  # noqa: B018
        return _dni_fx_leads[-1](cls, args, kwargs)  # type: ignore[name-defined]  # noqa: F821
