"""Streams of letters between the processes of a group, one for each other process.

A receive makes progress only while somebody waits for it, so each stream has a thread that does,
with several receives posted ahead: what is sent need not first ask whether it may. A letter longer
than what is posted goes beside the stream, and later receives are posted longer.

An interpreter that ends while a thread waits in gloo aborts, so the threads end before: each
process says a last word, after which it sends nothing, and receives until it has heard the others'.
Where these do not come in time, gloo's connections are closed, which wakes whoever waits in them.

A process that hangs is noticed by all, not only by those who wait for it: each gives signs of life,
also while its main thread computes for long; one that is stopped or gone does not.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from .mailbox import ANSWER, Address, Letter, Mail, ParallelError
from .placement import Part, Places, join
from .serialization import pack, unpack

AHEAD = 8  # receives posted at once
SHORTEST, LONGEST = 2**16, 2**26  # bytes of a posted receive
GRACE = 2.0  # seconds for the last words of the others, where this process ends before its time
_TAG = 0x0D41
_YEAR = timedelta(days=365)
_newest = 0  # number of the newest trainer here
_idle: dict[tuple[int, ...], Any] = {}  # groups of closed trainers, by ranks


class _Word(NamedTuple):
    """What a process says of itself: that it lives, and how its stages do; at last that it ends,
    and how it failed.
    """

    is_last: bool
    failure: str = ""
    rows: tuple[dict[str, Any], ...] = ()


def newest_number() -> int:
    """Of the trainers that this process has made; others may have made more, where some failed."""
    return _newest


class Owner(Protocol):
    """Who streams are for, and what others should know of it."""

    rows: tuple[dict[str, Any], ...]

    def newest_loss(self) -> tuple[int, float]:
        """As far as it is known here, with the number of steps."""


def _later(length: int) -> int:
    """Bytes of the receives that are posted after a letter of this length, which did not fit."""
    return min(LONGEST, max(SHORTEST, 1 << (length - 1).bit_length()))


def _group_of(ranks: tuple[int, ...]) -> Any:
    """A group for one trainer; that of a closed one if any, since it keeps threads and sockets."""
    group = _idle.pop(ranks, None)
    with contextlib.suppress(KeyError, ValueError):
        if group is not None and dist.get_process_group_ranks(group):
            return group
    # A receive waits for as long as nothing is sent; who lives is found out by other means.
    return dist.new_group(
        list(ranks), backend="gloo", timeout=_YEAR, use_local_synchronization=True
    )


def _thread(work: Callable[[], None], name: str) -> threading.Thread:
    return threading.Thread(target=work, name=f"dni_fx {name}", daemon=True)


class Stream:
    """Letters to and from one rank, in order, on a thread each way.

    It calls the group itself: ``torch.distributed``'s functions know no group that the script has
    destroyed, and last words must still go through.

    Args:
        rank: of the other process.
        tag: of the letters; the next one is of those that go beside the stream.
        take: called with each letter that comes.
        fail: called with the error that ends the stream.

    Attributes:
        rows: how the stages of the other process were doing, when it last said so.
        last_sign: when the newest letter came, in seconds of ``time.monotonic``.
        over: whether the last word of the other process has come.
    """

    def __init__(
        self,
        rank: int,
        tag: int,
        group: Any,
        take: Callable[[Any], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.rank, self.tag, self.group, self.take, self.fail = rank, tag, group, take, fail
        self.last_sign, self.over = time.monotonic(), False
        self.rows: tuple[dict[str, Any], ...] = ()
        self.changed = threading.Condition()
        self.count = 0  # letters sent
        self.lengths = deque([(0, SHORTEST)])  # from which letter on how much fits
        self.works: deque[tuple[Any, torch.Tensor]] = deque()
        self.ended = False  # the last word was said
        self.outgoing = _thread(self._reap, f"to rank {rank}")
        self.incoming = _thread(self._receive, f"from rank {rank}")

    def send(self, letter: Any) -> None:
        """Put a letter on its way; nothing, once the last word was said."""
        buffer = pack(letter)
        with self.changed:
            if self.ended:
                return
            self.ended = isinstance(letter, _Word) and letter.is_last
            while len(self.lengths) > 1 and self.lengths[1][0] <= self.count:
                self.lengths.popleft()
            parts = [(buffer, self.tag)]
            if buffer.numel() > self.lengths[0][1]:
                parts = [(pack(buffer.numel()), self.tag), (buffer, self.tag + 1)]
                fits = max(self.lengths[-1][1], _later(buffer.numel()))
                self.lengths.append((self.count + AHEAD, fits))
            self.count += 1
            try:
                self.works.extend((self.group.send([b], self.rank, t), b) for b, t in parts)
            finally:
                self.changed.notify()

    def say(self, word: _Word) -> None:
        """Say a word, where the last was not said yet and somebody is there to hear it."""
        with contextlib.suppress(RuntimeError):  # who receives from there tells why
            self.send(word)

    def _reap(self) -> None:
        """Let go of what has been taken."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.works or self.ended)
                if not self.works:
                    return
                work = self.works[0][0]
            try:
                work.wait()
            except RuntimeError:  # the receiving side tells what is wrong
                with self.changed:
                    self.ended = True
                    self.works.clear()
                return
            del work
            with self.changed:
                self.works.popleft()

    def _receive(self) -> None:
        try:
            self._receive_all()
        except BaseException as error:
            self.fail(self.dead(error) if isinstance(error, RuntimeError) else error)

    def _receive_all(self) -> None:
        """Take every letter up to the last word."""
        length = SHORTEST
        posted: deque[tuple[Any, torch.Tensor]] = deque()
        while True:
            while len(posted) < AHEAD:
                posted.append(self._post(length, self.tag))
            work, buffer = posted.popleft()
            work.wait()
            letter = unpack(buffer)
            if isinstance(letter, int):
                work, whole = self._post(letter, self.tag + 1)
                work.wait()
                length = max(length, _later(letter))
                letter = unpack(whole)
            self.last_sign = time.monotonic()
            if not isinstance(letter, _Word):
                self.take(letter)
                continue
            self.over, self.rows = letter.is_last, letter.rows or self.rows
            if letter.failure:
                self.fail(ParallelError(f"rank {self.rank} failed: {letter.failure}"))
                self.say(_Word(True))  # it waits for one
            if self.over:
                return

    def _post(self, length: int, tag: int) -> tuple[Any, torch.Tensor]:
        buffer = torch.empty(length, dtype=torch.uint8)
        return self.group.recv([buffer], self.rank, tag), buffer

    def dead(self, error: BaseException) -> ParallelError:
        """What is said where gloo says that there is no connection."""
        reason = str(error).splitlines()[0].split("] ", 1)[-1]
        return ParallelError(
            f"rank {self.rank} cannot be reached ({reason}): its process has ended, or the network "
            "has; see its own output"
        )


class Links:
    """All streams of this process, and the threads that serve them.

    The threads end with :meth:`close`, with :meth:`leave`, before the interpreter does, and where
    nobody holds the owner any more; none of them holds it.

    Args:
        group: the process group, of whose ranks a group of its own is made; gloo carries tensors of
            the CPU, and those of other devices by way of it.
        timeout: seconds to wait for others at the end, and for a sign of their life.
        number: of the trainer, the same in all processes, and larger than any before.
    """

    def __init__(
        self,
        mail: Mail,
        places: Places,
        group: Any,
        timeout: float,
        owner: Owner,
        number: int,
    ) -> None:
        global _newest
        _newest = number
        self.mail, self.places, self.timeout = mail, places, timeout
        # Of letters from several processes.
        self.parts: dict[tuple[Address, int], dict[int, tuple[Part, Any]]] = {}
        self.rank = places.rank
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.ranks = tuple(ranks)
        self.group = _group_of(self.ranks)
        others, tag = [r for r in range(len(ranks)) if r != self.rank], _TAG + 2 * number
        self.streams = {r: Stream(r, tag, self.group, self._take, mail.fail) for r in others}
        self.loss = (0, math.nan)  # of the newest batch that others have told of
        self._owner, self._stopped = weakref.ref(owner), threading.Event()
        ways = [t for s in self.streams.values() for t in (s.incoming, s.outgoing)]
        self.threads = [*ways, _thread(self._give_signs, "pulse")]
        mail.post = self.post
        atexit.register(self.leave, "its script ended before trainer.close()")
        for thread in self.threads:
            thread.start()

    def post(self, address: Address, letter: Letter) -> None:
        """Send a letter to the processes of its taker, to each the rows that it works on."""
        _, sender, taker = address
        for rank, part, payload in self.places.divide(sender, taker, self.rank, letter):
            sent = (tuple(address), letter.step, tuple(part), payload, self._known_loss())
            if rank == self.rank:
                self._take(sent)
                continue
            try:
                self.streams[rank].send(sent)
            except RuntimeError as error:
                self.mail.check()
                raise self.streams[rank].dead(error) from error

    def tell(self, ranks: Iterable[int], kind: str, step: int, payload: Any) -> None:
        """Send something that is for processes, not for stages."""
        for rank in ranks:
            address, part = tuple(Address(kind, self.rank, rank)), tuple(Part(0, 1, 0))
            self.streams[rank].send((address, step, part, payload, self._known_loss()))

    def _known_loss(self) -> tuple[int, float]:
        owner = self._owner()
        return self.loss if owner is None else owner.newest_loss()

    def _take(self, sent: tuple[Any, int, Any, Any, tuple[int, float]]) -> None:
        """Deliver a letter once the parts of it that others send are there."""
        address, step, part, payload = Address(*sent[0]), sent[1], Part(*sent[2]), sent[3]
        self.loss = max(self.loss, sent[4], key=lambda known: known[0])
        if part.total > 1:
            with self.mail.changed:
                parts = self.parts.setdefault((address, step), {})
                parts[part.place] = (part, payload)
                if len(parts) < part.total:
                    return
                del self.parts[address, step]
            payload = join([parts[place] for place in sorted(parts)], address.kind == ANSWER)
        self.mail.deliver(address, Letter(step, payload))

    def close(self) -> None:
        """Say so to the others, and wait until they have said so, too.

        Each process's word is its last: what comes where nobody receives would keep gloo's thread
        busy for ever.

        Raises:
            ParallelError: another process failed meanwhile.
        """
        try:
            for stream in self.streams.values():
                stream.say(_Word(True))
            for stream in self.streams.values():
                while stream.incoming.is_alive() and self.mail.failure is None:
                    stream.incoming.join(0.1)
            self.mail.check()
            for stream in self.streams.values():
                stream.outgoing.join(self.timeout)  # until everything has been taken
        finally:
            cut = self._end_threads()
        if not cut:
            _idle[self.ranks] = self.group

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends, and end its threads.

        It may be called again, from any thread and at any time.
        """
        self.mail.fail(ParallelError(f"rank {self.rank} failed: {reason}"))
        for stream in self.streams.values():
            stream.say(_Word(True, reason))
        self._end_threads()

    def _end_threads(self) -> bool:
        """Wait for the others' last words, but not for long. Returns whether connections were
        closed, so that the group is of no more use.
        """
        self._stopped.set()
        threads = [t for t in self.threads if t is not threading.current_thread()]
        until = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        cut = not all(s.over for s in self.streams.values()) or any(t.is_alive() for t in threads)
        if cut:
            self._cut()
        for thread in threads:
            thread.join(self.timeout)
        atexit.unregister(self.leave)
        return cut

    def _give_signs(self) -> None:
        """Tell the others that this process lives, and watch them, while somebody can close it."""
        while not self._stopped.wait(min(1.0, self.timeout / 4)):
            owner = self._owner()
            if owner is None:
                self.leave("its trainer was dropped before trainer.close()")
                return
            self.give_sign(owner.rows)
            del owner
            oldest = time.monotonic() - self.timeout
            for rank, stream in self.streams.items():
                if stream.last_sign < oldest and stream.incoming.is_alive():
                    error = ParallelError(
                        f"rank {rank} has shown no sign of life for {self.timeout:g} s: its "
                        "process hangs, or was stopped; end it, or set timeout= if that is usual"
                    )
                    self.mail.fail(error)
                    return

    def give_sign(self, rows: tuple[dict[str, Any], ...]) -> None:
        """Tell the others that this process lives, and how its stages do."""
        for stream in self.streams.values():
            stream.say(_Word(False, rows=rows))

    def _cut(self) -> None:
        """Fail what waits in gloo: a receive whose time is up closes its connection."""
        nothing = torch.empty(1, dtype=torch.uint8)
        for rank in self.streams:  # to some of them there may be no connection any more
            with contextlib.suppress(RuntimeError):
                self.group.recv([nothing], rank, _TAG).wait(timedelta(milliseconds=1))
