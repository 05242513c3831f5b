"""Updates of several optimisers: all of them, or none.

An optimiser that fails half-way, or after others have stepped, is undone from copies. They cost as
much as a step of Adam, so they are made where a step may fail: the first steps of all optimisers,
in which states are made and wrong usage shows, and every step of those that are not torch's own.
A signal that comes meanwhile is held until the step is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .joint import is_plain

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AFTER = 0.1  # seconds after the updates in which a step ends
_stepped = weakref.WeakSet[torch.optim.Optimizer]()


@contextlib.contextmanager
def whole(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """A region after which these have stepped, or, where it fails, are as before: what they step,
    their states and their settings.
    """
    every = list(optimizers)
    copies = not all(map(_is_proven, every))
    put_back = [remembered(optimizer) for optimizer in every] if copies else []
    try:
        with contextlib.nullcontext() if copies else held_signals():
            yield
    except BaseException:
        with torch.no_grad():
            for restore in put_back:
                restore()
        raise
    _stepped.update(every)


def _is_proven(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's own, and has stepped all that it steps now."""
    state, groups = optimizer.state, optimizer.param_groups
    if optimizer not in _stepped or not is_plain(optimizer):
        return False
    if not state or len(state) == sum(len(group["params"]) for group in groups):
        return True  # none, as SGD's without momentum, or of all
    return all(p in state for group in groups for p in group["params"] if p.grad is not None)


def remembered(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Puts an optimiser, its states and what it steps back to where they are now."""
    groups, states = optimizer.param_groups, optimizer.state
    settings = [dict(group) for group in groups]
    known = {p: dict(state) for p, state in states.items()}
    tensors = [v for v in tree_leaves([settings, [*known.values()]]) if isinstance(v, torch.Tensor)]
    contents = [t.detach().clone() for t in tensors]

    def restore() -> None:
        for group, setting in zip(groups, settings, strict=True):
            group.clear()
            group.update(setting)
        for parameter in states.keys() - known.keys():  # born in the step
            del states[parameter]
        for parameter, state in known.items():
            states[parameter] = state
        for tensor, content in zip(tensors, contents, strict=True):
            tensor.copy_(content)

    return restore


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Signals that Python handles come when the step is over, not between two updates."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        for number in _SIGNALS:
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda n, _: came.append(n))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held in came:
            later = threading.Timer(_AFTER, os.kill, (os.getpid(), held))
            later.daemon = True
            later.start()
