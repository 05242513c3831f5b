"""Memories of functions while a model runs on tensors of ours: what is put into them must not be
found there by the user's next call.

``functools.lru_cache`` lets nobody take out single results, so wherever code that is about to run
finds such a function, it finds a stand-in for the time being. That one knows what the cache holds,
since a model that draws a table once and remembers it must see the same table, and remembers what
is new for itself. A cache that cannot be reached by reading code is emptied, but only where a fake
tensor is in fact found to have outlived its trace.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .settings import FAKES, unheard

LRU_CACHE: Any = type(functools.lru_cache(len))
_STARTED: Any = (iter([]), iter(()), iter(range(0)))
ITERATORS = (itertools.count, itertools.cycle, *map(type, _STARTED))
REPLACED = frozenset({LRU_CACHE, *ITERATORS})
_NESTED = 6  # how deep in tuples and the like a leaked tensor is looked for


def has_stand_in(value: Any) -> bool:
    """Whether something else is to be found in its place."""
    if isinstance(value, staticmethod | classmethod):
        return isinstance(value.__func__, LRU_CACHE)
    return type(value) in REPLACED


def stand_in(value: Any) -> Any:
    """What code finds in place of a remembering function or an iterator."""
    if isinstance(value, LRU_CACHE):
        return _remembering(value)
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_remembering(value.__func__))
    return copy.copy(value)


def _remembering(cached: Any) -> Callable[..., Any]:
    """A function that reads from a cache and writes to one of its own."""
    function, typed = cached.__wrapped__, cached.cache_parameters()["typed"]
    results, mark = known_results(cached)

    def call(*args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs, typed, mark)
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    functools.update_wrapper(call, cached)
    other: Any = call
    other.__wrapped__ = function
    other.cache_info, other.cache_parameters = cached.cache_info, cached.cache_parameters
    other.cache_clear = results.clear
    return call


def known_results(cached: Any) -> tuple[dict[Any, Any], Any]:
    """What a cache holds by its keys, and the object that parts positional from keyword arguments
    in them. No function tells, but the garbage collector does.
    """
    held = gc.get_referents(cached)
    mark = next((r for r in held if type(r) is object), object())
    at = next(i for i, r in enumerate(held) if type(r) is dict and r is not vars(cached))
    table: dict[Any, Any] = held[at]
    if cached.cache_parameters()["maxsize"] is None:
        return dict(table), mark
    keys, results = held[1:at:3][: len(table)], held[2:at:3][: len(table)]
    known = len(keys) == len(results) == len(table) and {*map(id, keys)} == {*map(id, table)}
    return (dict(zip(keys, results, strict=True)) if known else {}), mark


def _key(args: tuple[Any, ...], kwargs: dict[str, Any], typed: bool, mark: Any) -> Any:
    """As ``functools`` makes it."""
    if not kwargs and not typed and len(args) == 1 and type(args[0]) in (int, str):
        return args[0]
    named = tuple(itertools.chain.from_iterable(kwargs.items()))
    key = (*args, mark, *named) if kwargs else args
    if typed:
        key = (*key, *map(type, args), *map(type, kwargs.values()))
    return key


class Fakes(FakeTensorMode):
    """A fake tensor mode that knows whether its tensors outlive it."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._born: list[weakref.ref[torch.Tensor]] = []

    def from_tensor(self, tensor: torch.Tensor, **options: Any) -> Any:
        return self._noted(super().from_tensor(tensor, **options))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unheard(FAKES):
            return self._noted(super().__torch_dispatch__(func, types, args, kwargs))

    def _noted(self, output: Any) -> Any:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, FakeTensor):
                self._born.append(weakref.ref(value))
        return output

    def alive(self) -> list[torch.Tensor]:
        """Tensors of this mode that somebody holds."""
        found = [ref() for ref in self._born]
        return [t for t in found if t is not None]


@contextlib.contextmanager
def fakes() -> Iterator[Fakes]:
    """A mode whose tensors are taken out of wherever they are held when the region ends.

    The collector waits until then: what is made in the region stays young, so that looking through
    its circles does not mean looking through all that there is, which takes a quarter of a second.
    """
    collects = gc.isenabled()
    gc.disable()
    mode = Fakes()
    try:
        yield mode
    finally:
        try:
            _forget(mode)
        finally:
            if collects:
                gc.enable()


def _forget(mode: Fakes) -> None:
    """Take out a mode's tensors, which costs time only where there are any."""
    for generation in (0, 2):
        if mode.alive():
            gc.collect(generation)  # most are in circles that nobody holds
    held: list[Any] = mode.alive()
    for _ in range(_NESTED if held else 0):
        held = _take_out(held)


def _take_out(values: list[Any]) -> list[Any]:
    """Out of caches, containers, attributes and closures.

    Returns:
        What cannot be changed and holds some of them: tuples.
    """
    own = {id(value) for value in values}
    fixed = []
    for holder in gc.get_referrers(*values) if values else ():
        if holder is values:
            continue
        if isinstance(holder, LRU_CACHE):
            holder.cache_clear()
        elif isinstance(holder, dict):
            for key in [k for k, v in list(holder.items()) if id(v) in own]:
                holder.pop(key, None)
        elif isinstance(holder, list):
            holder[:] = [v for v in holder if id(v) not in own]
        elif isinstance(holder, set):
            holder.difference_update([v for v in holder if id(v) in own])
        elif isinstance(holder, types.CellType):
            holder.cell_contents = None
        elif isinstance(holder, tuple | frozenset):
            fixed.append(holder)
    return fixed
