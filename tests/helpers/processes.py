"""Processes that a test starts: to their end or to a limit, once for all of pytest's workers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .paths import ROOT

LIMIT = 400.0  # seconds for one start of processes, on a machine that is busy with others


def once(folder: Path, command: list[str], limit: float = LIMIT) -> Path:
    """Run a Python command, unless it was run in this folder already, whoever asks first.

    Args:
        folder: for its output (``output.txt``), how it ended (``ended.json``), and its own files.
        command: arguments of the interpreter.
        limit: seconds after which all that was started is ended.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ended.json").exists():
            start(command, folder, limit)
    return folder


def torchrun(processes: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module on several ranks."""
    return [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", module, *arguments),
    ]


def start(command: list[str], folder: Path, limit: float = LIMIT) -> None:
    """Run processes to their end; when the time is up, end the whole group of them."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
        finally:
            left = alive(process.pid)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    (folder / "ended.json").write_text(json.dumps({"code": process.returncode, "left": len(left)}))


def alive(session: int) -> list[int]:
    """Processes of a session, which all that a command starts belong to, that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(int(entry.name))
    return found


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """What takes longer fails: threads that wait for each other would do so for ever.

    Raises:
        TimeoutError: in the main thread, wherever it is.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s: a deadlock?")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
