"""Starts of two processes that end in every way a script can: none may abort, hang or leave any.

    python benchmarks/exits.py [--four 200] [--short 500] [--jobs 2] [--minutes 60]

``four``: the cases of the tests after which a start in ten once aborted, beside one busy core.
``short``: one trainer or a few, closed or not, that end by return, error or ``sys.exit``. The
control, a thread that waits in torch when the interpreter ends, must abort each time. Ranks are
forked from this process; they end as scripts do. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.ranks.scripts import endings

CONTROLS = 5
HEAD = ("ending", "starts", "aborts", "wrong codes", "hung", "orphans", "seconds")


@dataclass
class Row:
    """What became of the starts of one kind."""

    name: str
    starts: int = 0
    aborts: int = 0
    wrong: int = 0
    hung: int = 0
    orphans: int = 0
    seconds: float = 0.0
    shown: list[str] = field(default_factory=list)  # of what went wrong

    def add(self, start: endings.Start) -> None:
        """Count a start that is over."""
        codes, outputs, orphans = start.result()
        aborted = any(code == -signal.SIGABRT for code in codes)
        aborted |= any("terminate called" in output for output in outputs)
        hung = None in codes
        wrong = tuple(codes) != endings.CASES[endings.BY_NAME[self.name]]
        self.starts += 1
        self.aborts += aborted
        self.hung += hung
        self.wrong += wrong and not aborted and not hung
        self.orphans += orphans
        self.seconds += time.monotonic() - start.began
        if (wrong or orphans) and len(self.shown) < 3:
            self.shown.append(f"{self.name}: {codes}\n" + "\n".join(o[-2000:] for o in outputs))

    @property
    def is_right(self) -> bool:
        """Nothing went wrong; or, for the control, what must."""
        aborts = self.starts if self.name == "control" else 0
        return (self.aborts, self.wrong, self.hung, self.orphans) == (aborts, 0, 0, 0)

    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        mean = self.seconds / max(1, self.starts)
        counts = (self.starts, self.aborts, self.wrong, self.hung, self.orphans)
        return (self.name, *map(str, counts), f"{mean:.1f}")


def busy() -> int:
    """A process that keeps one core busy, for as long as this one lives."""
    parent, pid = os.getpid(), os.fork()
    while pid == 0 and os.getppid() == parent:
        pass
    if pid == 0:
        os._exit(0)
    return pid


def run(names: list[str], jobs: int, rows: dict[str, Row], folder: Path, until: float) -> None:
    """All starts, some at a time.

    Args:
        names: their kinds, in order.
        jobs: how many at a time.
        rows: where they are counted.
        folder: for what they write.
        until: the moment, of ``time.monotonic``, after which none is started.
    """
    left, running = list(enumerate(names)), list[endings.Start]()
    while left or running:
        if time.monotonic() > until:
            left.clear()
        while left and len(running) < jobs:
            number, name = left.pop(0)
            running.append(endings.Start(name, folder / str(number)))
        for start in [s for s in running if s.is_over()]:
            running.remove(start)
            rows[start.name].add(start)
            done = sum(row.starts for row in rows.values())
            if done % 25 == 0:
                bad = [row.name for row in rows.values() if not row.is_right]
                print(f"{done} starts, wrong so far: {', '.join(bad) or 'none'}", flush=True)
        time.sleep(0.02)


def main() -> int:
    """Start, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--four", type=int, default=200, help="starts under load (default: 200)")
    parser.add_argument("--short", type=int, default=500, help="other starts (default: 500)")
    parser.add_argument("--jobs", type=int, default=2, help="starts at a time (default: 2)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then start no more, half for each kind"
    )
    args = parser.parse_args()
    if min(args.four, args.short) < 0 or args.jobs < 1:
        parser.error("--four and --short must be at least 0, --jobs at least 1")
    rows = {name: Row(name) for name in ("four_cases", *endings.SHORT, "control")}
    folder = Path(tempfile.mkdtemp())
    load = busy()
    until = time.monotonic() + 30 * args.minutes
    run(["four_cases"] * args.four, args.jobs, rows, folder, until)
    os.kill(load, signal.SIGKILL)  # in no finally: the ranks come by here when they end
    os.waitpid(load, 0)
    short = list(itertools.islice(itertools.cycle(endings.SHORT), args.short))
    run(["control"] * CONTROLS, args.jobs, rows, folder, math.inf)
    run(short, args.jobs, rows, folder, time.monotonic() + 30 * args.minutes)
    shutil.rmtree(folder)
    lines = [HEAD, *(row.cells() for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    for row in rows.values():
        print(*(row.shown if row.name != "control" else ()), sep="\n", end="")
    wrong = [row.name for row in rows.values() if not row.is_right]
    print(f"wrong: {', '.join(wrong)}" if wrong else "all ended as they should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
