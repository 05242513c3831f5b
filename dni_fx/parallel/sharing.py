"""What processes share: words to all at once, one stage's gradients, a loader's batches.

The collective calls of ``torch.distributed`` are made outside the hot loop, but for the sums of
gradients: whoever makes one waits for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..decoupled import Decoupled
from .mailbox import Address, ParallelError
from .streams import Links
from .worker import StageWorker

BATCH, TAKEN = "batch", "batch taken"


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """What gloo says of a process that is not there, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1]
        raise ParallelError(
            f"another process did not come to {what}, which all wait for ({reason}): it has ended, "
            "hangs, or does something else; see its own output"
        ) from error


class Peers:
    """The processes of a group; this one alone where there is no process group.

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

    def gather(self, mine: Any, what: str = "a call") -> list[Any]:
        """What every process passes, in order of rank.

        Raises:
            ParallelError: some process has ended, or does not come.
        """
        every = [mine]
        if self.parallel:
            every = [None] * self.world
            with _named(what):
                dist.all_gather_object(every, mine, group=self.group)
        return every

    def mean(self, value: float, weight: float) -> float:
        """The weighted mean of what is not nan; nan where nobody has a number."""
        pair = [value * weight, weight] if value == value else [0.0, 0.0]
        total = torch.tensor(pair, dtype=torch.float64)
        if self.parallel:
            with _named("mean()"):
                dist.all_reduce(total, group=self.group)
        return float(total[0] / total[1]) if total[1] else float("nan")

    def barrier(self) -> None:
        """Wait for all."""
        if self.parallel:
            with _named("a call"):
                dist.barrier(group=self.group)

    def twin(self, timeout: float) -> Peers:
        """The same processes, with a group of their own; to be made by all of them."""
        if not self.parallel:
            return self
        ranks = dist.get_process_group_ranks(dist.group.WORLD if self.group is None else self.group)
        return Peers(
            dist.new_group(
                ranks,
                backend="gloo",
                timeout=timedelta(seconds=timeout),
                use_local_synchronization=True,
            )
        )

    def subgroup(self, ranks: Sequence[int]) -> Any:
        """A group of some of these processes; to be made by all of them."""
        if self.group is not None:
            ranks = [dist.get_global_rank(self.group, r) for r in ranks]
        return dist.new_group(list(ranks))


def owned_tensors(decoupled: Decoupled) -> list[tuple[int, torch.Tensor]]:
    """Parameters and buffers with the first stage that uses them, the same in every process."""
    owners: dict[int, int] = {}
    for k, stage in enumerate(decoupled.stages):
        module = stage.module
        for tensor in (*module.parameters(), *module.buffers(), *stage.parameters()):
            owners.setdefault(id(tensor), k)
    every = (*decoupled.model.parameters(), *decoupled.model.buffers())
    return [(owners[id(t)], t) for t in every if id(t) in owners]


def share_stage(decoupled: Decoupled, worker: StageWorker, group: Any) -> None:
    """Start equal, and sum gradients, where a group's processes work on one stage."""
    learners = [learner for _, learner in decoupled.named_learners([worker.index])]
    tensors = [t for k, t in owned_tensors(decoupled) if k == worker.index]
    tensors += [t for learner in learners for t in (*learner.parameters(), *learner.buffers())]
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    worker.learner.group = group


def share_batches(batches: Iterable[Any], links: Links, most: int, turn: int) -> Iterator[Any]:
    """Rank 0's batches, in every process; rank 0 is at most so many ahead of the slowest.

    Args:
        turn: how often batches were shared, with this: what is left of another one is not read.
    """
    mail, rank = links.mail, links.rank
    batch_kind, taken_kind = f"{BATCH} {turn}", f"{TAKEN} {turn}"
    while rank:
        letter = mail.await_letter(Address(batch_kind, 0, rank), "a batch of rank 0")
        links.tell([0], taken_kind, letter.step, None)
        if letter.step < 0:
            return
        yield letter.payload[0]
    taken = dict.fromkeys(links.streams, 0)

    def ahead(sent: int) -> int:
        for other in taken:
            while mail.take(Address(taken_kind, other, 0)) is not None:
                taken[other] += 1
        return sent - min(taken.values())

    for count, batch in enumerate(batches):
        mail.wait(
            lambda sent=count: ahead(sent) <= most,  # type: ignore[misc]
            "word of the batches that others have taken",
        )
        links.tell(taken, batch_kind, count, [batch])
        yield batch
    links.tell(taken, batch_kind, -1, [])
