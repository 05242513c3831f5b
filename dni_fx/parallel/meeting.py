"""Where the processes of one start meet, in a store that outlives them.

What processes before them have written there looks like what the others of today write, and
torchrun's count of restarts does not tell them apart: it is each host's own, and does not count
that a host came or went.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from .mailbox import ParallelError

_NAME = "dni_fx meeting"
_LOOK, _AGAIN = 0.02, 0.2  # seconds between two looks, and until an old name is read again


def meet(store: Any, rank: int, world: int, timeout: float) -> str:
    """A name that these processes have agreed on, and no others before them.

    Rank 0 makes one up, and says who has come to it. Who has read an older one is not among those
    whom rank 0 named then, and reads again.

    Args:
        store: one of ``torch.distributed`` that all of them see.
        rank, world: of this process, and how many there are.
        timeout: seconds to wait for the others.

    Raises:
        ParallelError: a process did not come in time.
    """
    until = time.monotonic() + timeout
    return _call(store, world, until) if rank == 0 else _come(store, rank, until)


def _call(store: Any, world: int, until: float) -> str:
    name, came = uuid.uuid4().hex, [""]
    store.set(_NAME, name)
    for rank in range(1, world):
        if not _is_there(store, f"{name}/{rank}", until - time.monotonic()):
            raise ParallelError(
                f"rank {rank} did not come to distributed.start() in time (timeout=): it has "
                "ended, or cannot reach the others; see its own output"
            )
        came.append(store.get(f"{name}/{rank}").decode())
    store.set(f"{name}/all", json.dumps(came))
    return name


def _come(store: Any, rank: int, until: float) -> str:
    mine = uuid.uuid4().hex
    while (left := until - time.monotonic()) > 0:
        if not _is_there(store, _NAME, left):
            break
        name: str = store.get(_NAME).decode()
        store.set(f"{name}/{rank}", mine)
        if _is_there(store, f"{name}/all", _AGAIN):
            if mine in json.loads(store.get(f"{name}/all")):
                return name
            time.sleep(_AGAIN)
    raise ParallelError(
        f"rank 0 did not call rank {rank} to distributed.start() in time (timeout=): it has ended, "
        "waits for another rank, or cannot be reached; see its own output"
    )


def _is_there(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is there, looked for so long; torch's own waiting warns on the console."""
    until = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True
