"""Signs of life: a process that hangs is noticed by all, not only by those who wait for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from .mailbox import Mail, ParallelError


class Line(Protocol):
    """What a pulse needs of the stream of letters to and from a process."""

    rank: int
    heard: float

    def sign(self) -> None:
        """Let the other process know that this one lives."""

    def is_open(self) -> bool:
        """Whether something may still come from the other process."""


class Pulse:
    """Tells the others that this process lives, and watches whether they do.

    A process whose main thread computes for long still gives signs; one that is stopped or gone
    does not. Whatever comes from a process is a sign.

    Args:
        mail: that is failed where another process shows no sign of life.
        lines: to the other processes.
        timeout: seconds.
        in_use: whether anybody can still use, or close, what this belongs to.
        abandon: called where nobody can.
    """

    def __init__(
        self,
        mail: Mail,
        lines: Iterable[Line],
        timeout: float,
        in_use: Callable[[], bool],
        abandon: Callable[[], None],
    ) -> None:
        self.mail, self.lines, self.timeout = mail, list(lines), timeout
        self.in_use, self.abandon = in_use, abandon
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="dni_fx pulse", daemon=True)

    def _run(self) -> None:
        while not self.stopped.wait(min(1.0, self.timeout / 4)):
            if not self.in_use():
                self.abandon()
                return
            for line in self.lines:
                with contextlib.suppress(RuntimeError):  # who receives from there tells why
                    line.sign()
            for line in self.lines:
                if line.is_open() and time.monotonic() - line.heard > self.timeout:
                    self.mail.fail(
                        ParallelError(
                            f"rank {line.rank} has shown no sign of life for {self.timeout:g} s: "
                            "its process hangs, or was stopped; end it, or set timeout= if "
                            "that is usual"
                        )
                    )
                    return
