"""From panels of items and the links between them to a picture: stages side by side, cuts between
and above them.

Stages stand in columns, each to the right of those that it needs. A link leaves its stage to the
right, through its label; one that skips columns runs over the top.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import networkx as nx

from .layout import LAYER_GAP, lay_out, spread
from .shapes import (
    BOX,
    CHIP,
    PLAIN,
    Link,
    Panel,
    Picture,
    Point,
    arrow_head,
    colour_of,
    curve,
    rounded_line,
)

_MARGIN, _HEAD, _FOOT, _ROW_GAP, _TRACK = 16.0, 108.0, 28.0, 26.0, 22.0


def route(panels: Sequence[Panel], links: Sequence[Link]) -> Picture:
    """Place panels, items, labels and lines."""
    return _Routing(panels, links).picture


class _Routing:
    """Places of everything; ``k`` numbers links, ``c`` columns, and keys are those of items."""

    def __init__(self, panels: Sequence[Panel], links: Sequence[Link]) -> None:
        self.panels, self.links = {p.stage: p for p in panels}, links
        self.layouts = {p.stage: lay_out({i.key: i.size for i in p.items}, p.edges) for p in panels}
        self.column = _columns(self.panels, links)
        self.columns = max(self.column.values()) + 1
        self.leaving = [
            [k for k, ln in enumerate(links) if self.column[ln.producer] == c]
            for c in range(self.columns)
        ]
        self.tracks = {k: i for i, k in enumerate(k for k in range(len(links)) if self._skips(k))}
        self.top = len(self.tracks) * _TRACK + (8 if self.tracks else 0)
        self.ports = self._find_ports()
        self.slots: dict[tuple[int, int], dict[int, int]] = {}  # of links, by stage and layer
        self.left: list[float] = []  # of columns, as are right and lanes_from
        self.right: list[float] = []
        self.lanes_from: list[float] = []  # where the gutter's lanes begin
        self.y: dict[int, float] = {}  # tops of panels
        self.label_y: dict[int, float] = {}  # middles of labels, by link
        self.turn: dict[int, float] = {}  # where links turn towards their labels
        self.lane: dict[tuple[int, int], float] = {}  # by column and link
        self.picture = Picture()
        self._place_panels()
        self._place_labels()
        self._place_lanes()
        for stage in self.panels:
            self._draw_panel(stage)
        for k in range(len(links)):
            self._draw_link(k)

    def _skips(self, k: int) -> list[int]:
        """Stages that a link reaches over other columns."""
        link = self.links[k]
        return [s for s in link.targets if self.column[s] > self.column[link.producer] + 1]

    def _find_ports(self) -> dict[tuple[int, int, bool], float]:
        """Where links leave (True) or enter an item: offsets from its middle, by link and item."""
        ports: dict[tuple[int, bool], list[int]] = {}
        for k, link in enumerate(self.links):
            for key in link.sources:
                ports.setdefault((key, True), []).append(k)
            for key in itertools.chain(*link.targets.values()):
                ports.setdefault((key, False), []).append(k)
        return {
            (k, key, out): (i - (len(used) - 1) / 2) * min(11.0, 34.0 / len(used))
            for (key, out), used in ports.items()
            for i, k in enumerate(used)
        }

    def _place_panels(self) -> None:
        """Columns are as wide as their widest stage; gutters hold turns, labels and lanes."""
        x = 8.0
        for c in range(self.columns):
            stages = [s for s in self.panels if self.column[s] == c]
            width = max([BOX[0], *(self.layouts[s].width for s in stages)]) + 2 * _MARGIN
            self.left.append(x)
            self.right.append(x + width)
            y = self.top
            for s in stages:
                self.y[s] = y
                y += self._panel_height(s) + _ROW_GAP
            self.picture.height = max(self.picture.height, y - _ROW_GAP + 8)
            labelled = any(self.links[k].label for k in self.leaving[c])
            x += width + 12 + 7 * len(self.leaving[c]) + (CHIP[0] if labelled else 0)
            self.lanes_from.append(x)
            through = sum(
                any(self.column[s] == c + 1 for s in self._skips(k)) for k in range(len(self.links))
            )
            lanes = len(self.leaving[c]) + through
            x += 10 * lanes + (18 if lanes else 0)
        self.picture.width = max(self.right[-1] + 8, x)

    def _panel_height(self, stage: int) -> float:
        return _HEAD + self.layouts[stage].height + _FOOT

    def _at(self, stage: int, key: int) -> tuple[float, float, float, float]:
        """Centre and half size of an item."""
        layout, c = self.layouts[stage], self.column[stage]
        x, y = layout.centres[key]
        width, height = next(i.size for i in self.panels[stage].items if i.key == key)
        inside = (self.left[c] + self.right[c] - layout.width) / 2
        return inside + x, self.y[stage] + _HEAD + y, width / 2, height / 2

    def _gap(self, k: int, stage: int, layer: int) -> float:
        """Height at which a link runs above a layer: each has one of its own."""
        layout = self.layouts[stage]
        slots = self.slots.setdefault((stage, layer), {})
        slot = slots.setdefault(k, len(slots))
        shift = (0, 7, -7, 14, -12)[slot % 5]
        top = layout.tops[layer] if layer < len(layout.tops) else layout.bottoms[-1] + LAYER_GAP
        return self.y[stage] + _HEAD + top - LAYER_GAP / 2 + shift

    def _exit(self, k: int, key: int) -> list[Point]:
        """From an item to the right border of its column, beside other boxes rather than through
        them.
        """
        stage = self.links[k].producer
        layout, (x, y, w, h) = self.layouts[stage], self._at(stage, key)
        right, shift = self.right[self.column[stage]], self.ports[k, key, True]
        if key in layout.rightmost:
            return [(x + w, y + shift), (right, y + shift)]
        below = self._gap(k, stage, layout.layer[key] + 1)
        return [(x + w - 20 + shift, y + h), (x + w - 20 + shift, below), (right, below)]

    def _entry(self, k: int, stage: int, key: int) -> list[Point]:
        """The end of a line: at an item's left side, or on its top where others stand left of
        it.
        """
        layout, (x, y, w, h) = self.layouts[stage], self._at(stage, key)
        shift = self.ports[k, key, False]
        if key in layout.leftmost:
            return [(x - w, y + shift)]
        above = self._gap(k, stage, layout.layer[key])
        return [(x - w + 20 + shift, above), (x - w + 20 + shift, y - h)]

    def _place_labels(self) -> None:
        """Each label beside what it leaves, below the label before it."""
        for c, leaving in enumerate(self.leaving):
            wish = {
                k: _mean([self._exit(k, key)[-1][1] for key in self.links[k].sources])
                for k in leaving
            }
            leaving.sort(key=lambda k: (wish[k], k))
            heights = [CHIP[1] if self.links[k].label else 8.0 for k in leaving]
            gaps = [(a + b) / 2 + 8 for a, b in itertools.pairwise(heights)]
            places = spread([wish[k] for k in leaving], gaps)
            lowest = self.top
            for k, y, height in zip(leaving, places, heights, strict=True):
                self.label_y[k] = y = max(y, lowest + height / 2)
                lowest = y + height / 2 + 8
            # of those that fall the upper ones turn later, so as not to cross
            falling = [k for k in leaving if self.label_y[k] > wish[k]]
            turns = [*(k for k in leaving if k not in falling), *reversed(falling)]
            self.turn.update((k, self.right[c] + 8 + 7 * i) for i, k in enumerate(turns))
            self.picture.height = max(self.picture.height, lowest + 8)

    def _place_lanes(self) -> None:
        """Left to right in a gutter: links that leave, upper ones first; then those from above,
        deepest first.
        """
        for c, leaving in enumerate(self.leaving):
            coming = []
            for k, link in enumerate(self.links):
                here = [s for s in self._skips(k) if self.column[s] == c + 1]
                ends = [self._entry(k, s, key)[0][1] for s in here for key in link.targets[s]]
                if here:
                    coming.append((-max(ends, default=0.0), k))
            for i, k in enumerate([*leaving, *(k for _, k in sorted(coming))]):
                self.lane[c, k] = self.lanes_from[c] + 6 + 10 * i

    def _draw_panel(self, stage: int) -> None:
        panel, layout, c = self.panels[stage], self.layouts[stage], self.column[stage]
        x, y = self.left[c], self.y[stage]
        inside = ((self.left[c] + self.right[c] - layout.width) / 2, y + _HEAD)
        self.picture.panels.append(
            {
                "x": x,
                "y": y,
                "w": self.right[c] - x,
                "h": self._panel_height(stage),
                "stage": stage,
                "head": panel.head,
            }
        )
        titles = {i.key: i.title for i in panel.items}
        for key, (pieces, ends) in layout.lines.items():
            path = "".join(curve(*p, *inside) for p in pieces)
            heads = "".join(arrow_head(x + inside[0], y + inside[1], 4, down=True) for x, y in ends)
            self.picture.threads.append({"d": path, "heads": heads, "tip": f"from {titles[key]}"})
        for item in panel.items:
            cx, cy, w, h = self._at(stage, item.key)
            self.picture.items.append(
                {
                    "x": cx - w,
                    "y": cy - h,
                    "w": 2 * w,
                    "h": 2 * h,
                    "item": item,
                    "colour": colour_of(stage),
                }
            )

    def _draw_link(self, k: int) -> None:
        link, c, y = self.links[k], self.column[self.links[k].producer], self.label_y[k]
        lane, turn = self.lane[c, k], self.turn[k]
        lines = [
            [*self._exit(k, key), (turn, self._exit(k, key)[-1][1]), (turn, y)]
            for key in link.sources
        ]
        lines.append([(turn, y), (lane, y)])
        heads = ""
        notes: list[Point] = []
        for stage, keys in link.targets.items():
            over = self.column[stage] > c + 1
            start = [(lane, y)]
            if over:
                track = self.top - 14 - self.tracks[k] * _TRACK
                down = self.lane[self.column[stage] - 1, k]
                start += [(lane, track), (down, track)]
                notes = [(self.left[c + 1] + 4, track - 4)]
            border = [(self.left[self.column[stage]], y)]
            for end in [self._entry(k, stage, key) for key in keys] or [border]:
                lines.append([*start, (start[-1][0], end[0][1]), *end])
                heads += arrow_head(*end[-1], 7 if link.label else 4, down=len(end) > 1)
        self.picture.links.append(
            {
                "d": "".join(rounded_line(line) for line in lines),
                "heads": heads,
                "link": link,
                "notes": notes,
                "colour": colour_of(link.producer) if link.label else PLAIN,
                "x": self.lanes_from[c] - CHIP[0],
                "y": y - CHIP[1] / 2,
            }
        )


def _columns(stages: Iterable[int], links: Sequence[Link]) -> dict[int, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(stages)
    graph.add_edges_from((link.producer, s) for link in links for s in link.targets)
    generations = enumerate(nx.topological_generations(graph))
    return {stage: depth for depth, column in generations for stage in sorted(column)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
