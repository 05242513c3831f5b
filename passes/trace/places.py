"""Where modules keep things: in an attribute or a buffer, or in a container or an object there."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .ownership import is_library_name
from .state import MODULE_INTERNALS

_DEEPEST, _MOST = 4, 1_000  # parts within parts, and all of one module
_LISTS = list | collections.deque


class Step(NamedTuple):
    """One step into what something holds: to an item, to an attribute, or to all items at once."""

    kind: str
    key: Any = None

    def of(self, holder: Any) -> Any:
        """What is there."""
        return getattr(holder, self.key) if self.kind == "attribute" else holder[self.key]

    def write(self, holder: Any, value: Any) -> None:
        """Have it hold something else there."""
        if self.kind == "attribute":
            setattr(holder, self.key, value)
        elif self.kind == "item":
            holder[self.key] = value
        else:
            holder.clear()
            holder.extend(value)

    def drop(self, holder: Any) -> None:
        """Have it hold nothing there."""
        if self.kind == "attribute":
            delattr(holder, self.key)
        else:
            del holder[self.key]


ALL = Step("all")
Place = tuple[Any, ...]  # identity of a module, name of an attribute, steps from there


def kept_by(module: nn.Module, deep: bool) -> Iterator[tuple[Place, Any]]:
    """What a module keeps besides parameters and modules, a holder before what it holds.

    Args:
        module: without its submodules.
        deep: whether to open what is in its attributes.
    """
    own = [(k, v) for k, v in vars(module).items() if k not in MODULE_INTERNALS]
    count = 0
    for name, value in [*own, *module._buffers.items()]:
        for steps, part in parts_of(value) if deep else (((), value),):
            yield (id(module), name, *steps), part
            count += 1
            if count > _MOST:
                return


def parts_of(value: Any) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """A value, and what is in it, with the steps from it; each thing once."""
    pending: list[tuple[tuple[Step, ...], Any]] = [((), value)]
    seen: set[int] = set()
    for steps, part in pending:
        yield steps, part
        if len(steps) < _DEEPEST and (inner := list(_inner(part))) and id(part) not in seen:
            seen.add(id(part))
            pending += [((*steps, step), held) for step, held in inner]


def _inner(value: Any) -> Iterable[tuple[Step, Any]]:
    if type(value) in (dict, collections.OrderedDict, collections.defaultdict):
        return [(Step("item", key), held) for key, held in value.items()]
    if isinstance(value, _LISTS | tuple):
        return [(Step("item", i), held) for i, held in enumerate(value)]
    kind = type(value)
    closed = isinstance(
        value, nn.Module | torch.Tensor | type | types.FunctionType | types.ModuleType
    )
    if closed or is_library_name(kind.__module__) or type(vars_of(value)) is not dict:
        return ()
    return [(Step("attribute", name), held) for name, held in vars_of(value).items()]


def vars_of(value: Any) -> Any:
    """An object's attributes; None where they are nowhere."""
    return getattr(value, "__dict__", None)


def is_list(value: Any) -> bool:
    """Whether it holds items in an order that may change."""
    return isinstance(value, _LISTS)
