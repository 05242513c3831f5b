"""Where memory that is written to forbids a cut: two views of it would be torn apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..trace.calls import after


def torn_positions(
    nodes: tuple[fx.Node, ...],
    last_use: Mapping[fx.Node, int],
    replicated: frozenset[fx.Node],
    written: Mapping[int, fx.Node],
) -> dict[int, str]:
    """Positions where two views of memory that is written to later would be torn apart.

    Where a write went through a view, or reached other views, autograd rebuilds their histories and
    adds partial gradients in an order that a cut cannot keep; two of them commute, three do not.

    Args:
        nodes: of a traced graph, in program order.
        last_use: position of the last user of each node.
        replicated: nodes that every stage makes for itself.
        written: the last node that writes to each storage, those of the model's own left out.
    """
    index = {n: i for i, n in enumerate(nodes)}
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        storage = node.meta.get("storage")
        if storage in written and node not in replicated:
            members.setdefault(node.meta["storage"], []).append(node)
    rebuilt = {n.meta["storage"] for n in nodes if n.target is after}
    rebuilt |= {s for n in nodes for s in n.meta.get("rebases", ())}
    found: dict[int, str] = {}
    for storage, group in members.items():
        if len(group) < 2:
            continue
        write = index[written[storage]]
        last = len(nodes) if storage in rebuilt else write
        for position, alive in _alive(group, index, last_use, last).items():
            torn = len(alive) > 1 and position <= write
            if not torn and storage in rebuilt:
                torn = _is_reordered(group, alive, position, write, index)
            if torn:
                reason = (
                    f"{alive[0].name!r} and {(alive + group)[1].name!r} share memory that "
                    f"{written[storage].name!r} writes to; cut where only one of them is needed "
                    "later"
                )
                found.setdefault(position, reason)
    return found


def _alive(
    group: list[fx.Node],
    index: Mapping[fx.Node, int],
    last_use: Mapping[fx.Node, int],
    last: int,
) -> dict[int, list[fx.Node]]:
    """The views that are needed at each position, up to the last one that matters."""
    found: dict[int, list[fx.Node]] = {}
    for node in group:
        for position in range(index[node] + 1, min(last_use[node], last) + 1):
            found.setdefault(position, []).append(node)
    return found


def _is_reordered(
    group: list[fx.Node],
    alive: list[fx.Node],
    position: int,
    write: int,
    index: Mapping[fx.Node, int],
) -> bool:
    """Whether more than two partial gradients would be added in another order than without a cut.

    A view that is written to behind the cut is a copy there: none of the histories is rebuilt.
    """
    behind = position <= write
    if len(alive) < 2 and not (behind and alive[0].meta["view"]):
        return False
    start, views = (0, group) if behind else (position, alive)
    return sum(_uses(n, start, index) for n in views) > 2


def _uses(node: fx.Node, start: int, index: Mapping[fx.Node, int]) -> int:
    """How many partial gradients a value gets from nodes at or after a position: one for each
    argument that it is.

    Views of it pass theirs on and are counted by themselves.
    """
    arguments: list[Any] = []
    for user in node.users:
        is_view = user.meta.get("storage") == node.meta["storage"] and not user.meta.get("mutates")
        if user.target is not after and start <= index[user] and not (is_view and start == 0):
            fx.node.map_arg((user.args, user.kwargs), arguments.append)
    return sum(a is node for a in arguments)


def divided_regions(nodes: tuple[fx.Node, ...]) -> dict[int, str]:
    """Positions inside regions that must stay whole, with the reason."""
    marked: dict[tuple[str, str], list[int]] = {}
    for i, node in enumerate(nodes):
        for mark in node.meta.get("together", ()):
            marked.setdefault(mark, []).append(i)
    return {
        i: reason
        for (_, reason), places in marked.items()
        for i in range(places[0] + 1, places[-1] + 1)
    }
