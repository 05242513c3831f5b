"""What becomes of the others when a process fails; started without torchrun, which would end them
itself.

    python failures.py OUT CASE...

Each case has two processes of its own, forked from this one, and a time limit. OUT gets, for each,
exit codes and output.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Skips, batch, built, train, trainer_of

LIMIT = 40.0  # seconds after which what is left hangs
TIMEOUT = 3.0
ready = -1


def paced(**options: Any) -> None:
    """Many steps; the parent is told when they are under way."""
    trainer = trainer_of(timeout=TIMEOUT, **options)
    for step in range(3000):
        if step == 30:
            os.write(ready, b"1")
        x, y = batch(step)
        trainer.step(x, target=y)
        time.sleep(0.01)
    trainer.close()


def raising_outside(rank: int, who: int) -> None:
    trainer = trainer_of(timeout=TIMEOUT)
    for step in range(40):
        if rank == who and step == 10:
            raise ValueError("the loader broke")
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.close()


def raising_in_with(rank: int, who: int) -> None:
    with trainer_of(timeout=TIMEOUT) as trainer:
        for step in range(40):
            if rank == who and step == 10:
                raise ValueError("the loader broke")
            x, y = batch(step)
            trainer.step(x, target=y)


def raising_inside(rank: int, who: int) -> None:
    model, calls = built(Skips, torch.float32), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12 and rank == who:
            raise RuntimeError("a module broke")

    model.get_submodule("b" if who == 0 else "d").register_forward_pre_hook(fail)
    train(trainer_of(model=model, timeout=TIMEOUT), 40).close()


def not_finite(rank: int, who: int) -> None:
    trainer = trainer_of(timeout=TIMEOUT)
    for step in range(40):
        x, y = batch(step)
        trainer.step(x * float("nan") if step == 10 and rank == who else x, target=y)
    trainer.close()


def fewer_steps(rank: int, who: int) -> None:
    train(trainer_of(timeout=TIMEOUT), 20 if rank == who else 30).close()


CASES: dict[str, tuple[Callable[[int, int], None], signal.Signals | None]] = {
    "raising_outside": (raising_outside, None),
    "raising_in_with": (raising_in_with, None),
    "raising_inside": (raising_inside, None),
    "not_finite": (not_finite, None),
    "fewer_steps": (fewer_steps, None),
    "killed": (lambda rank, who: paced(), signal.SIGKILL),
    "killed_sharing": (
        lambda rank, who: paced(placement=[0, [0, 1], 1, 1], staleness=0),
        signal.SIGKILL,
    ),
    "stopped": (lambda rank, who: paced(), signal.SIGSTOP),
    "stopped_free": (lambda rank, who: paced(policy="drop_oldest", inputs="mlp"), signal.SIGSTOP),
    "stopped_sharing": (
        lambda rank, who: paced(placement=[0, [0, 1], 1, 1], staleness=0),
        signal.SIGSTOP,
    ),
}


def child(name: str, rank: int, who: int, port: int, output: int) -> None:
    """A rank. It ends as a script does, with the interpreter's own end."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        CASES[name][0](rank, who)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        print(f"ENDED {type(error).__name__}: {error}", flush=True)
    sys.exit(code)


def run(name: str, who: int) -> dict[str, Any]:
    """Two ranks, one of which fails: exit codes (None: it hung, or was stopped) and outputs."""
    global ready
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = (
        os.fork()
    )  # the store is in no rank, as with torchrun: one that is stopped must not stop it, too
    if server == 0:
        _store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        signal.pause()
    told, ready = os.pipe()
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  (closed below)
    ranks: list[int] = []
    for rank, file in enumerate(files):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            child(name, rank, who, port, file.fileno())
    os.close(ready)
    how = CASES[name][1]
    if how is not None:
        heard = b""
        while (
            len(heard) < 2
            and select.select([told], [], [], LIMIT)[0]
            and (more := os.read(told, 2))
        ):
            heard += more
        os.kill(ranks[who], how)
    os.close(told)
    began = time.monotonic()
    codes: list[int | None] = [None, None]
    waited = [r for r in range(2) if how != signal.SIGSTOP or r != who]
    while any(codes[r] is None for r in waited) and time.monotonic() - began < LIMIT:
        for rank in waited:
            if codes[rank] is None and (found := os.waitpid(ranks[rank], os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    for pid, code in [*zip(ranks, codes, strict=True), (server, None)]:
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    return {"codes": codes, "outputs": outputs}


if __name__ == "__main__":
    results = {}
    for each in sys.argv[2:]:
        case, number = each.rsplit("-", 1)
        results[each] = run(case, int(number))
        Path(sys.argv[1], "failures.json").write_text(json.dumps(results))
