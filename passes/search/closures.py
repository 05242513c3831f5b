"""Frontiers off the program order: sets of nodes that are closed under predecessors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
from torch import fx

from ..cut.cutting import Flow, kept_storages
from .loads import attached_nodes


@dataclass(frozen=True)
class Units:
    """Nodes that must stay together, in a topological order.

    Attributes:
        masks: positions of each unit's nodes, as bits.
        before: units that each one needs, as bits.
        after: units that need it, ascending.
    """

    masks: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]


def find_units(flow: Flow, together: Sequence[Sequence[int]] = ()) -> Units:
    """Contract what cannot or should not be parted, so that any closed set of units is a frontier
    that may be cut.

    What is made of parameters alone, such as a table of biases, belongs with its only user; what
    nothing uses, such as the count of a batch norm, stays with the node before it. Nodes that draw
    random numbers keep their order, and so do those that share a buffer that is written to.

    Args:
        flow: facts of a traced model.
        together: positions that the user wants in one stage.
    """
    computed = [n for n in flow.nodes if flow.is_computed(n)]
    groups = nx.utils.UnionFind(computed)
    edges = _contract(flow, computed, groups)
    for group in together:
        groups.union(*[flow.nodes[p] for p in group])
    edges += [(i, n) for n in computed for i in n.all_input_nodes if flow.is_computed(i)]
    quotient = nx.DiGraph()
    quotient.add_nodes_from(groups[n] for n in computed)
    quotient.add_edges_from((groups[a], groups[b]) for a, b in edges if groups[a] != groups[b])
    condensed = nx.condensation(quotient)
    masks: dict[int, int] = {}
    for node in computed:
        unit = condensed.graph["mapping"][groups[node]]
        masks[unit] = masks.get(unit, 0) | 1 << flow.index[node]
    first = {c: (m & -m).bit_length() for c, m in masks.items()}
    order = list(nx.lexicographical_topological_sort(condensed, key=first.__getitem__))
    number = {c: i for i, c in enumerate(order)}
    return Units(
        masks=tuple(masks[c] for c in order),
        before=tuple(sum(1 << number[p] for p in condensed.predecessors(c)) for c in order),
        after=tuple(tuple(sorted(number[s] for s in condensed.successors(c))) for c in order),
    )


def _contract(
    flow: Flow, computed: Sequence[fx.Node], groups: nx.utils.UnionFind
) -> list[tuple[fx.Node, fx.Node]]:
    """Join the nodes that cannot be parted; pairs of others whose order must stay."""
    edges: list[tuple[fx.Node, fx.Node]] = []
    chains: dict[str | int, fx.Node] = {}  # the last that drew a number or touched a buffer
    written = {s for n in flow.nodes for s in n.meta.get("mutates", ())}
    kept = kept_storages(flow.nodes)
    memory: dict[int, fx.Node] = {}
    whole: dict[tuple[str, str], fx.Node] = {}
    for node in computed:
        if node.meta.get("glued"):
            groups.union(*[n for n in node.all_input_nodes if flow.is_computed(n)], node)
        if node.meta.get("sparse"):
            groups.union(node, *[u for u in node.users if flow.is_computed(u)])
        touched = [n.meta.get("storage") for n in (node, *node.all_input_nodes)]
        touched += node.meta.get("mutates", ())
        for storage in dict.fromkeys(s for s in touched if s is not None and s in written):
            if storage not in kept:
                groups.union(memory.setdefault(storage, node), node)
            elif storage in chains:
                edges.append((chains[storage], node))
            chains[storage] = node
        for mark in node.meta.get("together", ()):
            groups.union(whole.setdefault(mark, node), node)
        if node.meta.get("random"):
            edges += [(chains["random"], node)] if "random" in chains else []
            chains["random"] = node
    for node, user in attached_nodes(flow).items():
        groups.union(node, user)
    for earlier, node in pairwise(computed):
        if not any(u.op == "output" or flow.is_computed(u) for u in node.users):
            groups.union(node, earlier)
    return edges


def closed_sets(units: Units, limit: int, base: int = 0, within: int = -1) -> list[int] | None:
    """Every set of units that is closed under predecessors, as bits; None if there are more than
    ``limit``.

    Args:
        units: the units of a graph.
        limit: how many sets to list.
        base: a closed set that all of them hold.
        within: a set that all of them lie in; -1 for everything.
    """

    def ready(units_of: Iterable[int], done: int) -> tuple[int, ...]:
        return tuple(u for u in units_of if within >> u & 1 and not units.before[u] & ~done)

    everything = range(len(units.masks))
    found = {base: ready((u for u in everything if not base >> u & 1), base)}
    queue = [base]
    for current in queue:
        for unit in found[current]:
            larger = current | 1 << unit
            if larger in found:
                continue
            if len(queue) >= limit:
                return None
            others = tuple(u for u in found[current] if u != unit)
            found[larger] = others + ready(units.after[unit], larger)
            queue.append(larger)
    return queue


def nodes_of(units: Units, chosen: int) -> int:
    """The positions of the nodes of a set of units, as bits."""
    mask = 0
    while chosen:
        lowest = chosen & -chosen
        mask |= units.masks[lowest.bit_length() - 1]
        chosen ^= lowest
    return mask
