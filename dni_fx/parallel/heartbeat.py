"""Signs of life: a process that hangs is noticed by all, not only by those who wait for it."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

from .mailbox import Mail, ParallelError


class Pulse:
    """Tells the others, by the group's store, that this process lives, and watches whether they do.

    A process whose main thread computes for long still gives signs; one that is stopped or gone
    does not.

    Args:
        mail: that is failed where another process shows no sign of life.
        name: of the trainer, the same in all its processes.
        rank: of this process.
        world: number of processes.
        timeout: seconds.
    """

    def __init__(self, mail: Mail, name: str, rank: int, world: int, timeout: float) -> None:
        self.mail, self.rank, self.others, self.timeout = (
            mail,
            rank,
            [r for r in range(world) if r != rank],
            timeout,
        )
        store: Any = dist.distributed_c10d._get_default_store()
        self.store = store.clone()  # its own connection: a call may block
        self.key = f"dni_fx/{name}/pulse"
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="dni_fx pulse", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """No more signs are given or looked for."""
        self.stopped.set()
        self.thread.join(self.timeout)
        try:
            self.store.add(f"{self.key}/{self.rank}", -(2**40))  # gone for good, and rightly so
        except RuntimeError:
            return

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        try:
            while not self.stopped.wait(min(1.0, self.timeout / 4)):
                self.store.add(f"{self.key}/{self.rank}", 1)
                for rank in self.others:
                    count = self.store.add(f"{self.key}/{rank}", 0)
                    now = time.monotonic()
                    if count < 0 or rank not in seen or seen[rank][0] != count:
                        seen[rank] = (count, now)
                    elif now - seen[rank][1] > self.timeout:
                        self.mail.fail(
                            ParallelError(
                                f"rank {rank} has shown no sign of life for {self.timeout:g} s: "
                                "its process hangs, or was stopped; end it, or set timeout= if "
                                "that is usual"
                            )
                        )
                        return
        except RuntimeError as error:  # the store is gone
            if not self.stopped.is_set():
                self.mail.fail(
                    ParallelError(f"the process group's store cannot be reached: {error}")
                )
