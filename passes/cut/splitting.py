"""From one traced graph and a stage for every node to one graph module per stage.

A stage's module takes model inputs and values of earlier stages and returns the values that later
stages use; the last one returns the model's output. Parameters, buffers and submodules are the
model's own, by reference.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx, nn

from ...errors import CutError
from ...graphs.nested import Structure
from ...plan import Interface
from ..trace.nodes import identifier, is_plain_name, needs_gradient, targets_of, with_named
from ..trace.traces import Port, Trace
from .cutting import Flow, kept_storages
from .regions import Opened, enter_regions
from .specs import parameters_of

OUTPUT = "output"


class Rebuild:
    """Puts the model's nested output together again; the last node of the last stage."""

    __name__ = "rebuild"
    __module__ = "dni_fx"

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def __call__(self, *leaves: Any) -> Any:
        return self.structure.build(iter(leaves))


@dataclass(frozen=True)
class StageGraph:
    """One stage of a split model.

    Attributes:
        index: position in program order.
        module: the subgraph; positional inputs in the order of ``inputs``, a tuple in the order of
            ``outputs`` (the model's own output in the last stage, where nothing else leaves the
            graph there).
        inputs: names of model inputs and of values of earlier stages.
        outputs: names of the values that later stages use; ``("output",)`` in the last stage. Those
            that leave the graph come last.
        parameters: names of the parameters that the stage reads, in the model's order.
        nodes: number of the graph's nodes in this stage.
        called: paths of the modules that the stage calls as one node each.
    """

    index: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    nodes: int
    called: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """All stages and what crosses between them.

    Attributes:
        stages: in program order.
        interfaces: values that carry a gradient across, in program order; those that leave the
            graph come first.
        crossing: the traced graph's node of each interface.
        plain: names of other values that cross (integers, masks, sizes, values without gradient).
        unasked: those of them that have an autograd graph, though no gradient ever comes back.
        model_inputs: names of the model's tensor inputs, in order.
        shared: parameters used by more than one stage: name, parameter, those stages ascending.
        reused: stages that use a shared parameter several times before a later stage uses it again,
            with its name.
        incoming: names of the model inputs whose gradient is sent back, to the window before or to
            another network.
        summed: the shared parameters; with ``incoming`` all of them, since every window uses them.
    """

    stages: tuple[StageGraph, ...]
    interfaces: tuple[Interface, ...]
    crossing: tuple[str, ...]
    plain: tuple[str, ...]
    unasked: tuple[str, ...]
    model_inputs: tuple[str, ...]
    shared: tuple[tuple[str, nn.Parameter, tuple[int, ...]], ...]
    reused: tuple[tuple[int, str], ...]
    incoming: tuple[str, ...] = ()
    summed: tuple[tuple[str, nn.Parameter, tuple[int, ...]], ...] = ()

    def run(self, values: dict[str, Any]) -> Any:
        """The model's output, by the stages one after the other, with ordinary autograd.

        Args:
            values: the model's inputs by name; everything that crosses or leaves is added.
        """
        for stage in self.stages:
            results = stage.module(*(values[n] for n in stage.inputs))
            whole = stage.outputs == (OUTPUT,)
            values.update(zip(stage.outputs, (results,) if whole else results, strict=True))
        return values.pop(OUTPUT)

    def shared_in(self, stage: int) -> dict[str, nn.Parameter]:
        """The shared parameters that one stage uses."""
        return {name: parameter for name, parameter, where in self.shared if stage in where}

    def summed_in(self, stage: int) -> dict[str, nn.Parameter]:
        """Parameters whose gradient continues the sum that later stages, or the next window, have
        begun.
        """
        return {name: parameter for name, parameter, where in self.summed if stage in where}

    def received_in(self, stage: int) -> list[str]:
        """Names of the inputs of a stage that a gradient is sent back for."""
        names = [*(i.name for i in self.interfaces), *self.incoming]
        return [n for n in names if n in self.stages[stage].inputs]

    def seen_by(self, stage: int, whose: str) -> list[str]:
        """Names of the values that a source of a stage sees; see :class:`dni_fx.sources.Asks`."""
        if whose == "model":
            return list(self.model_inputs)
        taken = self.stages[stage].inputs
        received = [i.name for i in self.interfaces if i.name in taken]
        return received or [n for n in self.model_inputs if n in taken]

    def sent_by(self, stage: int) -> list[str]:
        """Names of the interfaces that a stage sends, in the order in which autograd would meet
        their gradients.
        """
        return [i.name for i in self.interfaces if i.producer == stage]


@dataclass(frozen=True)
class _Crossing:
    """What crosses between which stages.

    Attributes:
        flow: facts of the traced model.
        stage_of: stage of every computed node.
        last: the last stage.
        returned: the nodes of the model's own output.
        users: the stages that use each crossing value, in program order of the values.
        names: of each crossing value.
    """

    flow: Flow
    stage_of: dict[fx.Node, int]
    last: int
    returned: list[fx.Node]
    users: dict[fx.Node, dict[int, None]]
    names: dict[fx.Node, str]

    def place(self, node: fx.Node) -> int:
        """The stage of a node; inputs and the output belong to the last one."""
        return self.stage_of.get(node, self.last)

    def label(self, node: fx.Node) -> str:
        """What a stage calls a model input, or a value of another stage."""
        return node.name if node.op == "placeholder" else self.names[node]

    def carries(self, node: fx.Node) -> bool:
        """Whether a gradient comes back over a crossing value."""
        return needs_gradient(node) and any(
            user in self.flow.returning
            for user in node.users
            if self.place(user) != self.stage_of[node]
            and (user.op != "output" or node in self.returned)
        )


def split_stages(flow: Flow, stage_of: dict[fx.Node, int], named: tuple[str, ...] = ()) -> Split:
    """Split a traced graph.

    Args:
        flow: facts of the traced model.
        stage_of: stage of every computed node; stages may not depend on each other in a circle.
        named: names of the cuts, which decide between several names of one value.

    Returns:
        The stages and their edges. The traced graph is not changed.

    Raises:
        CutError: stages that depend on each other in a circle, or on a later one.
    """
    cross = _find_crossing(flow, stage_of, named)
    stages = tuple(_build_stage(cross, k) for k in range(cross.last + 1))
    leaving = [(p, n) for p in flow.trace.ports if needs_gradient(n := flow.trace.port_node(p))]
    carrying = [n for n in cross.users if cross.carries(n)]
    plain = [n for n in cross.users if n not in set(carrying)]
    sharing: dict[str, list[int]] = {}
    for stage in stages:
        for name in stage.parameters:
            sharing.setdefault(name, []).append(stage.index)
    every = [(n, flow.trace.model.get_parameter(n), tuple(where)) for n, where in sharing.items()]
    shared = tuple(item for item in every if len(item[2]) > 1)
    return Split(
        stages=stages,
        interfaces=(
            *(_outward(cross, port, node, stages) for port, node in leaving),
            *(_inward(cross, node, named) for node in carrying),
        ),
        crossing=tuple(n.name for n in [*(n for _, n in leaving), *carrying]),
        plain=tuple(cross.names[n] for n in plain),
        unasked=tuple(cross.names[n] for n in plain if needs_gradient(n)),
        model_inputs=tuple(n.name for n in flow.nodes if n.op == "placeholder"),
        shared=shared,
        reused=_reused(flow, stage_of, sharing),
        incoming=flow.trace.incoming,
        summed=tuple(every) if flow.trace.incoming else shared,
    )


def _find_crossing(flow: Flow, stage_of: dict[fx.Node, int], named: tuple[str, ...]) -> _Crossing:
    last = max(stage_of.values(), default=0)
    returned = [leaf for leaf in flow.trace.output_leaves if isinstance(leaf, fx.Node)]
    users: dict[fx.Node, dict[int, None]] = {}
    for node in flow.nodes:
        used, here = node.all_input_nodes, stage_of.get(node, -1)
        if node.op == "output":
            used, here = returned, last
        for value in used if here >= 0 else ():
            if stage_of.get(value, here) != here:
                users.setdefault(value, {})[here] = None
    _check_order({(stage_of[v], c) for v, consumers in users.items() for c in consumers})
    users = {n: users[n] for n in flow.nodes if n in users}
    names = _crossing_names(flow, list(users), named)
    return _Crossing(flow, stage_of, last, returned, users, names)


def _outward(
    cross: _Crossing, port: Port, node: fx.Node, stages: tuple[StageGraph, ...]
) -> Interface:
    """A value that leaves the graph."""
    return Interface(
        name=port.name,
        spec=dataclasses.replace(cross.flow.specs[node.name], batch_dim=port.batch_dim),
        producer=cross.place(node),
        consumers=tuple(s.index for s in stages if port.feeds in s.inputs),
        feeds=port.feeds,
    )


def _inward(cross: _Crossing, node: fx.Node, named: tuple[str, ...]) -> Interface:
    """A value that goes to later stages."""
    name, every = cross.names[node], cross.flow.names[node]
    return Interface(
        name=name,
        spec=cross.flow.specs[node.name],
        producer=cross.stage_of[node],
        consumers=tuple(sorted(cross.users[node])),
        implied=not set(every) & set(named),
        aliases=tuple(a for a in every if a != name),
    )


def _check_order(edges: set[tuple[int, int]]) -> None:
    """Stages run in the order of their numbers, so values may only flow upwards."""
    graph = nx.DiGraph(sorted(edges))
    if not nx.is_directed_acyclic_graph(graph):
        circle = " -> ".join(str(a) for a, _ in nx.find_cycle(graph))
        raise CutError(
            f"stages {circle} depend on each other in a circle; assign their nodes otherwise"
        )
    backwards = sorted((a, b) for a, b in edges if a > b)
    if backwards:
        raise CutError(
            f"stage {backwards[0][0]} feeds stage {backwards[0][1]}, which runs earlier; renumber "
            "them"
        )


def _reused(
    flow: Flow, stage_of: dict[fx.Node, int], sharing: dict[str, list[int]]
) -> tuple[tuple[int, str], ...]:
    uses: Counter[tuple[int, str]] = Counter()
    for node, stage in stage_of.items():
        module = flow.trace.attributes.get(str(node.target)) if node.op == "call_module" else None
        several = isinstance(module, nn.RNNBase) or str(node.target) in flow.trace.opaque
        for name in parameters_of(node):
            uses[stage, name] += 2 if several else 1
    return tuple(
        sorted(
            (stage, name)
            for (stage, name), count in uses.items()
            if count > 1 and stage < sharing.get(name, [stage])[-1]
        )
    )


def _crossing_names(
    flow: Flow, crossing: list[fx.Node], named: tuple[str, ...]
) -> dict[fx.Node, str]:
    taken = {n.name for n in flow.nodes if n.op == "placeholder"} | {OUTPUT, "loss"}
    taken |= {port.name for port in flow.trace.ports}
    names: dict[fx.Node, str] = {}
    for node in crossing:
        options = [a for a in flow.names[node] if a in named] + list(flow.names[node]) + [node.name]
        name = next((o for o in options if o not in taken), f"{node.name}_value")
        taken.add(name)
        names[node] = name
    return names


def _build_stage(cross: _Crossing, index: int) -> StageGraph:
    flow, last = cross.flow, index == cross.last
    own = [n for n in flow.nodes if cross.stage_of.get(n) == index]
    leaving = {
        p.name: n for p in flow.trace.ports if cross.place(n := flow.trace.port_node(p)) == index
    }
    results = cross.returned if last else [n for n in own if n in cross.users]
    needed = _needed(flow, own, [*results, *leaving.values()])
    incoming = [n for n in needed if n.op == "placeholder" or cross.stage_of.get(n, index) != index]
    graph, attributes, copies = _copy_nodes(cross, own, needed, incoming)
    sent = tuple(copies[n] for n in leaving.values())
    if last:
        whole = _rebuilt(graph, flow.trace, copies)
        graph.output((whole, *sent) if sent else whole)
    else:
        graph.output((*(copies[n] for n in results), *sent))
    graph.lint()
    read = {p for n in set(needed).difference(incoming) for p in n.meta.get("parameters", ())}
    outputs = (OUTPUT,) if last else tuple(cross.names[n] for n in results)
    return StageGraph(
        index=index,
        module=fx.GraphModule(attributes, graph, f"Stage{index}"),
        inputs=tuple(cross.label(n) for n in incoming),
        outputs=(*outputs, *leaving),
        parameters=tuple(n for n, _ in flow.trace.model.named_parameters() if n in read),
        nodes=len(own),
        called=tuple(sorted({str(n.target) for n in own if n.op == "call_module"})),
    )


def _copy_nodes(
    cross: _Crossing, own: list[fx.Node], needed: list[fx.Node], incoming: list[fx.Node]
) -> tuple[fx.Graph, dict[str, Any], dict[fx.Node, fx.Node]]:
    """A stage's graph without its output, what its targets stand for, and the copy of each node."""
    flow = cross.flow
    written = {s for n in own for s in n.meta.get("mutates", ())} - kept_storages(flow.nodes)
    targets = targets_of(own, needed)
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in incoming:
        label = identifier(cross.label(node))
        while any(label == copy.target for copy in copies.values()):
            label += "_"
        copies[node] = graph.placeholder(label)
        copies[node].meta = {"traced": node}
    for node in incoming:  # the producer's copy of what is written to stays as it was sent
        if node.op != "placeholder" and node.meta.get("storage") in written:
            copies[node] = graph.call_method("clone", (copies[node],))
    opened: list[Opened] = []
    for node in (n for n in needed if n not in copies):
        target = str(node.target)
        if node.op == "get_attr":
            copies[node] = graph.create_node("get_attr", targets[node], name=node.name)
        else:
            enter_regions(graph, opened, node)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = {"traced": node}
        if node in targets:
            copies[node].target = targets[node]
            attributes[targets[node]] = flow.trace.attributes[target]
        if not all(map(is_plain_name, node.kwargs)):
            copies[node] = with_named(copies[node])
    enter_regions(graph, opened, None)
    return graph, attributes, copies


def _rebuilt(graph: fx.Graph, trace: Trace, copies: dict[fx.Node, fx.Node]) -> Any:
    """The model's own output, put together from its leaves."""
    leaves = tuple(copies[a] if isinstance(a, fx.Node) else a for a in trace.output_leaves)
    if trace.outputs.kind == "leaf":
        return leaves[0]
    return graph.call_function(Rebuild(trace.outputs), leaves)


def _needed(flow: Flow, own: list[fx.Node], results: list[fx.Node]) -> list[fx.Node]:
    """The stage's nodes, the replicated nodes, attributes and inputs that they use, in program
    order.
    """
    found: dict[fx.Node, None] = dict.fromkeys(own)
    pending = [*own, *results]
    inside = set(own)
    while pending:
        node = pending.pop()
        found[node] = None
        if node in inside or node in flow.replicated:
            pending.extend(n for n in node.all_input_nodes if n not in found)
    return sorted(found, key=lambda n: flow.index[n])
