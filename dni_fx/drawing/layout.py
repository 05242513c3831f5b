"""Coordinates for the boxes of one stage: layers from top to bottom, few crossings, straight
chains.

The method of Sugiyama, Tagawa and Toda 1981: layers by longest path, order by barycentres,
coordinates by least squares under the order. A value that is used several layers below runs in a
lane of its own beside the boxes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

Point = tuple[float, float]
Vertex = int | tuple[int, int]  # an item, or the lane of an item in a layer
Piece = tuple[float, float, float, float]
Neighbours = Mapping[Vertex, Sequence[Vertex]]
LAYER_GAP = 36.0
BOX_GAP = 18.0
LANE_WIDTH = 10.0
_ORDER_SWEEPS = 6
_PLACE_SWEEPS = 9  # odd: the last one sets boxes below what they use
_BOX_WEIGHT = 1e3  # lanes give way


@dataclass(frozen=True)
class Layout:
    """Where the items of one stage are.

    Attributes:
        centres: centre of every item.
        width: of everything.
        height: of everything.
        tops: top of every layer.
        bottoms: bottom of every layer.
        layer: of every item.
        leftmost: items that nothing but lanes is left of.
        rightmost: items that nothing but lanes is right of.
        lines: for every item that others use: pieces ``(x0, y0, x1, y1)`` of its line, and the tops
            of its users.
    """

    centres: dict[int, tuple[float, float]]
    width: float
    height: float
    tops: list[float]
    bottoms: list[float]
    layer: dict[int, int]
    leftmost: frozenset[int]
    rightmost: frozenset[int]
    lines: dict[int, tuple[list[Piece], list[Point]]]


def lay_out(sizes: Mapping[int, tuple[float, float]], edges: Iterable[tuple[int, int]]) -> Layout:
    """Place the items of one stage.

    Args:
        sizes: width and height of every item, in program order.
        edges: pairs of items, without a circle.

    Returns:
        The layout; its upper left corner is the origin.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(edges)
    layer = _layers(graph)
    rows, above = _with_lanes(graph, layer)
    below: dict[Vertex, list[Vertex]] = {}
    for user, sources in above.items():
        for source in sources:
            below.setdefault(source, []).append(user)
    rows = _ordered(rows, above, below)
    widths = {v: sizes[v][0] if isinstance(v, int) else LANE_WIDTH for row in rows for v in row}
    x = _placed(rows, above, below, widths)
    items = [[v for v in row if isinstance(v, int)] for row in rows]
    heights = [max((sizes[v][1] for v in row), default=0.0) for row in items]
    tops = list(itertools.accumulate((h + LAYER_GAP for h in heights), initial=0.0))[:-1]
    bottoms = [t + h for t, h in zip(tops, heights, strict=True)]
    centres = {v: (x[v], (tops[layer[v]] + bottoms[layer[v]]) / 2) for v in sizes}
    spans = {v: (y - sizes[v][1] / 2, y + sizes[v][1] / 2) for v, (_, y) in centres.items()}
    return Layout(
        centres=centres,
        width=max((x[v] + width / 2 for v, width in widths.items()), default=0),
        height=bottoms[-1],
        tops=tops,
        bottoms=bottoms,
        layer=layer,
        leftmost=frozenset(row[0] for row in items if row),
        rightmost=frozenset(row[-1] for row in items if row),
        lines=_lines(graph, layer, x, tops, bottoms, spans),
    )


def _layers(graph: nx.DiGraph) -> dict[int, int]:
    """The layer of every item, by the longest path to it."""
    rows = nx.topological_generations(graph)
    layer: dict[int, int] = {v: depth for depth, row in enumerate(rows) for v in row}
    for v in graph:  # what nothing leads to stands right above its first user
        if not graph.in_degree(v) and graph.out_degree(v):
            layer[v] = min(layer[u] for u in graph.successors(v)) - 1
    return layer


def _with_lanes(
    graph: nx.DiGraph, layer: Mapping[int, int]
) -> tuple[list[list[Vertex]], dict[Vertex, list[Vertex]]]:
    """Items by layer, with a lane in every layer that a value runs through; what each vertex takes
    from the layer above.
    """
    rows: list[list[Vertex]] = [[] for _ in range(max(layer.values(), default=0) + 1)]
    for v in graph:
        rows[layer[v]].append(v)
    above: dict[Vertex, list[Vertex]] = {}
    for v in graph:
        users = list(graph.successors(v))
        for depth in range(layer[v] + 1, max((layer[u] for u in users), default=0)):
            rows[depth].append((v, depth))
            above[v, depth] = [_lane(v, depth - 1, layer)]
        for u in users:
            above.setdefault(u, []).append(_lane(v, layer[u] - 1, layer))
    return rows, above


def _lines(
    graph: nx.DiGraph,
    layer: Mapping[int, int],
    x: Mapping[Vertex, float],
    tops: Sequence[float],
    bottoms: Sequence[float],
    spans: Mapping[int, tuple[float, float]],
) -> dict[int, tuple[list[Piece], list[Point]]]:
    """The line of every item that others use; see :class:`Layout`."""
    lines = {}
    for v in graph:
        users = list(graph.successors(v))
        if not users:
            continue
        pieces: list[Piece] = []
        points = {layer[v]: (x[v], spans[v][1])}
        for depth in range(layer[v] + 1, max(layer[u] for u in users)):
            lane = x[v, depth]
            pieces.append((*points[depth - 1], lane, tops[depth]))
            pieces.append((lane, tops[depth], lane, bottoms[depth]))
            points[depth] = (lane, bottoms[depth])
        ends = [(x[u], spans[u][0]) for u in users]
        pieces += [(*points[layer[u] - 1], *end) for u, end in zip(users, ends, strict=True)]
        lines[v] = (pieces, ends)
    return lines


def _lane(source: int, depth: int, layer: Mapping[int, int]) -> Vertex:
    return source if depth == layer[source] else (source, depth)


def _ordered(rows: list[list[Vertex]], above: Neighbours, below: Neighbours) -> list[list[Vertex]]:
    """Rows sorted by barycentres, downwards and upwards in turn; the best of all sweeps."""
    best, fewest = rows, _crossings(rows, above)
    for sweep in range(_ORDER_SWEEPS if fewest else 0):
        rows = [list(row) for row in rows]
        down = sweep % 2 == 0
        neighbours = above if down else below
        for i in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            place = {v: float(k) for k, v in enumerate(rows[i - 1 if down else i + 1])}
            here = {v: float(k) for k, v in enumerate(rows[i])}
            wanted = {v: _mean([place[n] for n in neighbours.get(v, ())], here[v]) for v in rows[i]}
            rows[i].sort(key=wanted.__getitem__)
        if (crossings := _crossings(rows, above)) < fewest:
            best, fewest = rows, crossings
    return best


def _crossings(rows: list[list[Vertex]], above: Neighbours) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        place = {v: k for k, v in enumerate(upper)}
        seen: list[int] = []
        for v in lower:
            ends = sorted(place[n] for n in above.get(v, ()))
            total += sum(len(seen) - bisect_right(seen, e) for e in ends)
            for e in ends:
                insort(seen, e)
    return total


def _placed(
    rows: list[list[Vertex]], above: Neighbours, below: Neighbours, widths: Mapping[Vertex, float]
) -> dict[Vertex, float]:
    """Coordinates along the rows: boxes over boxes and lanes over lanes, as far as the widths
    allow.
    """
    x: dict[Vertex, float] = {}
    for row in rows:
        ends = itertools.accumulate(widths[v] + BOX_GAP for v in row)
        x.update({v: end - widths[v] / 2 for v, end in zip(row, ends, strict=True)})
    for sweep in range(_PLACE_SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else reversed(rows):
            wanted = []
            for v in row:
                near = neighbours.get(v, ())
                like = [x[n] for n in near if isinstance(n, int) == isinstance(v, int)]
                if not like and not isinstance(v, int):
                    like = [x[n] for n in near]
                wanted.append(_mean(like, x[v]))
            gaps = [_gap(a, b, widths) for a, b in itertools.pairwise(row)]
            weights = [_BOX_WEIGHT if isinstance(v, int) else 1.0 for v in row]
            x.update(zip(row, spread(wanted, gaps, weights), strict=True))
    left = min((x[v] - widths[v] / 2 for v in x), default=0.0)
    return {v: place - left for v, place in x.items()}


def _gap(a: Vertex, b: Vertex, widths: Mapping[Vertex, float]) -> float:
    """The least distance between the middles of two neighbours."""
    has_box = isinstance(a, int) or isinstance(b, int)
    return (widths[a] + widths[b]) / 2 + (BOX_GAP if has_box else 0)


def spread(
    wanted: Sequence[float], gaps: Sequence[float], weights: Sequence[float] | None = None
) -> list[float]:
    """Places nearest to those wanted, in the least-squares sense, that keep their order and the
    gaps between them.
    """
    offsets = list(itertools.accumulate(gaps, initial=0.0))[: len(wanted)]
    # weighted sum of what the members want, their weight and number
    blocks: list[tuple[float, float, int]] = []
    for place, offset, weight in zip(wanted, offsets, weights or [1.0] * len(wanted), strict=True):
        total, count = (place - offset) * weight, 1
        while blocks and blocks[-1][0] * weight > total * blocks[-1][1]:
            before = blocks.pop()
            total, weight, count = total + before[0], weight + before[1], count + before[2]
        blocks.append((total, weight, count))
    level = [total / weight for total, weight, count in blocks for _ in range(count)]
    return [place + offset for place, offset in zip(level, offsets, strict=True)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
