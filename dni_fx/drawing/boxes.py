"""What a drawing shows: the nodes of each stage as a tree of modules, opened as far as one picture
can hold.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..reports.plans import Interface, NodeReport, PlanReport

_SHORTEST_RUN = 5  # shorter ones would show hardly less
_SIZES = frozenset({"size", "shape", "numel", "dim", "__len__", "stride"})


@dataclass(frozen=True)
class Box:
    """Nodes that are drawn as one: consecutive ones of a stage, hence boxes never depend on each
    other in a circle.

    Attributes:
        name: path of the module, name of a single node, or the first and last name of a run.
        stage: index of the stage.
        nodes: its nodes in program order.
        depth: how many modules its nodes share.
        joined: the boxes of a run; empty for a module or a node.
    """

    name: str
    stage: int
    nodes: tuple[NodeReport, ...]
    depth: int
    joined: tuple[Box, ...] = ()

    @property
    def parent(self) -> tuple[str, ...]:
        """Modules around it."""
        return self.nodes[0].scope[: self.depth - 1]

    def parts(self) -> tuple[Box, ...]:
        """The boxes one level below; none for a node that lies in no further module."""
        if self.joined or (len(self.nodes) == 1 and len(self.nodes[0].scope) <= self.depth):
            return self.joined
        return find_boxes(self.nodes, self.stage, self.depth)


def find_boxes(nodes: Sequence[NodeReport], stage: int, depth: int = 0) -> tuple[Box, ...]:
    """Nodes of one stage as modules of one level and the nodes between them."""

    def key(node: NodeReport) -> tuple[bool, str]:
        return (True, node.scope[depth]) if len(node.scope) > depth else (False, node.name)

    runs = [(name, tuple(run)) for (_, name), run in itertools.groupby(nodes, key)]
    return tuple(Box(name, stage, run, depth + 1) for name, run in runs)


def choose_boxes(
    boxes: Sequence[Box], limit: int, is_cut: Callable[[Box], bool]
) -> tuple[Box, ...]:
    """The boxes to draw: as many levels of modules as stay within two thirds of the limit, and the
    parts of those cut.

    Where even those are too many, neighbours are put together.

    Args:
        boxes: of the level to start from.
        limit: how many boxes one picture may hold, unless there are more stages.
        is_cut: says whether a module lies in several stages, and so is never one box.
    """

    def opened(depth: int) -> tuple[Box, ...]:
        shown = tuple(boxes)
        while True:
            deeper = tuple(
                p for b in shown for p in ((b.depth < depth or is_cut(b)) and b.parts()) or (b,)
            )
            if deeper == shown:
                return shown
            shown = deeper

    start = min((b.depth for b in boxes), default=0)
    shown = opened(start)
    for depth in itertools.count(start + 1):
        if not any(b.parts() for b in shown):
            break
        deeper = opened(depth)
        if len(deeper) > limit * 2 // 3 and len(shown) > 1:
            break
        shown = deeper
    return _joined(shown, limit) if len(shown) > limit else shown


def _joined(boxes: Sequence[Box], limit: int) -> tuple[Box, ...]:
    """Runs of neighbours, of one module where that suffices, as short as stays within the limit."""
    runs: list[list[Box]] = []
    for key in (lambda b: (b.stage, b.parent), lambda b: b.stage):
        runs = [list(run) for _, run in itertools.groupby(boxes, key)]
        if len(runs) <= limit * 2 // 3:
            break
    count = lambda size: sum(-(-len(run) // size) for run in runs)  # noqa: E731
    longest = max(map(len, runs))
    size = next((s for s in range(_SHORTEST_RUN, longest) if count(s) <= limit), longest)
    result = []
    for run in runs:
        pieces = -(-len(run) // size)
        for i in range(pieces):  # pieces of nearly one size
            piece = run[i * len(run) // pieces : (i + 1) * len(run) // pieces]
            nodes = tuple(n for b in piece for n in b.nodes)
            name = _span(piece[0].name, piece[-1].name)
            result.append(
                piece[0] if len(piece) == 1 else Box(name, piece[0].stage, nodes, 0, tuple(piece))
            )
    return tuple(result)


def _span(first: str, last: str) -> str:
    """A name for all from the first to the last: ``layers.3–7``, ``layers.3 … norm``."""
    counted = first.rstrip("0123456789")
    if counted != first and counted == last.rstrip("0123456789"):
        return f"{first}–{last[len(counted) :]}"
    return f"{first} … {last.removeprefix(first.rpartition('.')[0] + '.')}"


def plain_name(operator: str) -> str:
    """``invert`` for ``__invert__``."""
    return operator.strip("_") if operator.startswith("__") else operator


class Nodes:
    """The nodes of a report, seen as one wants to draw them.

    Sizes and assertions are left out. The node that made a container stands for its members, but
    for those that cross.

    Attributes:
        by_name: every node.
        drawn: the nodes that are drawn, by stage, in program order.
        sources: names of the values that a drawn node or the output uses, by its name: of drawn
            nodes, of inputs, and of nodes made again in every stage.
        users: the same by the value's name.
        again: names of nodes that every stage that needs them makes again.
        last: index of the stage that returns the output.
    """

    def __init__(self, report: PlanReport) -> None:
        self.by_name = {n.name: n for n in report.nodes}
        self.kinds: dict[str, str] = report.kinds
        self._stands_for: dict[str, str | None] = {}
        self.drawn: dict[int, list[NodeReport]] = {s: [] for s in range(len(report.stages))}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.users: dict[str, dict[str, None]] = {}
        self.again: dict[str, None] = {}
        self.last = len(report.stages) - 1
        stages: dict[str, set[int]] = {}
        places = ((self.by_name[i], n) for n in report.nodes for i in n.inputs if i in self.by_name)
        self._sent = {
            made.name
            for made, user in places
            if made.stage is not None and made.stage != user.stage
        }
        self._used = {i for n in report.nodes for i in n.inputs}
        for node in report.nodes:
            stand_in = self._stands_for[node.name] = self._stand_in(node)
            if stand_in != node.name:
                continue
            made = dict.fromkeys(self._stands_for.get(i) for i in node.inputs)
            self.sources[node.name] = tuple(s for s in made if s is not None)
            for source in self.sources[node.name]:
                self.users.setdefault(source, {})[node.name] = None
            if node.stage is not None:
                self.drawn[node.stage].append(node)
                for path in node.scope:
                    stages.setdefault(path, set()).add(node.stage)
            elif node.operator not in ("input", "output"):
                self.again[node.name] = None
        self._cut = {path for path, where in stages.items() if len(where) > 1}
        self.seconds = sum(n.seconds or 0.0 for n in report.nodes)

    def _stand_in(self, node: NodeReport) -> str | None:
        """The node that stands for a node in a drawing; None where nothing does."""
        known = [self.by_name[i] for i in node.inputs if i in self.by_name]
        sizes = [i for i in known if self._stands_for.get(i.name, "") is None]
        idle = (
            not known and node.name not in self._used and node.operator not in ("input", "output")
        )
        counts = node.operator in _SIZES or (known and len(sizes) == len(known))
        if (counts or idle) and not node.shape:
            return None
        real = [i for i in known if i not in sizes]
        member = (
            node.operator == "getitem"
            and len(real) == 1
            and not real[0].shape
            and real[0].operator != "input"
        )
        aside = (member and node.name not in self._sent) or node.operator == "after"
        if real and aside and real[-1].stage == node.stage:
            return self._stands_for[real[-1].name]
        return node.name

    def is_cut(self, box: Box) -> bool:
        """Whether the module of a box lies in several stages."""
        return not box.joined and box.name in self._cut

    def stage(self, name: str) -> int:
        """Stage of a drawn node; the output belongs to the last one."""
        stage = self.by_name[name].stage
        return self.last if stage is None else stage

    @functools.cached_property
    def crossing(self) -> dict[str, dict[int, list[str]]]:
        """Values that cross between stages, by name: the users in every other stage."""
        found: dict[str, dict[int, list[str]]] = {}
        for name, users in self.users.items():
            if (stage := self.by_name[name].stage) is not None:
                for user in users:
                    if self.stage(user) != stage:
                        found.setdefault(name, {}).setdefault(self.stage(user), []).append(user)
        return found

    def source(self, interface: Interface) -> str:
        """The drawn node that makes the value of an interface."""
        for name in (*interface.aliases, interface.name):
            node = self.by_name.get(name)
            if node is not None and node.stage == interface.producer:
                return self._stands_for[name] or name
        path = interface.name.partition("@")[0]
        drawn = self.drawn[interface.producer]
        inside = [n.name for n in drawn if path in n.scope] or [n.name for n in drawn]
        return next((n for n in reversed(inside) if n in self.crossing), inside[-1])

    def title(self, name: str) -> str:
        """The path of the module that a node calls, else the node's name."""
        scope = self.by_name[name].scope
        return scope[-1] if scope and name.startswith(re.sub(r"\W", "_", scope[-1])) else name

    def kind(self, box: Box) -> str:
        """What a box is: the operator of a single node, the class of a module, or what it holds."""
        if len(box.nodes) == 1:
            node = box.nodes[0]
            module = len(node.scope) >= box.depth
            return plain_name(node.operator) + (
                f" in {node.scope[-1]}" if node.scope and not module else ""
            )
        if box.joined:
            return f"{len(box.joined)} in a row"
        if box.name in self.kinds:
            return self.kinds[box.name]
        return ", ".join(
            name for name, _ in Counter(plain_name(n.operator) for n in box.nodes).most_common(3)
        )

    def shape(self, box: Box) -> tuple[int, ...]:
        """Shape of the last value that is used outside a box."""
        inside = {n.name for n in box.nodes}
        sent = [n for n in box.nodes if any(u not in inside for u in self.users.get(n.name, ()))]
        return (sent or box.nodes)[-1].shape
