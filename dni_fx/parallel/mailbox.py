"""Letters between stages that run at once: one box for each pair of stages and kind of letter, and
one lock for all.

Boxes need no bound of their own: a stage sends no more values than its window allows before they
are answered, and answers nothing that it was not sent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import DecouplingError

VALUE, ANSWER = "value", "answer"


class Address(NamedTuple):
    """Where a letter goes: what kind it is, and the stages that send and take it."""

    kind: str
    sender: int
    taker: int


class Letter(NamedTuple):
    """What one stage tells another about one batch; nothing at all, where ``payload`` is None."""

    step: int
    payload: Any


class ParallelError(DecouplingError):
    """A stage, or the process that it runs in, failed or does not answer."""


@dataclass
class Mail:
    """The boxes of one process.

    Attributes:
        timeout: seconds to wait for a letter.
        post: takes all letters to where they belong, where there are several processes; else they
            are delivered here.
        watch: called while something is waited for, after each letter; may raise.
    """

    timeout: float = 300.0
    post: Callable[[Address, Letter], None] | None = None
    watch: Callable[[], None] = lambda: None
    boxes: dict[Address, deque[Letter]] = field(default_factory=dict)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.changed = threading.Condition()

    def send(self, address: Address, step: int, payload: Any) -> None:
        """Put a letter into its box, or on its way there; waits for nobody."""
        self.check()
        (self.post or self.deliver)(address, Letter(step, payload))

    def deliver(self, address: Address, letter: Letter) -> None:
        """A letter has come."""
        with self.changed:
            self.boxes.setdefault(address, deque()).append(letter)
            self.changed.notify_all()

    def peek(self, address: Address) -> Letter | None:
        """The oldest letter, left in its box."""
        with self.changed:
            box = self.boxes.get(address)
            return box[0] if box else None

    def take(self, address: Address) -> Letter | None:
        """The oldest letter, if there is one."""
        with self.changed:
            box = self.boxes.get(address)
            return box.popleft() if box else None

    def await_letter(self, address: Address, what: str) -> Letter:
        """The oldest letter, waited for; see :meth:`wait`."""
        self.wait(lambda: self.peek(address) is not None, what)
        letter = self.take(address)
        assert letter is not None
        return letter

    def wait(self, ready: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Sleep until something is so, which is asked after each letter that comes.

        Raises:
            ParallelError: some stage has failed, or ``timeout`` has passed: ``what`` did not come.
        """
        timeout = timeout or self.timeout
        until = time.perf_counter() + timeout
        with self.changed:
            while not ready():
                self.check()
                self.watch()
                left = until - time.perf_counter()
                if left <= 0:
                    raise ParallelError(
                        f"{what} did not come within {timeout:g} s: whoever sends it hangs, "
                        "has ended, or made fewer steps; every process must make the same number "
                        "of steps (timeout= sets the time)"
                    )
                self.changed.wait(min(left, threading.TIMEOUT_MAX))
            self.check()

    def fail(self, error: BaseException) -> None:
        """Everybody who waits is woken, and told; the first failure counts."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def check(self) -> None:
        """Raise what somebody else has failed with."""
        if self.failure is not None:
            ours = isinstance(self.failure, DecouplingError)
            kind = type(self.failure) if ours else ParallelError
            raise kind(str(self.failure)) from self.failure
