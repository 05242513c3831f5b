"""The shapes of a drawing, and the text of its lines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

# colours that people with any kind of colour vision tell apart (Okabe and Ito 2008), without
# yellow: too pale for lines
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666")
PLAIN = "#8a8a8a"
BOX, PILL, CHIP = (220.0, 46.0), (180.0, 24.0), (176.0, 48.0)

Point = tuple[float, float]


@dataclass(frozen=True)
class Item:
    """What stands in a panel: a box, or a pill for an input, an output or something outside."""

    key: int
    title: str
    kind: str = ""
    shape: str = ""
    share: float | None = None
    tip: str = ""
    nodes: int = 0
    anchor: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        return BOX if self.nodes else PILL


@dataclass(frozen=True)
class Panel:
    """One stage: its items and the pairs of them of which the second uses the first."""

    stage: int
    head: tuple[str, ...]
    items: tuple[Item, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Link:
    """Values that cross: from items of one stage to items of others. No label: they carry no
    gradient.
    """

    producer: int
    sources: tuple[int, ...]
    targets: dict[int, tuple[int, ...]]
    label: tuple[str, ...] = ()
    tip: str = ""

    @property
    def name(self) -> str:
        """The first line of its label."""
        return self.label[0] if self.label else ""


@dataclass
class Picture:
    """Shapes, ready to be written down."""

    width: float = 0.0
    height: float = 0.0
    panels: list[dict[str, object]] = field(default_factory=list)
    threads: list[dict[str, object]] = field(default_factory=list)
    links: list[dict[str, object]] = field(default_factory=list)
    items: list[dict[str, object]] = field(default_factory=list)


def colour_of(stage: int) -> str:
    """The colour of a stage; they repeat after some, so a stage's name stands beside it
    everywhere.
    """
    return COLOURS[stage % len(COLOURS)]


def curve(x0: float, y0: float, x1: float, y1: float, dx: float, dy: float) -> str:
    """A line that leaves downwards and arrives downwards; all of it moved by ``dx`` and ``dy``."""
    x0, y0, x1, y1, middle = x0 + dx, y0 + dy, x1 + dx, y1 + dy, (y0 + y1) / 2 + dy
    if abs(x0 - x1) < 0.05:
        return f"M{x0:.1f} {y0:.1f}V{y1:.1f}"
    return f"M{x0:.1f} {y0:.1f}C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"


def arrow_head(x: float, y: float, size: float, down: bool) -> str:
    """An arrow's head, pointing down or to the right."""
    if down:
        return f"M{x:.1f} {y:.1f}l{-size * 0.8:.1f} {-size * 1.4:.1f}h{size * 1.6:.1f}z"
    return f"M{x:.1f} {y:.1f}l{-size * 1.4:.1f} {-size * 0.8:.1f}v{size * 1.6:.1f}z"


def rounded_line(points: Sequence[Point]) -> str:
    """A line of horizontal and vertical pieces with round corners."""
    kept = [p for p, _ in itertools.groupby(points)]
    path = f"M{kept[0][0]:.1f} {kept[0][1]:.1f}"
    for before, corner, after in zip(kept, kept[1:], kept[2:], strict=False):
        (ax, ay), (bx, by) = (_towards(corner, p, 6.0) for p in (before, after))
        path += f"L{ax:.1f} {ay:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {bx:.1f} {by:.1f}"
    return path + f"L{kept[-1][0]:.1f} {kept[-1][1]:.1f}"


def _towards(start: Point, end: Point, most: float) -> Point:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = max(abs(dx), abs(dy), 1e-9)
    step = min(most, length / 2) / length
    return start[0] + dx * step, start[1] + dy * step
