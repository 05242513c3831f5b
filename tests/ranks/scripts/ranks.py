"""Cases that every rank of a torchrun goes through; what each finds goes to a file.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.ranks.scripts.ranks OUT CASE...

A case is compared, in rank 0, with training in one process, which the other ranks wait for.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .. import kit
from . import differing, equal, free, reading, refused, saving, whole

ON_TWO = [
    *equal.TWO,
    *free.TWO,
    *whole.TWO,
    *refused.TWO,
    *reading.TWO,
    *saving.TWO,
    *differing.TWO,
]
ON_FOUR = [*equal.FOUR, *free.FOUR, *refused.FOUR]
CASES = {case.__name__: case for case in (*ON_TWO, *ON_FOUR)}
TWO, FOUR = ([case.__name__ for case in cases] for cases in (ON_TWO, ON_FOUR))


def run(names: list[str]) -> dict[str, tuple[str, float]]:
    """Every case in a process group of its own, so that one that fails takes no other along.

    Returns:
        For each, what is wrong with it, and how many seconds it took; also written to ``kit.OUT``.
    """
    torch.set_num_threads(1)
    store, rank, world = next(rendezvous("env://"))
    results = {}
    for name in names:
        began, error = time.perf_counter(), ""
        named = dist.PrefixStore(name, store)
        dist.init_process_group(
            "gloo", store=named, rank=rank, world_size=world, timeout=timedelta(seconds=40)
        )
        try:
            CASES[name]()
            dist.barrier()
        except BaseException:
            error = traceback.format_exc()
        results[name] = (error, time.perf_counter() - began)
        (kit.OUT / f"rank{rank}.json").write_text(json.dumps(results))
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    kit.OUT = Path(sys.argv[1])
    run(sys.argv[2:])
