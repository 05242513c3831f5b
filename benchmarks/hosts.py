"""Two hosts on one machine, for ``soak.py``: process groups of their own, joined by ``torchrun
--nnodes`` on loopback, of which one comes late, goes, comes back, or is stopped.

torch 2.13 shares torchrun's store with the processes, and tells a host that comes later nothing of
it: where hosts come, ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE`` must be 1 on all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOAK, NETNS = (Path(__file__).with_name(name) for name in ("soak.py", "netns.py"))


class Host:
    """A torchrun of one process, and its disk.

    Args:
        folder: of the run; what the host prints goes to ``log-NAME`` in it.
        name: of the host, and of its disk.
        port: where the hosts meet.
        options: of the work.
    """

    def __init__(self, folder: Path, name: str, port: int, options: dict[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.log = (folder / f"log-{name}").open("a")
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        conf = ["--rdzv-id", "soak", "--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1"]
        size = ["--nnodes", options["nodes"], "--nproc-per-node", "1", "--max-restarts", "30"]
        work = ["--work", json.dumps({**options, "folder": str(folder)})]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *size, *meet, *conf, str(SOAK), *work],
            stdout=self.log,
            stderr=self.log,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "SOAK_DISK": name,
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if options["shares"] else "1",
            },
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """Processes that torchrun has started here."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == self.process.pid and fields[0] != "Z":
                    found.append(int(path.parent.name))
        return found

    def go(self) -> None:
        """The host is gone, with everything on it but its disk."""
        for pid in [self.process.pid, *self.workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def lose(self) -> None:
        """Its process is gone, and torchrun starts another."""
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, seconds: float) -> None:
        """Its process stands still for a while."""
        pids = self.workers()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds if number == signal.SIGSTOP else 0)


def wait_for(what: str, ready: Callable[[], bool], hosts: list[Host], seconds: float = 240) -> None:
    """Until something is so."""
    until = time.monotonic() + seconds
    while not ready():
        over = [host for host in hosts if host.process.poll() is not None]
        if over or time.monotonic() > until:
            logs = "".join(p.read_text()[-3000:] for p in hosts[0].folder.glob("log-*"))
            ended = f"host {over[0].name} ended" if over else f"none within {seconds:g} s"
            raise SystemExit(f"{what}: {ended}\n{logs}")
        time.sleep(0.02)


def newest(folder: Path) -> int:
    """The newest step that any disk has published."""
    steps = [int(p.name[5:]) for p in folder.glob("disk*/checkpoints/step-*")]
    return max(steps, default=0)


def worlds(folder: Path) -> list[int]:
    """With how many ranks each start was made so far."""
    path = folder / "worlds"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def run(folder: Path, options: dict[str, Any], story: list[str]) -> tuple[str, list[int]]:
    """A run in which a host, b, does what the story says, each time after a new checkpoint of as
    many ranks as there should be; slow until the story is over.

    Returns:
        The digest of the final weights, and with how many ranks each start was made.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if story:
        (folder / "slowly").touch()
    hosts = [Host(folder, "a", port, options)]
    try:
        for event in story:
            began, size = len(worlds(folder)), 1 if event == "goes" else 2
            if event == "joins":
                wait_for("the first host", lambda: bool(worlds(folder)), hosts)
            if event in ("joins", "is there", "comes"):
                hosts.append(Host(folder, "b", port, options))
            elif event == "loses":
                hosts[1].lose()
            elif event == "stops":
                hosts[1].stop(2 * options["timeout"])
            else:
                hosts.pop().go()
                if event == "restarts":
                    hosts.append(Host(folder, "b", port, options))

            def is_begun(began: int = began, size: int = size) -> bool:
                known = worlds(folder)
                return len(known) > began and known[-1] == size

            wait_for(f"a start after b {event}", is_begun, hosts)
            before = newest(folder)

            def is_saved(before: int = before) -> bool:
                return newest(folder) > before

            wait_for(f"a checkpoint after b {event}", is_saved, hosts)
        (folder / "slowly").unlink(missing_ok=True)
        wait_for("the end", lambda: (folder / "result.json").exists(), [], 600)
        for host in hosts:
            host.process.wait(60)
    finally:
        for host in hosts:
            if host.process.poll() is None:
                host.go()
    digest = json.loads((folder / "result.json").read_text())["digest"]
    return digest, worlds(folder)


STORIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "loses its process, three times, with a disk of its own": (
        {"apart": True, "shares": True, "nodes": "2"},
        ["is there", "loses", "loses", "loses"],
    ),
    "comes late, goes, and comes back, with a common folder": (
        {"apart": False, "shares": False, "nodes": "1:2"},
        ["joins", "goes", "comes"],
    ),
    "is ended and started again, three times, with a disk of its own": (
        {"apart": True, "shares": False, "nodes": "1:2"},
        ["joins", "restarts", "restarts", "restarts"],
    ),
    "stands still for longer than the timeout, twice, with a disk of its own": (
        {"apart": True, "shares": False, "nodes": "1:2"},
        ["joins", "stops", "stops"],
    ),
}


def hosts(folder: Path, quick: bool, count: int) -> list[str]:
    """Each story against a run in one process."""
    options = {"steps": 1000 if quick else 2000, "every": 10, "staleness": 2, "timeout": 5.0}
    calm, _ = run(folder / "calm", {**options, "apart": False, "shares": True, "nodes": "1"}, [])
    lines = []
    for name, (own, story) in STORIES.items():
        digest, found = run(folder / name.split(",")[0], {**options, **own}, story)
        same = "bit-equal to" if digest == calm else "DIFFER from"
        sizes = " ".join(map(str, found))
        lines.append(
            f"the second of two hosts {name}: {len(found)} starts, with as many ranks: {sizes}; "
            f"final weights {same} those of one process"
        )
    return lines


def link(folder: Path, quick: bool, count: int) -> list[str]:
    """Two ranks far from each other."""
    options = {"steps": 60 if quick else 300, "every": 20, "staleness": 2, "timeout": 30.0}
    calm, _ = run(folder / "calm", {**options, "apart": False, "shares": True, "nodes": "1"}, [])
    far, network = folder / "far", ["--delay", "50ms", "--rate", "100mbit", "--"]
    far.mkdir()
    work = ["--work", json.dumps({**options, "apart": True, "folder": str(far)})]
    done = subprocess.run(
        [sys.executable, str(NETNS), *network, sys.executable, str(SOAK), *work],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    if done.stdout.startswith("skipped"):
        return [done.stdout.strip()]
    found = json.loads((far / "result.json").read_text())
    same = "bit-equal to" if found["digest"] == calm else "DIFFER from"
    return [
        done.stdout.splitlines()[0],
        f"{options['steps']} steps and {options['steps'] // options['every']} saves in "
        f"{found['ranks'][0]['seconds']:.0f} s; final weights {same} those of one process",
    ]
