"""A graph as numbers: what each node takes, and what each value costs where it crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..cut.cutting import Flow
from .costing import Costs


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
        after = torch.searchsorted(positions, self.last_use, right=True)
        keep = after > torch.searchsorted(positions, self.values + 1)
        number = torch.cumsum(keep, 0) - 1
        edges = keep[self.edge_value]
        return Loads(
            compute=self.compute,
            memory=self.memory,
            values=self.values[keep],
            total=self.total[keep],
            edge_value=number[self.edge_value[edges]],
            edge_user=self.edge_user[edges],
            source=self.source[keep],
            source_bytes=self.source_bytes[keep],
            nbytes=self.nbytes[keep],
            transfer=self.transfer[keep],
            carries=self.carries[keep],
            attached=self.attached[keep],
        )

    @property
    def last_use(self) -> Tensor:
        """Position of the last user of each value."""
        none = torch.zeros_like(self.values)
        return none.scatter_reduce(0, self.edge_value, self.edge_user, "amax")


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
        times = (costs.forward, costs.backward, costs.update)
        compute[position] = sum(table.get(node.name, 0) for table in times)
        sizes = (costs.parameter_bytes, costs.activation_bytes)
        memory[position] = sum(table.get(node.name, 0) for table in sizes)
        users = [flow.index[u] for u in node.users if u.op == "output" or flow.is_computed(u)]
        edge_value += [len(values)] * len(users)
        edge_user += users
        if users:
            values.append(node)
    attached = attached_nodes(flow)
    nbytes = [flow.specs[n.name].nbytes if n.name in flow.specs else 8 for n in values]
    carries = [flow.carries_gradient(n) for n in values]
    sources = [
        costs.sources.get(n.name, (0, 0)) if c else (0, 0)
        for n, c in zip(values, carries, strict=True)
    ]
    transfers = [b * (1 + c) / bandwidth for b, c in zip(nbytes, carries, strict=True)]
    ends = _whole(edge_value)
    return Loads(
        compute=_whole(compute),
        memory=_whole(memory),
        values=_whole([flow.index[n] for n in values]),
        total=torch.bincount(ends, minlength=len(values)) if values else _whole([]),
        edge_value=ends,
        edge_user=_whole(edge_user),
        source=_whole([seconds for seconds, _ in sources]),
        source_bytes=_whole([size for _, size in sources]),
        nbytes=_whole(nbytes),
        transfer=_whole([round(seconds * 1e9) for seconds in transfers]),
        carries=torch.tensor(carries, dtype=torch.bool),
        attached=torch.tensor([n in attached for n in values], dtype=torch.bool),
    )


def _whole(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def attached_nodes(flow: Flow) -> dict[fx.Node, fx.Node]:
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
