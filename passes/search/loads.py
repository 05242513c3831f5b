"""A graph as numbers: what each node takes, and what each value costs where it crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..cut.cutting import Flow
from .costing import Costs

_OF_VALUES = (
    "values", "total", "source", "source_bytes", "nbytes", "transfer", "carries", "attached"
)  # fmt: skip


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

    def crossing(self, positions: Sequence[int]) -> Loads:
        """Only values that cross at least one of some ascending positions."""
        ends = integers(positions)
        after = torch.searchsorted(ends, self.last_use, right=True)
        keep = after > torch.searchsorted(ends, self.values + 1)
        edges = keep[self.edge_value]
        return replace(
            self,
            edge_value=(torch.cumsum(keep, 0) - 1)[self.edge_value[edges]],
            edge_user=self.edge_user[edges],
            **{name: getattr(self, name)[keep] for name in _OF_VALUES},
        )

    @property
    def last_use(self) -> Tensor:
        """Position of the last user of each value."""
        none = torch.zeros_like(self.values)
        return none.scatter_reduce(0, self.edge_value, self.edge_user, "amax")


def weigh_flow(flow: Flow, costs: Costs, bandwidth: float) -> Loads:
    """Turn a graph and its costs into numbers; bandwidth in bytes per second between stages."""

    def summed(*tables: dict[str, int]) -> Tensor:
        computed = [n.name if flow.is_computed(n) else "" for n in flow.nodes]
        return integers([sum(table.get(name, 0) for table in tables) for name in computed])

    values: list[fx.Node] = []
    ends: list[tuple[int, int]] = []
    for node in filter(flow.is_computed, flow.nodes):
        users = [flow.index[u] for u in node.users if u.op == "output" or flow.is_computed(u)]
        ends += [(len(values), user) for user in users]
        values += [node] if users else []
    edges = integers([value for value, _ in ends])
    attached = attached_nodes(flow)
    nbytes = [flow.specs[n.name].nbytes if n.name in flow.specs else 8 for n in values]
    carries = [flow.carries_gradient(n) for n in values]
    sources = [
        costs.sources.get(n.name, (0, 0)) if carried else (0, 0)
        for n, carried in zip(values, carries, strict=True)
    ]
    sent = [size * (1 + carried) for size, carried in zip(nbytes, carries, strict=True)]
    return Loads(
        compute=summed(costs.forward, costs.backward, costs.update),
        memory=summed(costs.parameter_bytes, costs.activation_bytes),
        values=integers([flow.index[n] for n in values]),
        total=torch.bincount(edges, minlength=len(values)),
        edge_value=edges,
        edge_user=integers([user for _, user in ends]),
        source=integers([nanoseconds for nanoseconds, _ in sources]),
        source_bytes=integers([size for _, size in sources]),
        nbytes=integers(nbytes),
        transfer=integers([round(size / bandwidth * 1e9) for size in sent]),
        carries=torch.tensor(carries, dtype=torch.bool),
        attached=torch.tensor([n in attached for n in values], dtype=torch.bool),
    )


def integers(numbers: Sequence[int]) -> Tensor:
    """Whole numbers as a tensor, none of them too."""
    return torch.tensor(numbers, dtype=torch.int64)


def attached_nodes(flow: Flow) -> dict[fx.Node, fx.Node]:
    """Nodes that are computed from parameters alone and used once, with their user."""
    constant: set[fx.Node] = set()
    found: dict[fx.Node, fx.Node] = {}
    for node in filter(flow.is_computed, flow.nodes):
        if node.meta.get("random") or node.meta.get("mutates"):
            continue
        if all(i.op == "get_attr" or i in constant for i in node.all_input_nodes):
            constant.add(node)
            users = list(node.users)
            if len(users) == 1 and flow.is_computed(users[0]):
                found[node] = users[0]
    return found
