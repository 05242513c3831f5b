"""Containers as arguments of nodes: plain ones are written out, others are built where they are
used, and what a callee changes in one is told to the code that handed it over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...errors import TracingError
from ...graphs.nested import Structure, flatten
from .symbols import TracedInt

_WRITTEN_OUT = (tuple, list, torch.Size)
TORCH_CONSTANTS = torch.dtype | torch.device | torch.layout | torch.memory_format
_PLAIN = (bool, int, float, complex, str)


class Assembled(tuple[Any, ...]):
    """A container that generated code cannot write out, as an argument of a node.

    It is a tuple of nodes that fx takes for a named tuple, and so copies and prints by calling its
    class: with the values of the nodes that call gives the container.
    """

    structure: Structure

    def __new__(cls, *parts: Any) -> Any:
        if any(isinstance(part, fx.Node) for part in parts):
            return super().__new__(cls, parts)
        return cls.structure.build(iter(parts))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


def assembled(value: Any, argument: Callable[[Any], Any]) -> Assembled | None:
    """A container that is to be built from nodes, where it holds tensors or traced integers.

    Args:
        value: anything.
        argument: gives the node of a tensor or traced integer.
    """
    leaves, structure = flatten(value, is_traced)
    if not leaves:
        return None
    names = tuple(f"part_{i}" for i in range(len(leaves)))
    kind = type(type(value).__name__, (Assembled,), {"_fields": names, "structure": structure})
    result: Assembled = kind(*map(argument, leaves))
    return result


def is_traced(value: Any) -> bool:
    """Whether a value is known by a node of its own."""
    return isinstance(value, torch.Tensor | TracedInt)


def is_written_out(value: Any) -> bool:
    """Whether generated code can write a container out, together with what is in it."""
    if type(value) is dict:
        return all(_is_simple(k) and _is_simple(v) for k, v in value.items())
    return type(value) in _WRITTEN_OUT


def _is_simple(value: Any) -> bool:
    """Whether the text of a value, within a dict, is code."""
    if type(value) in _WRITTEN_OUT:
        return all(map(_is_simple, value))
    if type(value) is dict:
        return is_written_out(value)
    if isinstance(value, slice):
        return all(map(_is_simple, (value.start, value.stop, value.step)))
    if value is None or value is Ellipsis or isinstance(value, TORCH_CONSTANTS):
        return True
    return is_traced(value) or type(value) in _PLAIN


@dataclass(frozen=True)
class Copy:
    """A list or dict that a callee is given in place of the model's own.

    Attributes:
        original: the model's.
        given: the copy.
        content: what the copy held, by key or index.
    """

    original: Any
    given: Any
    content: dict[Any, Any]

    @classmethod
    def of(cls, original: Any, given: Any) -> Copy:
        """The copy as it is now."""
        return cls(original, given, dict(_items(given)))


def take_over(copies: list[Copy], is_known: Callable[[torch.Tensor], bool]) -> bool:
    """Tell the model's own lists and dicts what a callee did to their copies.

    Args:
        copies: as they were given.
        is_known: whether a node stands for a tensor.

    Returns:
        Whether there was anything to tell.

    Raises:
        TracingError: a tensor that no node stands for was put into one.
    """
    own = {id(c.given): c.original for c in copies}
    changed = [c for c in copies if not _same(dict(_items(c.given)), c.content)]
    for copy in changed:
        before = dict(_items(copy.original))
        own.update((id(v), before[k]) for k, v in copy.content.items())
    for copy in changed:
        now = {k: own.get(id(v), v) for k, v in _items(copy.given)}
        if not all(map(is_known, flatten(now)[0])):
            raise TracingError(
                f"a tensor is put into a {type(copy.given).__name__} that is an argument"
            )
        copy.original.clear()
        if isinstance(copy.original, list):
            copy.original.extend(now.values())
        else:
            copy.original.update(now)
    return bool(changed)


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return enumerate(container) if isinstance(container, list) else container.items()


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return list(now) == list(before) and all(now[k] is before[k] for k in now)


def signature(structure: Structure) -> str:
    """A text that differs for containers that are built in another way."""
    payload = structure.payload
    if structure.kind == "node":
        payload = tuple(getattr(p, "__name__", p) for p in payload)
    elif structure.payload is not None and type(payload) not in _PLAIN:
        payload = type(payload).__qualname__
    children = ",".join(map(signature, structure.children))
    return f"{structure.kind}:{payload!r}{structure.fields!r}({children})"
