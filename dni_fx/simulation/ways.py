"""The ways to train on one device as frozen rows, and which of them is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DecouplingError
from ..reports.sizes import show_size
from ..reports.tables import table

MARGIN = 1.1  # what a cap leaves for what is not counted
ENOUGH = 1.1  # times the fastest way: as good, where the sources are less late


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: as the table shows it.
        memory: peak bytes of tensors.
        seconds: of a step, optimisers included.
        moved: bytes that a batch has read from the store and written to it.
        exact: whether the gradients are the true ones.
        resident: stages in memory at a time; None for all.
        sweep: batches of a visit.
        stages: in how many the model is cut.
        visits: whether it is one of ``Trainer(update="at_once", resident=, sweep=)``.
    """

    name: str
    memory: int
    seconds: float
    moved: int = 0
    exact: bool = False
    resident: int | None = None
    sweep: int = 1
    stages: int = 1
    visits: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a step takes in memory and time; prints as a table and the best that fits.

    Attributes:
        ways: a row for each.
        memory_cap: bytes to keep to; None for none.
        moments: numbers that an optimiser keeps for each parameter.
        store_bandwidth: bytes a second from the store and to it.
        chosen: the way that is taken; None where nobody chose.
    """

    ways: tuple[Way, ...]
    memory_cap: float | None
    moments: float
    store_bandwidth: float
    chosen: Way | None = None

    def __getitem__(self, name: str) -> Way:
        rows = {w.name: w for w in self.ways}
        if name not in rows:
            raise KeyError(f"no way {name!r}; there are {', '.join(rows)}")
        return rows[name]

    def fits(self, way: Way) -> bool:
        """Whether the cap is kept, with a tenth for what is not counted."""
        return self.memory_cap is None or way.memory * MARGIN <= self.memory_cap

    @property
    def best(self) -> Way | None:
        """The fastest that fits; of visits the one with the fewest batches that is nearly as fast,
        since sources learn later by so many. None where nothing fits.
        """
        return best_of([w for w in self.ways if self.fits(w)])

    @property
    def smallest(self) -> Way:
        """The one that needs the least memory."""
        return min(self.ways, key=lambda w: (w.memory, w.seconds))

    @property
    def sentence(self) -> str:
        """The best that fits."""
        best, exact = self.best, best_of([w for w in self.ways if w.exact and self.fits(w)])
        if self.memory_cap is None:
            least = self.smallest
            return f"The least memory: {least.name}, {show_size(least.memory)}."
        if best is None:
            least = self.smallest
            return (
                f"Nothing fits {show_size(self.memory_cap)} (a tenth of it is left for what is not "
                f"counted): the least is {show_size(least.memory)}, {least.name}; more stages, a "
                "smaller batch or an optimiser that keeps less would need less."
            )
        text = f"Best within {show_size(self.memory_cap)}: {best.name}, {show_size(best.memory)}"
        if not best.exact and exact is not None:
            text += f"; with true gradients {exact.name}, {show_size(exact.memory)}"
        return f"{text}."

    def __str__(self) -> str:
        first = self.ways[0].seconds
        rows = [("one device", "MB", "x time", "MB moved", "")]
        for way in self.ways:
            note = "" if self.memory_cap is None else "fits" if self.fits(way) else "-"
            note = "taken" if way == self.chosen else note
            moved = f"{way.moved / 1e6:,.1f}" if way.moved else "-"
            rows.append(
                (way.name, f"{way.memory / 1e6:,.1f}", f"{way.seconds / first:.2f}", moved, note)
            )
        told = (
            f"{self.moments:g} moments; the store moves {show_size(self.store_bandwidth)} a "
            "second; bytes of tensors, by the plan's costs."
        )
        return "\n".join([*table(rows), "", self.sentence, told])


def best_of(ways: Sequence[Way]) -> Way | None:
    """The fastest; of visits nearly as fast as that one the one with the shortest sweep."""
    if not ways:
        return None
    fastest = min(ways, key=lambda w: (w.seconds, w.memory))
    if fastest.sweep == 1:
        return fastest
    near = [w for w in ways if w.seconds <= ENOUGH * fastest.seconds]
    return min(near, key=lambda w: (w.sweep, w.seconds))


def choose(found: Forecast, resident: int | None, sweep: int) -> Forecast:
    """Take the best visits that fit.

    Args:
        found: what there is.
        resident, sweep: what the user wants; None and 1 leave it open.

    Raises:
        DecouplingError: none fits.
    """
    ways = [w for w in found.ways if w.visits and sweep in (1, w.sweep)]
    if resident is not None:
        all_there = resident >= max((w.stages for w in ways), default=1)
        ways = [w for w in ways if w.resident == (None if all_there else resident)]
    best = best_of([w for w in ways if found.fits(w)])
    if best is None:
        least = min(ways, key=lambda w: w.memory, default=found.smallest)
        enough = show_size(MARGIN * least.memory, up=True)
        raise DecouplingError(
            f"memory_cap= of {show_size(found.memory_cap or 0)} cannot be kept: the least that "
            f"these stages need is {show_size(least.memory)} ({least.name}), and a tenth is left "
            f"for what is not counted; a cap of {enough} would do, or more stages, a smaller "
            "batch, or an optimiser that keeps less"
        )
    return dataclasses.replace(found, chosen=best)
