"""Streams of letters between the processes of a torch.distributed group, one for each ordered pair.

A receive makes progress only while somebody waits for it, so each stream has a thread that does,
with several receives posted ahead: what is sent need not first ask whether it may. A letter longer
than what is posted goes beside the stream, and later receives are posted longer.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .mailbox import ANSWER, Address, Letter, Mail, ParallelError
from .placement import Part, Places, join
from .serialization import pack, unpack

AHEAD = 8  # receives posted at once
SHORTEST, LONGEST = 2**16, 2**26  # bytes of a posted receive
_TAG = 0x0D41
_YEAR = timedelta(days=365)
_trainers = 0
_idle: dict[tuple[int, ...], Any] = {}  # groups of closed trainers, by ranks


class _Failure(NamedTuple):
    """The last letter of a process that failed."""

    message: str


class _End(NamedTuple):
    """The last letter of a process that closes."""


def _later(length: int) -> int:
    """Bytes of the receives that are posted after a letter of this length, which did not fit."""
    return min(LONGEST, max(SHORTEST, 1 << (length - 1).bit_length()))


def _group_of(ranks: tuple[int, ...]) -> Any:
    """A group for one trainer; of an earlier one where that has closed, since a group keeps threads
    and sockets.
    """
    group = _idle.pop(ranks, None)
    with contextlib.suppress(KeyError, ValueError):
        if group is not None and dist.get_process_group_ranks(group):
            return group
    # A receive waits for as long as nothing is sent; who lives is found out by other means.
    return dist.new_group(
        list(ranks), backend="gloo", timeout=_YEAR, use_local_synchronization=True
    )


class _Outgoing:
    """The stream to one rank."""

    def __init__(self, rank: int, tag: int, group: Any) -> None:
        self.rank, self.tag, self.group = rank, tag, group
        self.lock = threading.Lock()
        self.count = 0
        self.lengths = deque([(0, SHORTEST)])  # from which letter on how much fits
        self.works: deque[tuple[Any, torch.Tensor]] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(
            target=self._reap, name=f"dni_fx to rank {rank}", daemon=True
        )
        self.thread.start()

    def send(self, letter: Any) -> None:
        buffer = pack(letter)
        with self.lock:
            while len(self.lengths) > 1 and self.lengths[1][0] <= self.count:
                self.lengths.popleft()
            parts = [(buffer, self.tag)]
            if buffer.numel() > self.lengths[0][1]:
                parts = [(pack(buffer.numel()), self.tag), (buffer, self.tag + 1)]
                self.lengths.append(
                    (self.count + AHEAD, max(self.lengths[-1][1], _later(buffer.numel())))
                )
            self.count += 1
            works = [
                (dist.isend(b, group=self.group, group_dst=self.rank, tag=t), b) for b, t in parts
            ]
        with self.changed:
            self.works.extend(works)
            self.changed.notify()

    def _reap(self) -> None:
        """Let go of what has been taken."""
        while True:
            with self.changed:
                while not self.works:
                    if self.closed:
                        return
                    self.changed.wait()
                work, _buffer = self.works[0]
            try:
                work.wait()
            except RuntimeError:  # the receiving side tells what is wrong
                with self.changed:
                    self.closed = True
                    self.works.clear()
                return
            del _buffer
            with self.changed:
                self.works.popleft()

    def close(self, seconds: float) -> None:
        """Wait until everything has been taken."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(seconds)


class Links:
    """All streams of this process.

    Args:
        mail: where letters for this process go.
        places: who runs which rows of which stage.
        group: the process group, of whose ranks a group of its own is made; gloo carries tensors of
            the CPU, and those of other devices by way of it.
        timeout: seconds to wait for others at the end.
    """

    def __init__(self, mail: Mail, places: Places, group: Any, timeout: float) -> None:
        global _trainers
        _trainers += 1  # the same in all processes, which make their trainers in one order
        self.mail, self.places, self.timeout = mail, places, timeout
        self.parts: dict[
            tuple[Address, int], dict[int, Any]
        ] = {}  # of letters from several processes
        self.rank = dist.get_rank(group)
        self.others = [r for r in range(dist.get_world_size(group)) if r != self.rank]
        tag = _TAG + 2 * _trainers
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.name = f"{_trainers}/{'-'.join(map(str, ranks))}"
        self.ranks = tuple(ranks)
        self.group = _group_of(self.ranks)
        self.outgoing = {r: _Outgoing(r, tag, self.group) for r in self.others}
        self.threads = [
            threading.Thread(
                target=self._receive, args=(r, tag), name=f"dni_fx from rank {r}", daemon=True
            )
            for r in self.others
        ]
        mail.post = self.post
        self.told: set[int] = set()  # who has had the last letter
        atexit.register(self._leave)
        for thread in self.threads:
            thread.start()

    def post(self, address: Address, letter: Letter) -> None:
        """Send a letter to the processes of its taker, to each the rows that it works on."""
        for rank, part, payload in self.places.divide(
            address.sender, address.taker, self.rank, letter
        ):
            if rank == self.rank:
                self._put_together(address, letter.step, part, payload)
                continue
            try:
                self.outgoing[rank].send((tuple(address), letter.step, tuple(part), payload))
            except RuntimeError as error:
                self.mail.check()
                raise self._dead(rank, error) from error

    def tell(self, ranks: Iterable[int], kind: str, step: int, payload: Any) -> None:
        """Send something that is for processes, not for stages."""
        for rank in ranks:
            letter = (tuple(Address(kind, self.rank, rank)), step, tuple(Part(0, 1, 0)), payload)
            self.outgoing[rank].send(letter)

    def _put_together(self, address: Address, step: int, part: Part, payload: Any) -> None:
        """Deliver a letter once the parts of it that others send are there."""
        if part.total > 1:
            with self.mail.changed:
                parts = self.parts.setdefault((address, step), {})
                parts[part.place] = (part, payload)
                if len(parts) < part.total:
                    return
                del self.parts[address, step]
            payload = join([parts[place] for place in sorted(parts)], address.kind == ANSWER)
        self.mail.deliver(address, Letter(step, payload))

    def _leave(self) -> None:
        """No thread waits in gloo when the interpreter ends: that would abort the process."""
        self._tell(_Failure("its script ended before trainer.close()"))  # which the others answer
        for thread in self.threads:
            thread.join(2.0)

    def close(self) -> None:
        """Say so to the others, and wait until they have said so, too.

        Each process's word is its last: what comes where nobody receives would keep gloo's thread
        busy for ever.
        """
        self._tell(_End())
        for thread in self.threads:
            while thread.is_alive() and self.mail.failure is None:
                thread.join(0.1)
        self.mail.check()
        for stream in self.outgoing.values():
            stream.close(self.timeout)
        atexit.unregister(self._leave)
        _idle[self.ranks] = self.group

    def fail(self, message: str) -> None:
        """Tell the others why this process ends."""
        self._tell(_Failure(message))

    def _tell(self, last: Any) -> None:
        for rank in self.others:
            self._tell_one(rank, last)

    def _tell_one(self, rank: int, last: Any) -> None:
        with self.mail.changed:
            told = rank in self.told
            self.told.add(rank)
        if not told:
            try:
                self.outgoing[rank].send(last)
            except RuntimeError:  # it has ended already
                self.outgoing[rank].closed = True

    def _receive(self, rank: int, tag: int) -> None:
        length = SHORTEST
        posted: deque[tuple[Any, torch.Tensor]] = deque()
        try:
            while True:
                while len(posted) < AHEAD:
                    buffer = torch.empty(length, dtype=torch.uint8)
                    posted.append(
                        (dist.irecv(buffer, group=self.group, group_src=rank, tag=tag), buffer)
                    )
                work, buffer = posted.popleft()
                work.wait()
                letter = unpack(buffer)
                if isinstance(letter, int):
                    whole = torch.empty(letter, dtype=torch.uint8)
                    rest: Any = dist.irecv(whole, group=self.group, group_src=rank, tag=tag + 1)
                    rest.wait()
                    length = max(length, _later(letter))
                    letter = unpack(whole)
                if isinstance(letter, _End):
                    return
                if isinstance(letter, _Failure):
                    self.mail.fail(ParallelError(f"rank {rank} failed: {letter.message}"))
                    self._tell_one(rank, _End())  # it waits for a last word
                    return
                address, step, part, payload = letter
                self._put_together(Address(*address), step, Part(*part), payload)
        except RuntimeError as error:
            self.mail.fail(self._dead(rank, error))
        except BaseException as error:
            self.mail.fail(error)

    @staticmethod
    def _dead(rank: int, error: BaseException) -> ParallelError:
        reason = str(error).splitlines()[0].split("] ", 1)[-1]
        return ParallelError(
            f"rank {rank} cannot be reached ({reason}): its process has ended, or the network has; "
            "see its own output"
        )
