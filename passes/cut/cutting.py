"""Where a graph may be cut, what would cross there, and which nodes then belong to which stage."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx

from ...errors import CutError, did_you_mean
from ...plan import CutPoint, TensorSpec
from ..trace.calls import ReadAttribute, StoreAttribute
from ..trace.nodes import needs_gradient
from ..trace.traces import Trace
from .specs import infer_specs, name_values, numbered_calls
from .views import divided_regions, torn_positions

_GIVEN = ("placeholder", "get_attr", "output")  # what is no computation
_REPLICATED_ELEMENTS = 1 << 20  # a larger mask or table is sent rather than computed again


@dataclass(frozen=True)
class Flow:
    """Which values live across which positions of the program. Position ``p`` is before node ``p``.

    Attributes:
        trace: the traced model.
        nodes: nodes in program order.
        index: position of each node.
        names: names of each value, preferred first.
        specs: tensor specs by node name.
        last_use: position of the last user of each node, -1 without users.
        replicated: cheap nodes computed from the inputs alone, made again in every stage that uses
            them.
        guards_only: integers that the model looked at but did not compute with; no stage needs
            them.
        returning: nodes that pass gradients back to what they use: no dead code, nothing detached.
        last_computed: position of the last node that computes something.
        trainable: number of values that carry a gradient across each position.
        illegal: why a position may not be cut, for those that may not.
    """

    trace: Trace
    nodes: tuple[fx.Node, ...]
    index: dict[fx.Node, int]
    names: dict[fx.Node, tuple[str, ...]]
    specs: dict[str, TensorSpec]
    last_use: dict[fx.Node, int]
    replicated: frozenset[fx.Node]
    guards_only: frozenset[fx.Node]
    returning: frozenset[fx.Node]
    last_computed: int
    trainable: tuple[int, ...]
    illegal: dict[int, str]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's tensor inputs, in order."""
        return tuple(self.specs[n.name] for n in self.nodes if n.op == "placeholder")

    def crosses(self, node: fx.Node, position: int) -> bool:
        """Whether a computed value is made before the position and used at or after it."""
        return self.index[node] < position <= self.last_use[node] and self.is_computed(node)

    def carries_gradient(self, node: fx.Node, position: int = 0) -> bool:
        """Whether a gradient comes back to a value from users at or after a position: it is an
        interface there.
        """
        if not needs_gradient(node):
            return False
        return any(u in self.returning and self.index[u] >= position for u in node.users)

    def is_computed(self, node: fx.Node) -> bool:
        """Whether the node belongs to one stage: not an input, an attribute, a replicated node or a
        mere guard.
        """
        left_out = node in self.replicated or node in self.guards_only
        return node.op not in _GIVEN and not left_out


def find_flow(trace: Trace) -> Flow:
    """Scan a graph once for what crosses every position and where a cut is illegal. Linear in nodes
    and edges.
    """
    nodes = tuple(trace.graph.nodes)
    index = {n: i for i, n in enumerate(nodes)}
    guards_only: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op != "output" and "value" not in node.meta and guards_only.issuperset(node.users):
            guards_only.add(node)
    last_use = {
        n: max((index[u] for u in n.users if u not in guards_only), default=-1) for n in nodes
    }
    written = {storage: n for n in nodes for storage in n.meta.get("mutates", ())}  # the last to
    replicated = _replicated(nodes, written)
    returning = _returning(nodes)
    change = [0] * (len(nodes) + 2)
    for node in nodes:
        if node.op not in _GIVEN and node not in replicated and needs_gradient(node):
            last = max((index[u] for u in node.users if u in returning), default=index[node])
            change[index[node] + 1] += 1
            change[last + 1] -= 1
    kept = kept_storages(nodes)
    unkept = {storage: n for storage, n in written.items() if storage not in kept}
    illegal = torn_positions(nodes, last_use, replicated, unkept)
    glued = {i: n for i, n in enumerate(nodes) if n.meta.get("glued")}
    illegal |= {i: f"{n.name!r} belongs to the node before it" for i, n in glued.items()}
    for i, node in enumerate(nodes):
        if node.meta.get("sparse") and node.op not in _GIVEN and node not in replicated:
            reason = f"{node.name!r} is sparse, and no source serves such a value"
            illegal.update(dict.fromkeys(range(i + 1, last_use[node] + 1), reason))
    illegal |= divided_regions(nodes)
    computing = [n for n in nodes if n.op not in _GIVEN and n not in guards_only]
    return Flow(
        trace=trace,
        nodes=nodes,
        index=index,
        names=name_values(trace),
        specs=infer_specs(trace),
        last_use=last_use,
        replicated=replicated,
        guards_only=frozenset(guards_only),
        returning=returning,
        last_computed=max((index[n] for n in computing if index[n] not in glued), default=-1),
        trainable=tuple(accumulate(change)),
        illegal=illegal,
    )


def list_cut_points(flow: Flow) -> tuple[CutPoint, ...]:
    """Every position that can be named, in program order, with what would cross it: after each
    module, and after each node that ends no module.
    """
    return tuple(point for _, point in located_points(flow))


def located_points(flow: Flow) -> Iterator[tuple[int, CutPoint]]:
    """Cut points with their positions; one that several modules end at comes once for each."""
    times = Counter(path for path, _, _ in flow.trace.calls)
    named: dict[int, list[str]] = {}
    for path, count, _, last in numbered_calls(flow.trace):
        name = f"{path}@{count}" if times[path] > 1 else path
        named.setdefault(_after(flow, last), []).insert(0, name)
    live: dict[fx.Node, None] = {}
    for position, node in enumerate(flow.nodes[:-1], 1):
        if flow.is_computed(node):
            live[node] = None
        for used in (*node.all_input_nodes, node):
            if flow.last_use[used] < position:
                live.pop(used, None)
        if not flow.is_computed(node) or flow.nodes[position].meta.get("glued"):
            continue
        for name in named.get(position, [flow.names[node][0]]):
            yield position, _cut_point(flow, position, name, tuple(live), position in named)


def find_cuts(flow: Flow, cuts: tuple[str, ...], lenient: bool = False) -> dict[int, str]:
    """Positions of named cuts, in program order; every problem of every name is gathered into one
    error.

    Args:
        flow: facts of a traced model.
        cuts: module paths or node names.
        lenient: leave out what cannot be cut. A graph made later under a plan may lack a cut, which
            lies in a branch not taken or meets another one.

    Raises:
        CutError: unknown names, cuts that nothing trainable crosses, illegal cuts, two cuts at one
            place.
    """
    problems: list[str] = []
    found: dict[int, str] = {}
    names = cut_names(flow)
    for cut in cuts:
        position = names.get(cut, 0)
        if position in found:
            problems.append(f"{cut!r}: is at the same place as {found[position]!r}")
        elif why := reason_against(flow, cut, names):
            problems.append(f"{cut!r}: {why}")
        else:
            found[position] = cut
    if problems and not lenient:
        raise refused(flow, f"{len(problems)} of {len(cuts)} cuts cannot be made", problems)
    return dict(sorted(found.items()))


def refused(flow: Flow, what: str, problems: Iterable[str]) -> CutError:
    """An error that gathers what is wrong with several names."""
    lines = "\n".join(f"  - {p}" for p in problems)
    return CutError(
        f"{what} in {type(flow.trace.model).__name__}:\n{lines}\n"
        "print(dni_fx.list_cut_points(model, example_inputs)) shows the places where it can be cut"
    )


def reason_against(flow: Flow, name: str, names: Mapping[str, int]) -> str | None:
    """Why a cut may not be made at a name, or None; ``names`` are those of :func:`cut_names`."""
    if name in names:
        return _reason_at(flow, names[name])
    inside = next((path for path in flow.trace.opaque if name.startswith(f"{path}.")), None)
    if inside is None:
        return f"no module or node of this graph has that name{did_you_mean(name, names)}"
    return f"lies in {inside!r}, which is one opaque node: {flow.trace.opaque[inside]}"


def name_positions(flow: Flow, positions: tuple[int, ...]) -> tuple[str, ...]:
    """Names of cuts at some positions: of the outermost module that ends there, else of the node
    before it, or whatever means that place (a node may have the name of a later call's module).
    """
    names = cut_names(flow)
    meant = {position: name for name, position in reversed(names.items())}
    nodes = {p: flow.nodes[p - 1].name for p in positions}
    found = {p: n if names[n] == p else meant[p] for p, n in nodes.items()}
    for path, _, _ in flow.trace.calls:
        if path and names.get(path) in found:
            found[names[path]] = path
    return tuple(found[p] for p in positions)


def legal_positions(flow: Flow) -> tuple[int, ...]:
    """Every position after a computed tensor where a cut is legal, ascending."""
    return tuple(
        p
        for p, n in enumerate(flow.nodes[:-2], 1)
        if flow.is_computed(n) and n.meta.get("value") is not None and not _reason_at(flow, p)
    )


def _reason_at(flow: Flow, position: int) -> str | None:
    if position > flow.last_computed:
        return "nothing is computed after it"
    if flow.trainable[position] == 0:
        return (
            "no value on a trainable path crosses there (its upstream is frozen, or only inputs "
            "cross)"
        )
    return flow.illegal.get(position)


def assign_stages(flow: Flow, positions: tuple[int, ...]) -> dict[fx.Node, int]:
    """Stage of every computed node, for cuts at the given positions."""
    return {
        node: bisect_right(positions, i)
        for i, node in enumerate(flow.nodes)
        if flow.is_computed(node)
    }


def assign_by_name(flow: Flow, assignment: Mapping[str, int]) -> dict[fx.Node, int]:
    """Stages of a plan that names every node; a node that it does not know goes with those that it
    must stay together with, or with the latest that it needs.
    """
    marked = {
        mark: assignment[node.name]
        for node in flow.nodes
        for mark in node.meta.get("together", ())
        if node.name in assignment
    }
    stages: dict[fx.Node, int] = {}
    for node in flow.nodes:
        if flow.is_computed(node):
            needed = [stages[i] for i in node.all_input_nodes if i in stages]
            beside = [marked[m] for m in node.meta.get("together", ()) if m in marked]
            stages[node] = max([assignment.get(node.name, 0), *beside, *needed])
    return stages


def cut_names(flow: Flow) -> dict[str, int]:
    """The position that every name of a module or node means: after its last node."""
    names: dict[str, int] = {}
    for node in flow.nodes:
        if node.op not in _GIVEN:
            names[node.name] = names[flow.names[node][-1]] = _after(flow, node)
    times = Counter(path for path, _, _ in flow.trace.calls)
    for path, count, _, last in numbered_calls(flow.trace):
        if times[path] > 1:
            names[f"{path}@{count}"] = _after(flow, last)
        names[path] = _after(flow, last)  # the plain name means the last call
    return names


def _after(flow: Flow, node: fx.Node) -> int:
    """The position after a node and what is glued to it."""
    position = flow.index.get(node, -1) + 1
    while position < len(flow.nodes) and flow.nodes[position].meta.get("glued"):
        position += 1
    return position


def _cut_point(
    flow: Flow, position: int, name: str, live: tuple[fx.Node, ...], ends_module: bool
) -> CutPoint:
    crossing = [n for n in live if flow.crosses(n, position)]
    carrying = [n for n in crossing if flow.carries_gradient(n, position)]
    last = flow.nodes[position - 1]
    main = last if last in carrying else next(reversed(carrying), None)
    why = _reason_at(flow, position)
    return CutPoint(
        name=name,
        shape=flow.specs[main.name].shape if main else (),
        nbytes=sum(flow.specs[n.name].nbytes for n in crossing if n.name in flow.specs),
        crossing=tuple(flow.names[n][0] for n in crossing),
        interfaces=len(carrying),
        legal=why is None,
        reason=why or "",
        ends_module=ends_module,
    )


def kept_storages(nodes: tuple[fx.Node, ...]) -> set[int]:
    """Memory of buffers and other attributes: every stage writes to the model's own, never to a
    copy.
    """
    own = [n for n in nodes if n.op == "get_attr" or isinstance(n.target, ReadAttribute)]
    return {n.meta["storage"] for n in own if n.meta["storage"] is not None}


def _returning(nodes: tuple[fx.Node, ...]) -> frozenset[fx.Node]:
    asked: set[fx.Node] = set()
    found: list[fx.Node] = []
    for node in reversed(nodes):
        container = not isinstance(node.meta.get("value"), torch.Tensor)
        # the loss may read what the model keeps
        kept = isinstance(node.target, StoreAttribute) and any(
            map(needs_gradient, node.all_input_nodes)
        )
        leaves = node.op == "output" or kept
        if leaves or (node in asked and (container or needs_gradient(node))):
            asked.update(node.all_input_nodes)
            found.append(node)
    return frozenset(found)


def _replicated(nodes: tuple[fx.Node, ...], written: dict[int, fx.Node]) -> frozenset[fx.Node]:
    """Nodes made from the inputs alone, neither large nor trained, that write and draw nothing; and
    attributes that are read, which each stage does by itself.
    """
    found: set[fx.Node] = set()

    def is_free(node: fx.Node) -> bool:
        given = node.op in ("placeholder", "get_attr")
        return (given or node in found) and node.meta.get("storage") not in written

    for node in nodes:
        meta, value = node.meta, node.meta.get("value")
        is_read = isinstance(node.target, ReadAttribute)
        wanted = isinstance(value, torch.Tensor) and (
            value.requires_grad or (value.numel() > _REPLICATED_ELEMENTS and not is_read)
        )
        container = value is None and "value" in meta
        own = any(meta.get(key) for key in ("mutates", "random", "parameters", "together"))
        if (
            node.op in ("call_function", "call_method")
            and not (wanted or container or own)
            and (is_read or meta.get("storage") not in written)
            and all(map(is_free, node.all_input_nodes))
        ):
            found.add(node)
    return frozenset(found)
