"""What stages that run at once have done and when: stopwatches, the status table, the timeline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..reports.tables import table

COLUMNS = (
    "stage", "rank", "steps", "updates", "missed", "steps/s", "under way", "staleness", "idle",
)  # fmt: skip

RECENT = 10.0


@dataclass
class Stopwatch:
    """What one stage has spent its time on.

    Attributes:
        spans: the newest: what, from when and until when by ``time.perf_counter``, and the step.
    """

    stage: int
    spans: deque[tuple[str, float, float, int]] = field(default_factory=lambda: deque(maxlen=4096))
    seconds: dict[str, float] = field(default_factory=dict)
    began: float | None = None

    @contextmanager
    def spending(self, what: str, step: int) -> Iterator[None]:
        """Measure a region."""
        start = time.perf_counter()
        self.began = start if self.began is None else self.began
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[what] = self.seconds.get(what, 0.0) + end - start
            self.spans.append((what, start, end, step))

    def rate(self) -> float:
        """Batches per second, over the last ``RECENT`` seconds."""
        if not self.spans or self.began is None:
            return 0.0
        now, begins = time.perf_counter(), [s for w, s, _, _ in self.spans if w == "forward"]
        oldest = self.spans[0][1] if len(self.spans) == self.spans.maxlen else self.began
        since = max(now - RECENT, oldest)
        return sum(start >= since for start in begins) / (now - since)


@dataclass(frozen=True)
class Status:
    """How the stages of some processes are doing; prints as a table.

    Attributes:
        rows: for each stage its name, rank, counts, queues and times, as
            ``Process.status_rows`` has them.
    """

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        lines = [COLUMNS, *map(_cells, self.rows)]
        return "\n".join(table(lines, left=range(len(COLUMNS)), ruled=False))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A stage's line of the table."""
    stale, idle = "-", "-"
    if row["staleness"] is not None:
        stale = f"{row['staleness']:.1f} (at most {row['staleness_max']})"
    if row["idle"] is not None:
        idle = f"{row['idle']:.0%}"
    queued = ", ".join(f"{n} to {stage}" for stage, n in row["queued"].items()) or "-"
    counts = [str(row[n]) for n in ("rank", "steps", "updates", "missed")]
    return (row["stage"], *counts, f"{row['rate']:.1f}", queued, stale, idle)


def trace_events(watches: Iterable[Stopwatch], rank: int) -> list[dict[str, Any]]:
    """The spans of a process's stages as events of Chrome's trace format."""
    offset = time.time() - time.perf_counter()  # processes share the system's clock alone
    return [
        {
            "name": what,
            "cat": "dni_fx",
            "ph": "X",
            "ts": (start + offset) * 1e6,
            "dur": (end - start) * 1e6,
            "pid": rank,
            "tid": watch.stage,
            "args": {"batch": step},
        }
        for watch in watches
        for what, start, end, step in watch.spans
    ]
