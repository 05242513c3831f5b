"""Ranks forked from this process, which has imported everything, and the store they meet at.

They end as scripts do, with the interpreter's own end. No torchrun watches them, which would end
the others where one fails.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection

import torch
import torch._dynamo  # which optimisers import: once here, and not in every rank
import torch.distributed as dist

told = -1  # in a rank: where it says that it is ready


class Ranks:
    """Processes of one start; a context, after which none is left.

    Args:
        body: what a rank does, given its number, in a process group.
        world: number of ranks.
        group: whether to make the process group; else the environment says where to meet.

    Attributes:
        pids: of the ranks.
        codes: how each has ended, None until it has.
    """

    def __init__(self, body: Callable[[int], None], world: int = 2, group: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # The store is in no rank, as with torchrun: one that is stopped must not stop it, too.
        self.server = os.fork()
        if self.server == 0:
            os.setpgid(0, 0)
            _store = dist.TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False)
            signal.pause()
        with contextlib.suppress(PermissionError):
            os.setpgid(self.server, self.server)  # whoever is first
        self.ready, ready = os.pipe()
        self.files = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115
        self.codes: list[int | None] = [None] * world
        self.pids: list[int] = []
        for rank in range(world):
            self.pids.append(os.fork())
            if self.pids[-1] == 0:
                global told
                told = ready
                os.setpgid(0, self.server)
                self._run(body, rank, world, group)
        os.close(ready)

    def _run(self, body: Callable[[int], None], rank: int, world: int, group: bool) -> None:
        """A rank, from its beginning to the interpreter's end."""
        os.dup2(self.files[rank].fileno(), 1)
        os.dup2(self.files[rank].fileno(), 2)
        code: int | str | None = 1
        try:
            torch.set_num_threads(1)
            if group:
                store = dist.TCPStore("127.0.0.1", self.port, is_master=False)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            body(rank)
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            traceback.print_exc()
            print(f"ENDED {type(error).__name__}: {error}", flush=True)
        sys.exit(code)

    def __enter__(self) -> Ranks:
        return self

    def wait_ready(self, seconds: float) -> None:
        """Until every rank has written to ``told``."""
        heard = b""
        while len(heard) < len(self.pids) and select.select([self.ready], [], [], seconds)[0]:
            more = os.read(self.ready, 2)
            if not more:
                return
            heard += more

    def wait(self, seconds: float, ranks: Collection[int] | None = None) -> None:
        """Until these ranks, or all, have ended, or the time is up."""
        until = time.monotonic() + seconds
        while not self.ended(ranks) and time.monotonic() < until:
            time.sleep(0.02)

    def ended(self, ranks: Collection[int] | None = None) -> bool:
        """Whether these ranks, or all, have ended."""
        waited = range(len(self.pids)) if ranks is None else ranks
        for rank in waited:
            if self.codes[rank] is None and (found := os.waitpid(self.pids[rank], os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
        return all(self.codes[rank] is not None for rank in waited)

    def outputs(self) -> list[str]:
        """What each rank has printed so far."""
        found = []
        for file in self.files:
            file.seek(0)
            found.append(file.read())
        return found

    def __exit__(self, *_: object) -> None:
        os.close(self.ready)
        for pid, code in [*zip(self.pids, self.codes, strict=True), (self.server, None)]:
            if code is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for file in self.files:
            file.close()

    def orphans(self) -> int:
        """Processes that the ranks have started and left; to be called once no rank is left."""
        found = 0
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if entry.isdigit() and os.getpgid(int(entry)) == self.server:
                    os.kill(int(entry), signal.SIGKILL)
                    found += 1
        return found
