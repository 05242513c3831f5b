"""Two hosts with disks of their own, joined by torchrun on loopback; on one a process is killed.

    python -m tests.ranks.scripts.two_hosts OUT

OUT gets the weights at the end; ``benchmarks/hosts.py`` has longer stories.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dni_fx import distributed

from ...helpers.training import batch
from ..kit import trainer_of, weights

STEPS, SAVED, KILLED = 8, 4, 6


def steps(trainer: Any, until: int) -> Any:
    """From where the trainer is."""
    for step in range(trainer.steps, until):
        x, y = batch(step)
        trainer.step(x, target=y)
    trainer.drain()
    return trainer


def work(out: Path) -> None:
    """A rank; that of the second host is killed once."""
    distributed.start(60)
    host, rank = os.environ["HOST_NAME"], dist.get_rank()
    disk = out / host
    trainer = trainer_of("linear", staleness=0)
    trainer.resume(disk / "checkpoints")
    with (out / f"began-{host}").open("a") as began:
        began.write(f"{trainer.steps}\n")
    if trainer.steps < SAVED:
        steps(trainer, SAVED).save(disk / "checkpoints")
    if host == "b" and not (disk / "killed").exists():
        steps(trainer, KILLED)
        (disk / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    found = weights(steps(trainer, STEPS))
    if rank == 0:
        torch.save(found, out / "weights.pt")
    dist.destroy_process_group()


def main(out: Path) -> int:
    """Both hosts, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    size = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, *size, "-m", __spec__.name]
    started = [
        subprocess.Popen([*command, str(out), "work"], env=os.environ | {"HOST_NAME": name})
        for name in "ab"
    ]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    if sys.argv[2:] == ["work"]:
        work(Path(sys.argv[1]))
    else:
        sys.exit(main(Path(sys.argv[1])))
