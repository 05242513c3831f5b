"""Frontiers: sets of nodes that may all be done before the rest begins, and what the stage between
two of them costs.

A partition into stages whose quotient graph is acyclic is a chain of frontiers, each within the
next. In program order a frontier is a position, and everything before it is done. Off the program
order every set that is closed under predecessors is one; nodes that must not be parted (members of
containers, memory that is written to) are one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch import Tensor, fx

from ..cut.cutting import Flow, kept_storages
from .costing import Costs

INFINITE = float("inf")


@dataclass(frozen=True)
class Loads:
    """A graph as numbers; times in nanoseconds, sizes in bytes, nodes by position.

    Attributes:
        compute: time of each node: forward, backward, update of its parameters.
        memory: its parameters with gradients and moments, and what it keeps for the backward.
        values: positions of the nodes whose values later nodes use.
        total: number of users of each value.
        edge_value: for every edge, which value (a place in ``values``).
        edge_user: for every edge, the position of the user.
        source: for each value, time of the source at its producer.
        source_bytes: memory of that source.
        nbytes: size of each value.
        transfer: time to send a value, and its gradient back; its producer and every stage that
            uses it pay.
        carries: whether a gradient comes back to the value.
        attached: whether it is made of parameters alone for a single user, with which it belongs (a
            bias table, a standardised weight).
    """

    compute: Tensor
    memory: Tensor
    values: Tensor
    total: Tensor
    edge_value: Tensor
    edge_user: Tensor
    source: Tensor
    source_bytes: Tensor
    nbytes: Tensor
    transfer: Tensor
    carries: Tensor
    attached: Tensor

    def crossing(self, positions: Tensor) -> Loads:
        """Only values that cross at least one of some ascending positions."""
        first, last = self.values + 1, self.last_use
        keep = torch.searchsorted(positions, last, right=True) > torch.searchsorted(
            positions, first
        )
        number = torch.cumsum(keep, 0) - 1
        edges = keep[self.edge_value]
        return Loads(
            self.compute, self.memory, self.values[keep], self.total[keep], number[self.edge_value[edges]],
            self.edge_user[edges], self.source[keep], self.source_bytes[keep], self.nbytes[keep], self.transfer[keep],
            self.carries[keep], self.attached[keep],
        )  # fmt: skip

    @property
    def last_use(self) -> Tensor:
        """Position of the last user of each value."""
        return torch.zeros_like(self.values).scatter_reduce(
            0, self.edge_value, self.edge_user, "amax"
        )


def weigh_flow(flow: Flow, costs: Costs, bandwidth: float) -> Loads:
    """Turn a graph and its costs into numbers.

    Args:
        flow: facts of a traced model.
        costs: of every node and source.
        bandwidth: bytes per second between stages.
    """
    count = len(flow.nodes)
    compute, memory = [0] * count, [0] * count
    values: list[fx.Node] = []
    edge_value: list[int] = []
    edge_user: list[int] = []
    for position, node in enumerate(flow.nodes):
        if not flow.is_computed(node):
            continue
        tables = (costs.forward, costs.backward, costs.update)
        compute[position] = sum(t.get(node.name, 0) for t in tables)
        memory[position] = costs.parameter_bytes.get(node.name, 0) + costs.activation_bytes.get(
            node.name, 0
        )
        users = [flow.index[u] for u in node.users if u.op == "output" or flow.is_computed(u)]
        edge_value += [len(values)] * len(users)
        edge_user += users
        if users:
            values.append(node)
    attached = _attached(flow)
    nbytes = [flow.specs[n.name].nbytes if n.name in flow.specs else 8 for n in values]
    carries = [flow.carries_gradient(n) for n in values]
    sources = [
        costs.sources.get(n.name, (0, 0)) if c else (0, 0)
        for n, c in zip(values, carries, strict=True)
    ]
    seconds = [b * (1 + c) / bandwidth for b, c in zip(nbytes, carries, strict=True)]
    whole = lambda numbers: torch.tensor(numbers, dtype=torch.int64)  # noqa: E731
    ends = whole(edge_value)
    return Loads(
        whole(compute), whole(memory), whole([flow.index[n] for n in values]),
        torch.bincount(ends, minlength=len(values)) if len(values) else whole([]), ends, whole(edge_user),
        whole([s for s, _ in sources]), whole([b for _, b in sources]), whole(nbytes),
        whole([round(s * 1e9) for s in seconds]), torch.tensor(carries, dtype=torch.bool),
        torch.tensor([n in attached for n in values], dtype=torch.bool),
    )  # fmt: skip


def _attached(flow: Flow) -> dict[fx.Node, fx.Node]:
    """Nodes that are computed from parameters alone and used once, with their user."""
    constant: set[fx.Node] = set()
    found: dict[fx.Node, fx.Node] = {}
    for node in flow.nodes:
        if not flow.is_computed(node) or node.meta.get("random") or node.meta.get("mutates"):
            continue
        if all(i.op == "get_attr" or i in constant for i in node.all_input_nodes):
            constant.add(node)
            users = [u for u in node.users if flow.is_computed(u)]
            if len(users) == 1 and len(node.users) == 1:
                found[node] = users[0]
    return found


@dataclass(frozen=True)
class Frontiers:
    """Some frontiers of one graph; the first is empty and the last holds everything.

    Attributes:
        masks: the positions of each one's nodes, as the bits of an integer; empty for prefixes of
            the program order.
        compute: time of the nodes of each.
        memory: bytes of the nodes of each.
        member: which values are computed in it.
        used: how many users of each value are in it.
        below: ``below[i, j]``: whether frontier i is a proper part of frontier j.
        prefix: the position that each ends at in program order; -1 for those that are no prefix of
            it.
    """

    masks: tuple[int, ...]
    compute: Tensor
    memory: Tensor
    member: Tensor
    used: Tensor
    below: Tensor
    prefix: tuple[int, ...]


def prefixes(loads: Loads, positions: Sequence[int]) -> Frontiers:
    """The frontiers of some ascending positions of the program order."""
    count = len(loads.compute)
    ends = torch.tensor([0, *positions, count])
    return Frontiers(
        masks=(),
        compute=torch.cat([torch.zeros(1, dtype=torch.int64), loads.compute.cumsum(0)])[ends],
        memory=torch.cat([torch.zeros(1, dtype=torch.int64), loads.memory.cumsum(0)])[ends],
        member=loads.values[None] < ends[:, None],
        used=_counts(loads, loads.edge_user[None] < ends[:, None]),
        below=ends[:, None] < ends[None],
        prefix=tuple(int(p) for p in ends),
    )


def from_masks(loads: Loads, masks: Iterable[int], everything: int) -> Frontiers:
    """Frontiers given as sets of positions; empty and whole are added, the order is by size.

    Args:
        loads: the graph.
        masks: positions of computed nodes, as bits.
        everything: positions of all computed nodes.
    """
    count = len(loads.compute)
    full = everything | 1 << (count - 1)  # the output is computed with the last stage
    ordered = sorted({0, full, *masks} - {everything}, key=lambda m: (m.bit_count(), m))
    inside = bit_rows(ordered, count)
    sets = inside.to(torch.float32)
    sizes = sets.sum(1)
    exact = sets.double()
    return Frontiers(
        masks=tuple(ordered),
        compute=(exact @ loads.compute.double()).round().long(),
        memory=(exact @ loads.memory.double()).round().long(),
        member=inside[:, loads.values].bool(),
        used=_counts(loads, inside[:, loads.edge_user].bool()),
        below=(sets @ sets.T == sizes[:, None]) & (sizes[:, None] < sizes[None]),
        prefix=tuple(
            m.bit_length() if m == full or m == everything & ((1 << m.bit_length()) - 1) else -1
            for m in ordered
        ),
    )


def bit_rows(masks: Sequence[int], count: int) -> Tensor:
    """The bits of each number as a row of zeros and ones, lowest first."""
    size = -(-count // 8)
    rows = torch.frombuffer(
        bytearray(b"".join(m.to_bytes(size, "little") for m in masks)), dtype=torch.uint8
    )
    return ((rows.view(len(masks), size, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[
        :, :count
    ]


def _counts(loads: Loads, done: Tensor) -> Tensor:
    counts = torch.zeros(len(done), len(loads.values), dtype=torch.int32)
    return counts.index_add_(1, loads.edge_value, done.to(torch.int32))


@dataclass(frozen=True)
class Pairs:
    """What the stage between two frontiers costs, ``[i, j]``; infinite where i is no proper part of
    j.

    Attributes:
        seconds: nanoseconds: its nodes, the sources of what it sends, sending and receiving.
        memory: bytes: its nodes, its sources, what it receives.
        traffic: bytes that it receives.
    """

    seconds: Tensor
    memory: Tensor
    traffic: Tensor


def weigh_pairs(loads: Loads, frontiers: Frontiers) -> Pairs:
    """Cost of every possible stage. A value is sent once by its producer and received by every
    stage that uses it.
    """
    member, used = frontiers.member, frontiers.used
    waiting = used < loads.total
    sent = lambda weight: (  # noqa: E731
        ((member & waiting).double() @ weight.double())[None]
        - (member.double() * weight) @ waiting.double().T
    )
    received = torch.zeros(2, len(member), len(member), dtype=torch.float64)
    weights = torch.stack([loads.transfer, loads.nbytes]).double()
    for i in range(len(member)):
        live = torch.nonzero(member[i] & waiting[i]).flatten()
        if len(live):
            arrives = (used[:, live] > used[i, live]).double()
            received[:, i] = weights[:, live] @ arrives.T
    own = lambda amount: (amount[None] - amount[:, None]).double()  # noqa: E731
    forbidden = ~frontiers.below
    seconds = own(frontiers.compute) + sent(loads.source + loads.transfer) + received[0]
    memory = own(frontiers.memory) + sent(loads.source_bytes) + received[1]
    return Pairs(*(m.masked_fill(forbidden, INFINITE) for m in (seconds, memory, received[1])))


def trainable(loads: Loads, frontiers: Frontiers) -> Tensor:
    """Whether a value that carries a gradient crosses each frontier."""
    return (frontiers.member & (frontiers.used < loads.total) & loads.carries).any(1)


# ---- off the program order -----------------------------------------------------------------------


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
    nothing uses, such as the count of a batch norm, stays with the node before it.

    Nodes that draw random numbers keep their order, and so do those that share a buffer that is
    written to.

    Args:
        flow: facts of a traced model.
        together: positions that the user wants in one stage.
    """
    computed = [n for n in flow.nodes if flow.is_computed(n)]
    groups = nx.utils.UnionFind(n for n in computed)
    chains: dict[str | int, fx.Node] = {}
    graph = nx.DiGraph()
    written = {s for n in flow.nodes for s in n.meta.get("mutates", ())}
    kept = kept_storages(flow.nodes)
    memory: dict[int, fx.Node] = {}
    for node in computed:
        if node.meta.get("glued"):
            groups.union(*[n for n in node.all_input_nodes if flow.is_computed(n)], node)
        touched = [n.meta.get("storage") for n in (node, *node.all_input_nodes)] + list(
            node.meta.get("mutates", ())
        )
        for storage in dict.fromkeys(s for s in touched if s is not None and s in written):
            if storage not in kept:
                groups.union(memory.setdefault(storage, node), node)
            elif storage in chains:
                graph.add_edge(chains[storage], node)
            chains[storage] = node
        if node.meta.get("random"):
            if "random" in chains:
                graph.add_edge(chains["random"], node)
            chains["random"] = node
    for node, user in _attached(flow).items():
        groups.union(node, user)
    for earlier, node in pairwise(computed):
        if not any(u.op == "output" or flow.is_computed(u) for u in node.users):
            groups.union(node, earlier)
    for group in together:
        groups.union(*[flow.nodes[p] for p in group])
    graph.add_nodes_from(computed)
    graph.add_edges_from((i, n) for n in computed for i in n.all_input_nodes if flow.is_computed(i))
    quotient = nx.DiGraph()
    quotient.add_nodes_from(groups[n] for n in computed)
    quotient.add_edges_from(
        (groups[a], groups[b]) for a, b in graph.edges if groups[a] != groups[b]
    )
    condensed = nx.condensation(quotient)
    component = {root: c for c, data in condensed.nodes(data=True) for root in data["members"]}
    masks: dict[int, int] = {}
    for node in computed:
        c = component[groups[node]]
        masks[c] = masks.get(c, 0) | 1 << flow.index[node]
    first = {c: (m & -m).bit_length() for c, m in masks.items()}
    order = list(nx.lexicographical_topological_sort(condensed, key=first.__getitem__))
    number = {c: i for i, c in enumerate(order)}
    return Units(
        masks=tuple(masks[c] for c in order),
        before=tuple(sum(1 << number[p] for p in condensed.predecessors(c)) for c in order),
        after=tuple(tuple(sorted(number[s] for s in condensed.successors(c))) for c in order),
    )


def closed_sets(units: Units, limit: int, base: int = 0, within: int = -1) -> list[int] | None:
    """Every set of units that is closed under predecessors, as bits; None if there are more than
    ``limit``.

    Args:
        units: the units of a graph.
        limit: how many sets to list.
        base: a closed set that all of them hold.
        within: a set that all of them lie in; -1 for everything.
    """
    ready = tuple(
        u
        for u in range(len(units.masks))
        if not base >> u & 1 and within >> u & 1 and not units.before[u] & ~base
    )
    found = {base: ready}
    queue = [base]
    for current in queue:
        for unit in found[current]:
            larger = current | 1 << unit
            if larger in found:
                continue
            if len(queue) >= limit:
                return None
            fresh = [
                s for s in units.after[unit] if within >> s & 1 and not units.before[s] & ~larger
            ]
            found[larger] = tuple(u for u in found[current] if u != unit) + tuple(fresh)
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
