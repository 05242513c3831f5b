"""What processes share: rows and gradients of one stage, the whole model, a loader's batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from .executors import shared_state
from .job import Values
from .limits import Flow
from .mailbox import Address, Mail
from .peers import Peers
from .placement import Placement, Places, place_stages, slice_rows
from .streams import Links
from .worker import StageWorker

BATCH, TAKEN = "batch", "batch taken"


def find_places(
    decoupled: Decoupled, placement: Placement | None, world: int, flow: Flow
) -> Places:
    """Which rank runs which stage.

    Args:
        decoupled: the model.
        placement: what the user asks for; see :func:`place_stages`.
        world: number of ranks.
        flow: how far stages may drift apart.

    Raises:
        DecouplingError: stages that cannot be placed so: they share state, or need a fixed
            staleness.
    """
    places = place_stages(placement, [s.name for s in decoupled.stages], world)
    for name, where in shared_state(decoupled):
        if len({places.ranks[k] for k in where}) > 1:
            stages = ", ".join(f"stage_{k}" for k in where)
            raise DecouplingError(
                f"{name!r} is used by {stages}, which are placed on different ranks: put them "
                "on one (placement=), or keep them in one stage "
                "(dni_fx.plan_cuts(keep_together=...))"
            )
    if places.divided and flow.staleness is None:
        raise DecouplingError(
            f"stage_{places.divided[0]} is shared by ranks "
            f"{list(places.ranks[places.divided[0]])}, which must update in step: pass "
            "staleness=, say 2"
        )
    return places


def owned_tensors(decoupled: Decoupled) -> list[tuple[int, torch.Tensor]]:
    """Parameters and buffers with the first stage that uses them, the same in every process."""
    stages, model = decoupled.stages, decoupled.model
    used = [
        {id(t) for t in (*s.module.parameters(), *s.module.buffers(), *s.parameters())}
        for s in stages
    ]
    found = []
    for tensor in (*model.parameters(), *model.buffers()):
        where = [k for k, ids in enumerate(used) if id(tensor) in ids]
        if where:
            found.append((where[0], tensor))
    return found


def gather_model(decoupled: Decoupled, places: Places, peers: Peers) -> None:
    """Bring every stage's parameters and buffers into this process's model."""
    with torch.no_grad():
        for stage, tensor in owned_tensors(decoupled):
            peers.copy_from(min(places.ranks[stage]), tensor)


class Rows:
    """Which rows of a batch the stages here work on.

    Args:
        places: who runs which rows of which stage.
        rank: of this process.
        queue: how many batches may be under way.
    """

    def __init__(self, places: Places, rank: int, queue: int) -> None:
        self.places, self.rank, self.queue = places, rank, queue
        self._size = 0

    def set_size(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember a batch's size where some stage works on rows of it.

        Raises:
            DecouplingError: it has fewer rows than ranks that share a stage.
        """
        if not self.places.divided:
            return
        self._size = _batch_size(values)
        least = max(len(r) for r in self.places.ranks)
        if self._size < least:
            raise DecouplingError(
                f"a batch of {self._size} has no row for each of {least} ranks that share a stage"
            )
        self.places.sizes[step] = self._size
        self.places.sizes.pop(step - 4 * self.queue - 64, None)

    def share(self, index: int) -> float:
        """Of the newest batch's rows, those that a stage works on here."""
        if not self.places.divided:
            return 1.0
        first, end = self.places.rows(index, self.rank, self._size)
        return (end - first) / self._size

    def of(self, index: int, values: Values, target: Any) -> tuple[Values, Any]:
        """The model's inputs and the target, of the rows that a stage works on here."""
        if index not in self.places.divided:
            return values, target
        size = _batch_size(values)
        first, end = self.places.rows(index, self.rank, size)
        return slice_rows(values, first, end, size), slice_rows(target, first, end, size)


def _batch_size(values: Mapping[str, Any]) -> int:
    """Rows of the first input that has any; 0 where none has."""
    tensors = (v for v in values.values() if isinstance(v, torch.Tensor) and v.dim())
    return next((t.shape[0] for t in tensors), 0)


def share_stage(decoupled: Decoupled, worker: StageWorker, group: Any) -> None:
    """Start equal, and sum gradients, where several processes work on one stage.

    Args:
        decoupled: the model.
        worker: of the stage here.
        group: of the processes that work on it.
    """
    learners = [learner for _, learner in decoupled.named_learners([worker.index])]
    tensors = [t for k, t in owned_tensors(decoupled) if k == worker.index]
    tensors += [t for learner in learners for t in (*learner.parameters(), *learner.buffers())]
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)

    def reduce(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)

    worker.learner.reduce = reduce


def share_batches(
    batches: Iterable[Any], mail: Mail, links: Links, peers: Peers, most: int
) -> Iterator[Any]:
    """Rank 0's batches, in every process.

    Args:
        batches: looked at in rank 0 alone.
        mail: where batches, and word of those that were taken, arrive.
        links: the streams to the others.
        peers: the processes.
        most: how many batches rank 0 may be ahead of the slowest process.
    """
    if peers.rank:
        while True:
            letter = mail.await_letter(Address(BATCH, 0, peers.rank), "a batch of rank 0")
            links.tell([0], TAKEN, letter.step, None)
            if letter.step < 0:
                return
            yield letter.payload[0]
    taken = dict.fromkeys(range(1, peers.world), 0)

    def ahead(sent: int) -> int:
        for other in taken:
            while mail.take(Address(TAKEN, other, 0)) is not None:
                taken[other] += 1
        return sent - min(taken.values())

    for count, batch in enumerate(batches):
        mail.wait(
            lambda sent=count: ahead(sent) <= most,  # type: ignore[misc]
            "word of the batches that others have taken",
        )
        links.tell(taken, BATCH, count, [batch])
        yield batch
    links.tell(taken, BATCH, -1, [])
