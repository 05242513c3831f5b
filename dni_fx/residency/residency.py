"""Which stages are in memory, and who moves the others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .absent import mark_absent, mark_present
from .store import Store, StoreError

_SMALL = 64  # bytes: counters and the like are not worth a move


@dataclass(frozen=True)
class _Away:
    """What has left memory: storages, with their sizes, and the tensors in them."""

    storages: list[tuple[torch.UntypedStorage, int]]
    tensors: list[Tensor]


class Residency:
    """Keeps at most so many stages in memory: the one at work, and, where there may be more, the
    one that comes next or the one that has just worked, which a thread reads and writes meanwhile.

    Stages are visited in order, again and again, so those that stay are always the same: with a
    bound of n the first n - 2, while the others take turns in two places.

    Args:
        tensors: gives what each stage needs in memory while it works: weights, buffers, states of
            its optimisers, held gradients.
        waiting: gives those of them that graphs may hold from one visit to the next, since a
            message is late: what its sources learn.
        most: how many stages may be in memory.
        store: where the others are.

    A stage that is mapped from a file, as ``torch.load(mmap=True)`` leaves it, counts as out of
    memory until its first visit, which copies it.
    """

    def __init__(
        self,
        tensors: Sequence[Callable[[], Iterable[Tensor]]],
        waiting: Sequence[Callable[[], Iterable[Tensor]]],
        most: int,
        store: Store,
    ) -> None:
        self._tensors, self._waiting = list(tensors), list(waiting)
        self.most, self.store = most, store
        count = len(self._tensors)
        self.moving = list(range(max(most - 2, 0), count)) if most < count else []
        self._away: dict[int, _Away] = {}
        self._movers = ThreadPoolExecutor(1, "dni_fx store") if self.moving and most > 1 else None
        self._under_way: Future[None] | None = None
        users = Counter(a for give in self._tensors for a in {_address(t) for t in give()})
        self._shared = {address for address, count in users.items() if count > 1}

    @property
    def away(self) -> tuple[int, ...]:
        """Stages that are not in memory."""
        self._settle()
        return tuple(sorted(self._away))

    @contextlib.contextmanager
    def visit(self, stage: int) -> Iterator[None]:
        """The region in which a stage works.

        Raises:
            StoreError: it cannot be read, or another one could not be written.
        """
        self._settle()
        if stage in self.moving:
            place = self.moving.index(stage)
            following = self.moving[(place + 1) % len(self.moving)]
            if self._movers is None:
                self._move(self._others(stage), [stage])
            else:
                others = self._others(stage, following)
                if stage in self._away or len(others) > 1:
                    self._move(others, [stage])
                    others = []
                self._under_way = self._movers.submit(self._move, others, [following])
        yield

    def _others(self, *staying: int) -> list[int]:
        """Stages that are in memory and need not be."""
        return [k for k in self.moving if k not in staying and k not in self._away]

    def gather(self) -> None:
        """Bring all stages into memory."""
        self._settle()
        self._move([], list(self._away))

    def close(self) -> None:
        """Bring all stages into memory for good, and forget the store; once.

        Raises:
            StoreError: one of them cannot be read any more; the others are in memory.
        """
        failures: list[StoreError] = []
        for stage in (None, *self.moving):
            try:
                if stage is None:
                    self._settle()
                elif stage in self._away:
                    self._come(stage)
            except StoreError as error:
                failures.append(error)
        self.moving = []
        self._away.clear()
        if self._movers is not None:
            self._movers.shutdown()
        self.store.clear()
        if failures:
            raise failures[0]

    def _settle(self) -> None:
        """Wait for what is being moved."""
        moving, self._under_way = self._under_way, None
        if moving is not None:
            moving.result()

    def _move(self, leaving: Iterable[int], coming: Iterable[int]) -> None:
        for stage in leaving:
            self._leave(stage)
        for stage in coming:
            self._come(stage)

    def _leave(self, stage: int) -> None:
        every = {id(t): t for t in self._tensors[stage]()}.values()
        tensors = [t for t in every if self._may_leave(t)]
        waiting = {id(t) for t in self._waiting[stage]()}
        _check_alone([t for t in tensors if id(t) not in waiting], stage)
        storages = list({_address(t): t.untyped_storage() for t in tensors}.values())
        self.store.write(stage, storages)
        self._away[stage] = _Away([(s, s.nbytes()) for s in storages], tensors)
        for tensor in tensors:
            mark_absent(tensor, stage)
        for storage in storages:
            storage.resize_(0)
        _give_back()

    def _come(self, stage: int) -> None:
        if stage not in self._away:
            self._take_over(stage)
            return
        away = self._away[stage]
        try:
            for storage, size in away.storages:
                storage.resize_(size)
            self.store.read(stage, [s for s, _ in away.storages])
        except BaseException:
            for storage, _ in away.storages:
                storage.resize_(0)
            raise
        for tensor in away.tensors:
            mark_present(tensor)
        del self._away[stage]

    def _take_over(self, stage: int) -> None:
        """Give tensors memory of their own that are mapped from a file, or another's, too."""
        found: dict[tuple[int, torch.Size], Tensor] = {}
        for tensor in self._tensors[stage]():
            if not tensor.untyped_storage().resizable():
                key = tensor.data_ptr(), tensor.shape
                tensor.data = found.setdefault(key, tensor.detach().clone())

    def _may_leave(self, tensor: Tensor) -> bool:
        """Whether its memory is its stage's alone, and worth it."""
        storage = tensor.untyped_storage()
        alone = storage.resizable() and _address(tensor) not in self._shared
        return alone and storage.nbytes() >= _SMALL


def _check_alone(tensors: Sequence[Tensor], stage: int) -> None:
    """Refuse to free memory that other tensors look at: torch would crash where they are read."""
    if _looked_at(tensors):
        gc.collect()  # a graph that nobody holds any more
    for tensor in _looked_at(tensors):
        raise StoreError(
            f"stage_{stage} cannot leave memory: that of a tensor of shape {tuple(tensor.shape)} "
            "is another tensor's, too (a state_dict() that was kept, something detached, a graph): "
            "keep copies, copy.deepcopy(model.state_dict()), or let it go before the next step"
        )


def _looked_at(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those whose memory others use, too; the storage as an object of Python counts as one."""
    own = Counter(map(_address, tensors))
    uses = {a: torch._C._storage_Use_Count(a) for a in own}
    return [t for t in tensors if uses[_address(t)] > own[_address(t)] + 1]


def _address(tensor: Tensor) -> int:
    """The identity of its storage, in memory or not."""
    return tensor.untyped_storage()._cdata


def _give_back() -> None:
    """Have the C library return freed blocks to the system, which it keeps otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
