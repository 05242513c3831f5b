"""Nested inputs and outputs taken apart into tensors and put together again.

Containers that torch's pytree knows (tuples, named tuples, lists, dicts, registered classes such as
transformers' ``ModelOutput``), any dataclass, and mappings and lists of classes of their own (such
as transformers' ``BatchEncoding``) are opened. Everything else that is not a tensor is part of the
structure.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserList
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import DecouplingError
from .pictures import picture


@dataclass(frozen=True)
class Structure:
    """How a nested value is built; equal structures take the same number of leaves.

    Attributes:
        kind: ``"leaf"``, ``"constant"``, ``"dataclass"``, ``"items"`` or ``"node"``.
        was: what the constant held, since it may be an object that changes.
        payload: the constant, the instance used as a template (a dataclass, or a mapping or list of
            a class of its own), or the pytree node's type and context.
        children: their structures.
        fields: names of a dataclass's fields, keys of a mapping, indices of a list.
    """

    kind: str
    payload: Any = None
    children: tuple[Structure, ...] = ()
    fields: tuple[Any, ...] = ()
    was: tuple[Any, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Structure):
            return False
        a, b = self.payload, other.payload
        if self.kind == "constant":
            return other.kind == "constant" and self.was == other.was
        is_template = self.kind in ("dataclass", "items")
        return (
            (self.kind, self.fields) == (other.kind, other.fields)
            and (type(a) is type(b) if is_template else a == b)
            and self.children == other.children
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def leaf_count(self) -> int:
        """Number of leaves."""
        return 1 if self.kind == "leaf" else sum(c.leaf_count for c in self.children)

    def constants(self) -> Iterator[Any]:
        """The constants, in order."""
        if self.kind == "constant":
            yield self.payload
        for child in self.children:
            yield from child.constants()

    def build(self, leaves: Iterator[Any]) -> Any:
        """Put the leaves back."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.payload
        children = [c.build(leaves) for c in self.children]
        if self.kind == "dataclass":
            value = copy.copy(self.payload)
            for name, child in zip(self.fields, children, strict=True):
                object.__setattr__(value, name, child)
            return value
        if self.kind == "items":
            value = copy.copy(self.payload)
            for key, child in zip(self.fields, children, strict=True):
                value[key] = child
            return value
        node_type, context = self.payload
        return pytree.SUPPORTED_NODES[node_type].unflatten_fn(children, context)


_LEAF = Structure("leaf")


def flatten(
    value: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Structure]:
    """Take a nested value apart.

    Args:
        value: any nesting of containers, tensors and constants.
        is_leaf: says of a non-container whether it is a leaf; default: tensors.

    Returns:
        The leaves in order, and the structure that builds the value from them.
    """
    leaves: list[Any] = []
    structure = _take_apart(value, leaves, is_leaf or (lambda v: isinstance(v, torch.Tensor)))
    return leaves, structure


def _take_apart(item: Any, leaves: list[Any], is_leaf: Callable[[Any], bool]) -> Structure:
    """No closure: one that calls itself is a circle, and would keep the leaves until the next
    collection.
    """
    if is_leaf(item):
        leaves.append(item)
        return _LEAF
    node_type = pytree._get_node_type(item)
    if node_type in pytree.SUPPORTED_NODES:
        children, context = pytree.SUPPORTED_NODES[node_type].flatten_fn(item)
        return Structure(
            "node", (node_type, context), tuple(_take_apart(c, leaves, is_leaf) for c in children)
        )
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = tuple(f.name for f in dataclasses.fields(item))
        parts = tuple(_take_apart(getattr(item, n), leaves, is_leaf) for n in names)
        template = copy.copy(item)
        for name in names:
            object.__setattr__(template, name, None)
        return Structure("dataclass", template, parts, names)
    return _items(item, leaves, is_leaf) or Structure("constant", item, was=picture(item))


def _items(item: Any, leaves: list[Any], is_leaf: Callable[[Any], bool]) -> Structure | None:
    """A mapping or list of a class of its own, if it holds leaves: what else it is stays in the
    template.
    """
    if isinstance(item, MutableMapping):
        keys = list(item)
    elif isinstance(item, list | UserList):
        keys = list(range(len(item)))
    else:
        return None
    found: list[Any] = []
    parts = {key: _take_apart(item[key], found, is_leaf) for key in keys}
    if not found:
        return None
    template = copy.copy(item)
    for key, part in parts.items():
        template[key] = None if part.leaf_count else template[key]
    leaves += found
    return Structure("items", template, tuple(parts.values()), tuple(keys))


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of a nested value."""
    leaves, structure = flatten(value)
    return structure.build(iter([function(leaf) for leaf in leaves]))


def unpack_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A loader's batch as ``(args, kwargs, target)``.

    Raises:
        DecouplingError: neither ``(input, ..., target)`` nor a mapping with a target.
    """
    if isinstance(batch, Mapping):
        rest = dict(batch)
        key = "target" if "target" in rest else "labels"
        if key not in rest:
            raise DecouplingError(
                f"a batch that is a mapping needs 'target' or 'labels', but has {list(rest)}: pass "
                "unpack=, which returns (args, kwargs, target)"
            )
        return (), rest, rest.pop(key)
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise DecouplingError(
        f"a batch must be (input, ..., target) or a mapping, but is a {type(batch).__name__}: pass "
        "unpack=, which returns (args, kwargs, target)"
    )
