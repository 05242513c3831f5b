"""Answers what a model's code asks about shapes and memory layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .provenance import Provenance
from .symbols import Looks, Size, TracedInt, plain

QUERIES = {
    "torch.Tensor.shape.__get__",
    "torch.Tensor.size",
    "torch.Tensor.numel",
    "torch.Tensor.__len__",
}


class Sizes:
    """The sizes of recorded tensors as integers that remember where they came from.

    Args:
        known: the graph, and the nodes of tensors.
        plain: sizes that the model's code needs as plain integers.

    Attributes:
        looks: what the code has looked at.
    """

    def __init__(self, known: Provenance, plain: frozenset[Size]) -> None:
        self.looks = Looks(plain)
        self._known = known
        self._made: dict[tuple[fx.Node, int | str], int | TracedInt] = {}

    def answer(self, name: str, args: Any, kwargs: Any) -> Any:
        """A shape, one of its sizes, or the number of elements.

        Args:
            name: one of `QUERIES`.
            args: what it was called with, the tensor first.
            kwargs: likewise.
        """
        tensor = args[0]
        node = self._known.nodes.get(id(tensor))
        dim = plain(args[1]) if len(args) > 1 else kwargs.get("dim")
        if node is None or node.op == "get_attr":  # a parameter's or constant's size never changes
            self._known.note_kind(tensor)
            if name.endswith("numel"):
                return tensor.numel()
            if name.endswith("__len__"):
                return len(tensor)
            return tensor.shape if dim is None else tensor.shape[dim]
        if name.endswith("numel"):
            make = lambda: _beside(node, "numel")  # noqa: E731
            return self._integer(node, "numel", tensor.numel(), make)
        if name.endswith("__len__"):
            length = self._dim(node, tensor, 0)
            return length.look() if isinstance(length, TracedInt) else length
        if dim is not None:
            return self._dim(node, tensor, dim % max(tensor.dim(), 1))
        sizes: Any = [self._dim(node, tensor, d) for d in range(tensor.dim())]
        return torch.Size(sizes)

    def _dim(self, node: fx.Node, tensor: torch.Tensor, dim: int) -> int | TracedInt:
        make = lambda: _beside(node, "size", dim)  # noqa: E731
        return self._integer(node, dim, tensor.shape[dim], make)

    def _integer(
        self, node: fx.Node, what: int | str, value: int, make: Callable[[], fx.Node]
    ) -> int | TracedInt:
        """A number of a node, made once; a plain one, with a guard, where the code needs that."""
        if (node, what) not in self._made:
            made = TracedInt(value, make, self.looks, frozenset({(what, value)}))
            wants_plain = self.looks.wants_plain((what, value))
            self._made[node, what] = made.look() if wants_plain else made
        return self._made[node, what]


def _beside(node: fx.Node, query: str, *args: int) -> fx.Node:
    """A size, asked where its tensor is made: later stages then get a number and not the tensor."""
    last = node
    while last.next.meta.get("glued"):
        last = last.next
    with node.graph.inserting_after(last):
        return node.graph.call_method(query, (node, *args))
