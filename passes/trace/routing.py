"""Leads what a model calls to the recorder, for as long as a recording lasts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .calls import unvalidated
from .recorder import Recorder


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Route module calls, custom functions and autocast regions of this thread to the recorder."""
    module_call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    thread = threading.get_ident()
    entered: list[Any] = []  # regions, innermost last

    def watches() -> bool:
        return not recorder.paused and threading.get_ident() == thread

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if watches():
            return recorder.call_module(module_call, module, args, kwargs)
        return module_call(module, *args, **kwargs)

    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if watches():
            return recorder.call_function(cls, args)
        return apply.__func__(cls, *args, **kwargs)

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

    nn.Module.__call__ = call  # type: ignore[method-assign]
    function: Any = torch.autograd.Function
    region: Any = torch.autocast
    function.apply = classmethod(function_apply)
    region.__enter__, region.__exit__ = autocast_enter, autocast_exit
    try:
        with unvalidated(), recorder.fake or contextlib.nullcontext(), recorder:
            yield
    finally:
        recorder.sizes.looks.over = True
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        function.apply = apply
        region.__enter__, region.__exit__ = enter, leave
