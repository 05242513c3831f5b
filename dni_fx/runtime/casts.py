"""Copies that autocast makes of parameters: one for all stages that use the parameter, since they
are kept until the outermost region ends. Backpropagation adds up the gradients of a copy in its own
precision and casts their sum back, so a stage keeps its part for the stages before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..graphs.nested import flatten


@dataclass(frozen=True)
class Carried:
    """What later stages have made of a parameter.

    Attributes:
        own: of the parameter itself.
        copies: of its copies, by the node that makes one.
    """

    own: Tensor | None
    copies: dict[Any, Tensor]

    def roots(self) -> tuple[list[Any], list[Tensor]]:
        """The copies as roots of a pull-back, and their gradients."""
        return [GradientEdge(node, 0) for node in self.copies], list(self.copies.values())


def copies_of(outputs: Any, parameters: Mapping[str, nn.Parameter]) -> dict[Any, str]:
    """The nodes that make copies of parameters under autocast, in a stage's graph.

    Args:
        outputs: what the stage's forward gave, nested.
        parameters: by name.

    Returns:
        Names of parameters by node; empty where there is no autocast.
    """
    names = {id(p): n for n, p in parameters.items() if torch.is_autocast_enabled(p.device.type)}
    found: dict[Any, str] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [t.grad_fn for t in flatten(outputs)[0]] if names else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            waiting.append(following)
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None and node.name() == "ToCopyBackward0":
                found[node] = name
    return found


@contextlib.contextmanager
def kept_back(nodes: Mapping[Any, str], kept: dict[Any, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Meanwhile the gradients of copies go no further.

    Args:
        nodes: names of parameters, by the node that makes a copy.
        kept: takes the gradients, by node.

    Returns:
        Those of now, by the parameter's name.
    """
    caught: dict[str, Tensor] = {}

    def keeps(node: Any, name: str) -> Any:
        def keep(gradients: tuple[Any, ...]) -> tuple[None, ...]:
            kept[node] = caught[name] = gradients[0]
            return (None,)

        return node.register_prehook(keep)

    handles = [keeps(node, name) for node, name in nodes.items()]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
