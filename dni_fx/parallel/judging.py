"""A model that is spread over processes, judged on held-out batches: the same numbers in each."""

from __future__ import annotations

import zlib
from typing import Any

from ..runtime.evaluating import Means, Sums
from .agreement import digest_of
from .process import Process


class Judging:
    """One evaluation, in every process.

    Args:
        process: this process's side.
        means: the metrics, of the batches' rows that come out of the last stage here.
        steps: number of steps made.
    """

    def __init__(self, process: Process, means: Means, steps: int) -> None:
        self.process, self.means, self.steps = process, means, steps

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> None:
        """One batch.

        Raises:
            ParallelError: another process has another batch, or none.
        """
        decoupled, places = self.process.decoupled, self.process.places
        values, last = decoupled.bind(*args, **kwargs), len(decoupled.stages) - 1
        seen = zlib.crc32(repr(digest_of(values, target)).encode())
        output = self.process.forward(
            self.steps, values, f"evaluate() with a batch of check sum {seen:08x}"
        )
        if last in self.process.workers:
            self.means.add(output, places.rows_of(last, values, target)[1])

    def gather(self) -> list[Sums]:
        """What each process has found, in each process.

        Raises:
            ParallelError: another process has more batches.
        """
        self.process.connect(self.steps)
        self.process.meet("evaluate() without any more batch", self.steps)
        return self.process.peers.gather(self.means.sums(), "evaluate()")
