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

from .held import MODES
from .recorder import Recorder

_LIBRARY = str(torch.__path__[0])
# torch's own, whose code is exchanged while something is recorded: names that were bound to
# ``SomeFunction.apply`` at import (the usual idiom) must lead to the recorder, too
_APPLY = torch.autograd.Function.__dict__["apply"].__func__
_ORIGINAL = types.FunctionType(
    _APPLY.__code__, _APPLY.__globals__, "apply", _APPLY.__defaults__, _APPLY.__closure__
)
_leads: list[Callable[[Any, Any, Any], Any]] = []  # of the recordings under way, innermost last
_APPLY.__globals__["_dni_fx_leads"] = _leads


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Route module calls, custom functions and autocast regions of this thread to the recorder."""
    module_call = nn.Module.__call__
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    thread = threading.get_ident()
    entered: list[Any] = []  # regions, innermost last

    def watches() -> bool:
        return not recorder.paused and threading.get_ident() == thread

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if watches():
            return recorder.call_module(module_call, module, args, kwargs)
        return module_call(module, *args, **kwargs)

    def function_apply(cls: Any, args: Any, kwargs: Any) -> Any:
        if watches():
            return recorder.call_function(cls, args)
        return _ORIGINAL(cls, *args, **kwargs)

    def asked(name: str, original: Any) -> Any:
        def mode(*args: Any) -> Any:
            by_torch = sys._getframe(1).f_code.co_filename.startswith(_LIBRARY)
            if watches() and not by_torch:
                recorder.reads.mode(name, args)
            return original(*args)

        return mode

    def autocast_enter(region: Any) -> Any:
        if watches():
            entered.append(region)
            recorder.autocasts.append(
                (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
            )
        return enter(region)

    def autocast_exit(region: Any, *error: Any) -> Any:
        if entered and entered[-1] is region and threading.get_ident() == thread:
            entered.pop()
            recorder.autocasts.pop()
        return leave(region, *error)

    def attribute(module: Any, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if watches():
            recorder.read_attribute(module, name, value)
        return value

    nn.Module.__getattribute__ = attribute  # type: ignore[method-assign]
    nn.Module.__call__ = call  # type: ignore[method-assign]
    region: Any = torch.autocast
    modes = {name: getattr(torch, name) for name in MODES}
    for name, original in modes.items():
        setattr(torch, name, asked(name, original))
    _leads.append(function_apply)
    _APPLY.__code__ = _Shell.__dict__["apply"].__func__.__code__
    region.__enter__, region.__exit__ = autocast_enter, autocast_exit
    try:
        with recorder.fake or contextlib.nullcontext(), recorder:
            yield
    finally:
        recorder.sizes.looks.over = True
        del nn.Module.__getattribute__  # it was object's
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        _leads.pop()
        if not _leads:
            _APPLY.__code__ = _ORIGINAL.__code__
        for name, original in modes.items():
            setattr(torch, name, original)
        region.__enter__, region.__exit__ = enter, leave


class _Shell:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """In place of ``Function.apply``, with its names and its one free variable."""
        __class__  # type: ignore[name-defined]  # noqa: B018
        return _dni_fx_leads[-1](cls, args, kwargs)  # type: ignore[name-defined]  # noqa: F821
