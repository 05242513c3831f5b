"""That all processes do the same: run the same model and plan, step through the same batches as
often, and make the same calls where they wait for each other.

What differs is found in the first step, in which all wait for each other once. Later batches are
compared by letters, which nobody waits for, and so are calls: whoever waits hears at once of
another process that has gone on to something else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..graphs.nested import flatten
from .mailbox import Address, Letter, Mail, ParallelError
from .sharing import Peers
from .streams import Links

BATCH_DIGEST, CALL = "batch digest", "call"
EVERY = 64  # steps between two batches that are compared
_KEPT = 8  # own digests, for others who are behind
_SAME_PLAN = (
    "build the same model everywhere, and cut it with dni_fx.distributed.decouple, which makes one "
    "plan for all"
)
_HINTS = {
    "version of dni_fx or torch": "install the same everywhere",
    "number of steps": "let all resume from the same checkpoint",
}
_SAME_BATCHES = (
    "all must step through the same batches: use no DistributedSampler, shuffle with the same "
    "seed, or let rank 0 read the data (trainer.share)"
)

Digest = dict[str, list[Any]]


def digest_of(values: dict[str, Any], target: Any) -> Digest:
    """What tells a batch from another one: shapes and a check sum of every tensor, by name."""
    return {name: _digest(value) for name, value in (*values.items(), ("target", target))}


def _digest(value: Any) -> list[Any]:
    plain = (Tensor, int, float, str)
    leaves, _ = flatten(value, lambda v: isinstance(v, plain))
    return [_described(v) if isinstance(v, Tensor) else v for v in leaves]


def _described(tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    content = 0
    if tensor.layout is torch.strided:
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = zlib.crc32(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), content


def _difference(mine: Digest, other: Digest) -> str | None:
    """The first difference of two batches, in words; None where they are equal."""
    for name in {**mine, **other}:
        one, two = mine.get(name), other.get(name)
        if str(one) == str(two):  # a number that is not one equals itself here
            continue
        shapes = [
            [v[:2] if isinstance(v, tuple) else type(v).__name__ for v in digest or ()]
            for digest in (one, two)
        ]
        same = shapes[0] == shapes[1]
        return f"{name!r} has other values" if same else f"{name!r} is {shapes[1]}, not {shapes[0]}"
    return None


def agree(peers: Peers, mine: dict[str, Any], batch: Digest | None) -> None:
    """All tell each other, and wait for it, what must be the same.

    Args:
        mine: by what it is called in an error.
        batch: of the first step; None where it begins with another call.

    Raises:
        ParallelError: in every process, if one has something else.
    """
    every = peers.gather((mine, batch), "the first step")
    (first, first_batch), others = every[0], list(enumerate(every))[1:]
    for what in mine:
        if ranks := [r for r, (told, _) in others if told[what] != first[what]]:
            hint = _HINTS.get(what, _SAME_PLAN)
            raise ParallelError(f"rank {ranks[0]} has another {what} than rank 0: {hint}")
    for rank, (_, other) in others:
        if first_batch is not None and other is not None:
            _check_batch(0, rank, "its first step", _difference(first_batch, other))


def _check_batch(one: int, other: int, when: str, difference: str | None) -> None:
    if difference is not None:
        raise ParallelError(
            f"rank {other} got another batch than rank {one} in {when}: {difference}; "
            f"{_SAME_BATCHES}"
        )


def model_of(decoupled: Decoupled) -> list[tuple[str, tuple[int, ...]]]:
    """What tells a model from another one: names and shapes; weights may differ."""
    model = decoupled.model
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, tuple(tensor.shape)) for name, tensor in named]


class Agreement:
    """What this process does, and what it has heard that the others do.

    Attributes:
        reached: number of steps that were begun since the last call.
        calling: the call in which all wait for each other, and after how many steps.
    """

    def __init__(self, mail: Mail, links: Links, timeout: float) -> None:
        self.mail, self.links, self.timeout = mail, links, timeout
        self.reached = 0
        self.calling: tuple[str, int] | None = None
        self._made = 0
        self._batches: dict[int, Digest] = {}
        self._others: dict[tuple[int, int], Digest] = {}
        mail.watch = self._watch

    def begin_step(self, step: int, values: dict[str, Any], target: Any) -> None:
        """A batch begins; now and then it is compared with the others'."""
        self.reached = step + 1
        if self._made % EVERY in (0, 1):
            self._batches[step] = digest_of(values, target)
            self.links.tell(self.links.streams, BATCH_DIGEST, step, self._batches[step])
            self._batches = dict(list(self._batches.items())[-_KEPT:])
        self._made += 1
        self._watch()

    def call(self, what: str, steps: int, before: Callable[[], object]) -> None:
        """All make the same call, after as many steps.

        Args:
            what: its name.
            steps: number of steps made.
            before: done once the others know of the call, and before they are waited for.

        Raises:
            ParallelError: another process has made another call, or steps, or does not come.
        """
        self.calling = what, steps
        self.links.tell(self.links.streams, CALL, steps, what)
        before()
        for rank in self.links.streams:
            self.mail.wait(
                lambda r=rank: self._heard(r) is not None,  # type: ignore[misc]
                f"rank {rank}'s own call of {what}",
                self.timeout,
            )
        self._watch()
        for rank in self.links.streams:
            self.mail.take(Address(CALL, rank, self.links.rank))
        self.calling, self.reached = None, 0

    def _heard(self, rank: int) -> Letter | None:
        return self.mail.peek(Address(CALL, rank, self.links.rank))

    def _watch(self) -> None:
        """Whether what the others have said of themselves fits to what is done here."""
        for rank in self.links.streams:
            while letter := self.mail.take(Address(BATCH_DIGEST, rank, self.links.rank)):
                self._others[rank, letter.step] = letter.payload
            letter = self._heard(rank)
            if letter is not None:
                self._check_call(rank, letter.step, letter.payload)
        for rank, step in [key for key in self._others if key[1] in self._batches]:
            theirs = self._others.pop((rank, step))
            difference = _difference(self._batches[step], theirs)
            _check_batch(self.links.rank, rank, f"step {step + 1}", difference)

    def _check_call(self, rank: int, steps: int, what: str) -> None:
        me = self.links.rank
        here = f"rank {me} is in step {self.reached}"
        if self.calling is not None:
            if (what, steps) == self.calling:
                return
            here = f"rank {me} called {self.calling[0]} after {self.calling[1]}"
            if steps == self.calling[1]:
                raise ParallelError(
                    f"rank {rank} called {what} where rank {me} called {self.calling[0]}, both "
                    f"after {steps} steps: every process must make the same calls, with the same "
                    "batches"
                )
            if steps > self.calling[1]:
                raise ParallelError(
                    f"rank {me} made fewer steps than rank {rank}: {here}, and rank {rank} called "
                    f"{what} after {steps}; every process must make as many"
                )
        elif steps >= self.reached:
            return
        raise ParallelError(
            f"rank {rank} made fewer steps than rank {me}: it called {what} after {steps}, and "
            f"{here}; every process must make as many"
        )
