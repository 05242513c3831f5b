"""What stands in each panel of a drawing and what runs between panels, before anything has a
place.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..reports.plans import Interface, PlanReport
from .boxes import Box, Nodes, choose_boxes, find_boxes, plain_name
from .shapes import Item, Link, Panel

MOST_BOXES, MOST_LABELS, MOST_PILLS = 60, 8, 4


@dataclass(frozen=True)
class View:
    """One picture to be.

    Attributes:
        panels: of the whole model: one for each stage; of a box: one.
        links: what crosses between the panels.
        folded: the boxes in it that open, with the names by which pictures refer to them.
    """

    panels: tuple[Panel, ...]
    links: tuple[Link, ...]
    folded: tuple[tuple[str, Box], ...]


class Views:
    """Makes the views of one plan."""

    def __init__(self, report: PlanReport) -> None:
        self.report, self.nodes = report, Nodes(report)
        self.keys, self.anchors = itertools.count(), itertools.count(1)

    def whole(self) -> View:
        """The whole model, a panel for each stage."""
        nodes, stages = self.nodes, range(len(self.report.stages))
        boxes = choose_boxes(
            [b for s in stages for b in find_boxes(nodes.drawn[s], s)], MOST_BOXES, nodes.is_cut
        )
        owner: dict[str, int] = {}
        panels, folded = [], []
        for stage in stages:
            again = dict.fromkeys(
                s for n in nodes.drawn[stage] for s in nodes.sources[n.name] if s in nodes.again
            )
            made = ", ".join(dict.fromkeys(plain_name(nodes.by_name[a].operator) for a in again))
            why = "computed from the inputs alone, so made again in every stage that uses it"
            tip = f"{why}: {', '.join(again)}"

            def pill_of(name: str, made: str = made, tip: str = tip) -> tuple[str, str] | None:
                if name in nodes.again:
                    return made, tip
                node = nodes.by_name[name]
                is_input = node.operator == "input"
                return (f"input {name} {_shape(node.shape)}", "") if is_input else None

            outputs = [n.name for n in self.report.nodes if n.operator == "output"]
            results = outputs if stage == nodes.last else []
            here = [b for b in boxes if b.stage == stage]
            head = self._head(stage)
            panel, opening = self._panel(stage, head, here, owner, pill_of, results, "inputs")
            panels.append(panel)
            folded += opening
        return View(tuple(panels), tuple(self._links(owner)), tuple(folded))

    def inside(self, box: Box) -> View:
        """The parts of one box, with what comes from outside and leads there."""

        def pill_of(name: str) -> tuple[str, str] | None:
            node = self.nodes.by_name[name]
            where = "input" if node.operator == "input" else "from"
            other = node.stage is not None and node.stage != box.stage
            stage = f" ({self.report.stages[self.nodes.stage(name)].name})" if other else ""
            return f"{where} {self.nodes.title(name)}{stage}", _shape(node.shape)

        boxes = choose_boxes(box.parts(), MOST_BOXES, self.nodes.is_cut)
        within = {n.name for n in box.nodes}
        sent = [
            n.name
            for n in box.nodes
            if any(u not in within for u in self.nodes.users.get(n.name, ()))
        ]
        owner: dict[str, int] = {}
        head = (box.name, self.nodes.kind(box), self.report.stages[box.stage].name)
        panel, folded = self._panel(
            box.stage, head, boxes, owner, pill_of, sent, "values from outside"
        )
        return View((panel,), (), tuple(folded))

    def _panel(
        self,
        stage: int,
        head: tuple[str, ...],
        boxes: Sequence[Box],
        owner: dict[str, int],
        pill_of: Callable[[str], tuple[str, str] | None],
        results: Sequence[str],
        many: str,
    ) -> tuple[Panel, list[tuple[str, Box]]]:
        """A panel of boxes and pills; ``owner`` learns which item each node is in."""
        nodes = self.nodes
        items, folded = [], []
        for box in boxes:
            item = self._item(box)
            items.append(item)
            owner.update((n.name, item.key) for n in box.nodes)
            if item.anchor:
                folded.append((item.anchor, box))
        edges: dict[tuple[int, int], None] = {}
        pills: dict[tuple[str, str], dict[int, None]] = {}
        own = {i.key for i in items}
        for node in (n for b in boxes for n in b.nodes):
            for source in nodes.sources[node.name]:
                if owner.get(source) in own:
                    edges[owner[source], owner[node.name]] = None
                elif (pill := pill_of(source)) is not None:
                    pills.setdefault(pill, {})[owner[node.name]] = None
        if len(pills) > MOST_PILLS:
            users = dict.fromkeys(itertools.chain(*pills.values()))
            pills = {(f"{len(pills)} {many}", ", ".join(title for title, _ in pills)): users}
        before = []
        for (title, tip), keys in pills.items():
            before.append(Item(next(self.keys), title, tip=tip))
            edges.update(((before[-1].key, key), None) for key in keys)
        if results:
            whole = nodes.by_name[results[0]].operator == "output"
            items.append(Item(next(self.keys), "output" if whole else "used outside"))
            for name in results:
                owner.setdefault(name, items[-1].key)
                for source in nodes.sources[name] if whole else (name,):
                    if owner.get(source) in own:
                        edges[owner[source], items[-1].key] = None
        inner = tuple((a, b) for a, b in edges if a != b)
        return Panel(stage, head, (*before, *items), inner), folded

    def _item(self, box: Box) -> Item:
        nodes, count = self.nodes, len(box.nodes)
        seconds = sum(n.seconds or 0.0 for n in box.nodes)
        facts = [
            box.name,
            nodes.kind(box),
            _shape(nodes.shape(box)),
            self.report.stages[box.stage].name,
        ]
        facts += [f"{count} nodes"] * (count > 1) + [f"{seconds * 1e3:.3g} ms"] * bool(
            nodes.seconds
        )
        return Item(
            key=next(self.keys),
            title=box.name,
            kind=nodes.kind(box),
            shape=_shape(nodes.shape(box)),
            share=seconds / nodes.seconds if nodes.seconds else None,
            tip=", ".join(f for f in facts if f),
            nodes=count,
            anchor=f"inside-{next(self.anchors)}" if count > 1 else "",
        )

    def _head(self, index: int) -> tuple[str, ...]:
        stage, stages = self.report.stages[index], self.report.stages
        if stage.cost is None:
            load = f"{stage.nodes / (sum(s.nodes for s in stages) or 1):.0%} of the nodes"
        else:
            whole = sum(s.cost.seconds for s in stages if s.cost is not None) or 1.0
            load = (
                f"{stage.cost.seconds / whole:.0%} of the time, {stage.cost.seconds * 1e3:.3g} ms"
            )
        end = "returns the output" if stage.cut is None else f"ends after {stage.cut}"
        return stage.name, load, f"{stage.parameters:,} parameters", end

    def _links(self, owner: dict[str, int]) -> list[Link]:
        """Interfaces, those of a stage with many put together by where they go; then what carries
        no gradient.
        """
        sent = Counter(i.producer for i in self.report.interfaces)
        made = {i.name: self.nodes.source(i) for i in self.report.interfaces}
        groups: dict[tuple[object, ...], list[Interface]] = {}
        for i in self.report.interfaces:
            many = sent[i.producer] > MOST_LABELS
            groups.setdefault((i.producer, i.consumers) if many else (i.name,), []).append(i)
        links = [
            self._link(group, [made[i.name] for i in group], owner) for group in groups.values()
        ]
        plain: dict[tuple[int, ...], list[str]] = {}
        for name, users in self.nodes.crossing.items():
            if name not in made.values():
                plain.setdefault((self.nodes.stage(name), *sorted(users)), []).append(name)
        for (producer, *consumers), names in plain.items():
            targets = {s: self._users(names, s, owner) for s in consumers}
            tip = f"without gradient: {', '.join(names)}"
            links.append(
                Link(producer, tuple(dict.fromkeys(owner[n] for n in names)), targets, (), tip)
            )
        return links

    def _link(self, group: Sequence[Interface], made: Sequence[str], owner: dict[str, int]) -> Link:
        first = group[0]
        kinds = {
            i.name: self.report.sources[i.name].kind if i.name in self.report.sources else "none"
            for i in group
        }
        label = (f"{len(group)} interfaces", _size(sum(i.spec.nbytes for i in group)))
        if len(group) == 1:
            label = (first.name, f"{_shape(first.spec.shape)} · {_size(first.spec.nbytes)}")
        to = ", ".join(self.report.stages[c].name for c in first.consumers)
        facts = ((i.name, _shape(i.spec.shape), _size(i.spec.nbytes), kinds[i.name]) for i in group)
        tips = [f"{name}: {shape}, {size}, source {kind}" for name, shape, size, kind in facts]
        return Link(
            producer=first.producer,
            sources=tuple(dict.fromkeys(owner[m] for m in made)),
            targets={c: self._users(made, c, owner) for c in first.consumers},
            label=(*label, f"source: {', '.join(dict.fromkeys(kinds.values()))}"),
            tip="\n".join([*tips, f"from {self.report.stages[first.producer].name} to {to}"]),
        )

    def _users(self, names: Sequence[str], stage: int, owner: dict[str, int]) -> tuple[int, ...]:
        users = (u for n in names for u in self.nodes.crossing.get(n, {}).get(stage, ()))
        return tuple(dict.fromkeys(owner[u] for u in users if u in owner))


def _size(nbytes: int) -> str:
    if nbytes >= 10_000:
        return f"{nbytes / 1e6:.3g} MB"
    return f"{nbytes / 1e3:.3g} kB" if nbytes >= 1000 else f"{nbytes} B"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
