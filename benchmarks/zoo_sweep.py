"""Runs the zoo: each model in processes of its own, several models at a time."""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from zoo_examining import PARTS, Row, examine, train_plainly
from zoo_models import Entry


@dataclass(frozen=True)
class Options:
    """How models are examined.

    Attributes:
        dtype: of parameters and inputs.
        check: run the transform's own self-check too, so that its ladder may choose another tracer.
        timeout: seconds for one process.
        memory: GiB of address space for one process.
    """

    dtype: torch.dtype
    check: bool
    timeout: float
    memory: float


@dataclass
class _Running:
    process: Any
    entry: Entry
    deadline: float
    row: Row
    first: bool  # of the model's two processes


def _work(entry: Entry, options: Options, row: Row, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if row:
        examine(entry, options.dtype, options.check, row, pipe.send)
    else:
        train_plainly(entry, options.dtype, pipe.send)


def sweep(entries: list[Entry], options: Options, workers: int) -> Iterator[Row]:
    """Rows as they are finished; a process that hangs or dies gives the row that it had come to.

    Args:
        entries: what to examine.
        options: how.
        workers: processes at a time.
    """
    queue: list[tuple[Entry, Row]] = [(entry, {}) for entry in reversed(entries)]
    running: dict[Connection, _Running] = {}
    while queue or running:
        while queue and len(running) < workers:
            receiver, job = _started(*queue.pop(), options)
            running[receiver] = job
        ready = wait(list(running), timeout=1.0)
        for pipe, job in list(running.items()):
            ended = ""
            if pipe in ready:
                try:
                    job.row = pipe.recv()
                    continue
                except EOFError:
                    job.process.join()
                    ended = f"the process ended with code {job.process.exitcode}"
            elif time.monotonic() > job.deadline:
                job.process.kill()
                job.process.join()
                ended = f"no result after {options.timeout:.0f} s"
            if ended:
                pipe.close()
                del running[pipe]
                if job.first and "fingerprints" in job.row:
                    queue.append((job.entry, job.row))
                else:
                    yield _finished(job, ended)


def _started(entry: Entry, row: Row, options: Options) -> tuple[Connection, _Running]:
    # children share the imports; nothing has run here, so there are no threads, and no caches
    entry.prepare()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(entry, options, row, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + options.timeout
    return receiver, _Running(process, entry, deadline, row, first=not row)


def _finished(job: _Running, ended: str) -> Row:
    row = {"name": job.entry.name, "group": job.entry.group} | job.row
    row.pop("fingerprints", None)
    part = row.setdefault("status", "build")
    if part not in ("done", "left out") and "reason" not in row:
        row[part if part in PARTS else "reason"] = ended
    return row
