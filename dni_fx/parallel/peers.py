"""The processes that train together, and what they say to all at once; one alone is a special case.

These are collective calls of ``torch.distributed``, made outside the hot loop: whoever calls one
waits for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Peers:
    """The processes of a group; this one alone where there is no process group.

    Args:
        group: the process group; the default one.

    Attributes:
        parallel: whether there is a process group, of one process or more.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.parallel = dist.is_initialized()
        self.rank = dist.get_rank(group) if self.parallel else 0
        self.world = dist.get_world_size(group) if self.parallel else 1

    def gather(self, mine: Any) -> list[Any]:
        """What every process passes, in order of rank."""
        every = [mine]
        if self.parallel:
            every = [None] * self.world
            dist.all_gather_object(every, mine, group=self.group)
        return every

    def hear_first(self, value: Any) -> Any:
        """What rank 0 passes."""
        told = [value]
        if self.parallel:
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        return told[0]

    def copy_from(self, owner: int, tensor: torch.Tensor) -> None:
        """Write one process's numbers into the tensors of all."""
        if self.parallel:
            dist.broadcast(tensor.detach(), group=self.group, group_src=owner)

    def mean(self, value: float, weight: float) -> float:
        """The weighted mean of what is not nan; nan where nobody has a number."""
        known = value == value
        pair = [value * weight, weight] if known else [0.0, 0.0]
        total = torch.tensor(pair, dtype=torch.float64)
        if self.parallel:
            dist.all_reduce(total, group=self.group)
        return float(total[0] / total[1]) if total[1] else float("nan")

    def barrier(self) -> None:
        """Wait for all."""
        if self.parallel:
            dist.barrier(group=self.group)

    def subgroup(self, ranks: Sequence[int]) -> Any:
        """A group of some of these processes; to be made by all of them."""
        if self.group is not None:
            ranks = [dist.get_global_rank(self.group, r) for r in ranks]
        return dist.new_group(list(ranks))
