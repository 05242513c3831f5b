"""Writes each stage's training function as an fx graph: forward, sources, pull-back.

Three graph modules come out of the same two halves:

* ``forward``: from a dict of values to ``(outputs, leaves, entries)``, all with their autograd
  graph;
* ``backward``: from those, with gradients for the outputs and partial gradients for the inputs, to
  input gradients; it may keep the graph for another call;
* ``step``: both in one, with the stage's sources in between, for training without waiting.

How bits are kept: the stage's input is a view of a leaf, ``value = leaf.view()``, and ``value`` is
a root of the pull-back besides the outputs, with what later stages already sent for it as
cotangent, so that autograd adds partial gradients in the order in which it would add them without
cuts.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ...runtime.emitted import Leaf, StepResult, detached, evaluate, pull_back
from ...sources import GradientSource, Served, serve
from ..trace.nodes import identifier, safe_targets
from .splitting import OUTPUT, Split, StageGraph

_PREFIXES = re.compile(r"dni_fx_runtime_emitted_|^import .*\n|^from .*\n", re.MULTILINE)


class StageFunctions:
    """The emitted functions of one stage, each written when it is first asked for; see the module's
    docstring.
    """

    def __init__(self, split: Split, index: int, sources: Mapping[str, GradientSource]) -> None:
        self._stage = split.stages[index]
        self._served = serve(
            [i for i in split.interfaces if i.name in self._stage.outputs], sources
        )
        self._shared = split.summed_in(index)
        self._received, self._sent = split.received_in(index), split.sent_by(index)
        self._unasked = split.unasked

    @functools.cached_property
    def forward(self) -> fx.GraphModule:
        """``inputs -> (outputs, leaves, entries)``."""
        return _emit_forward(self._stage, self._received)

    @functools.cached_property
    def backward(self) -> fx.GraphModule:
        """``(outputs, leaves, entries, gradients, partials, retain_graph=False) -> input
        gradients``.
        """
        return _emit_backward(self._stage, self._received, self._sent, self._shared)

    @functools.cached_property
    def step(self) -> fx.GraphModule:
        """``(inputs, context, loss, target) -> StepResult``."""
        return _emit_step(self._stage, self._received, self._sent, self._unasked, self._served)


def emit_functions(
    split: Split, sources: Mapping[str, GradientSource]
) -> tuple[StageFunctions, ...]:
    """Emit the training functions of every stage.

    Args:
        split: all stages and what crosses.
        sources: the gradient source of each interface, by interface name.

    Returns:
        New graph modules; the stages' modules and the sources are in them by reference.
    """
    return tuple(StageFunctions(split, stage.index, sources) for stage in split.stages)


def readable_code(module: fx.GraphModule) -> str:
    """The source of an emitted function without module prefixes and housekeeping."""
    code = _PREFIXES.sub("", module.code)
    code = re.sub(r";  (\w+ = )+None", "", code)
    code = re.sub(r"^(\s+)\w+ = pull_back\(", r"\1pull_back(", code, flags=re.MULTILINE)
    code = re.sub(r"(\w+) = StepResult\((.*)\)\n(\s+)return \1", r"return StepResult(\2)", code)
    return code.strip() + "\n"


def _emit_forward(stage: StageGraph, received: list[str]) -> fx.GraphModule:
    graph = fx.Graph()
    values, leaves = _open_inputs(
        graph, graph.placeholder("inputs"), stage, received, keep_layout=True
    )
    outputs = _run_stage(graph, stage, values)
    graph.output((outputs, leaves, {name: values[name] for name in received}))
    return fx.GraphModule({"stage": stage.module}, graph, f"Forward{stage.index}")


def _emit_backward(
    stage: StageGraph, received: list[str], sent: list[str], shared: dict[str, nn.Parameter]
) -> fx.GraphModule:
    graph = fx.Graph()
    outputs, leaves, entries, gradients, partials = (
        graph.placeholder(n) for n in ("outputs", "leaves", "entries", "gradients", "partials")
    )
    retain = graph.placeholder("retain_graph", default_value=False)
    names = [*sent, *(["loss"] if OUTPUT in stage.outputs else [])]
    roots = [_item(graph, outputs, n) for n in names] + [_item(graph, entries, n) for n in received]
    targets = safe_targets(f"shared.{name}" for name in shared)
    roots += [graph.create_node("get_attr", target) for target in targets.values()]
    arrived = [graph.call_method("get", (gradients, n)) for n in names]
    arrived += [graph.call_method("get", (partials, n)) for n in [*received, *shared]]
    graph.call_function(pull_back, (tuple(roots), tuple(arrived), retain))
    graph.output(_gradients(graph, {n: _item(graph, leaves, n) for n in received}))
    attributes = dict(zip(targets.values(), shared.values(), strict=True))
    return fx.GraphModule(attributes, graph, f"Backward{stage.index}")


def _emit_step(
    stage: StageGraph,
    received: list[str],
    sent: list[str],
    unasked: tuple[str, ...],
    served: tuple[Served, ...],
) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = graph.placeholder("inputs")
    context, loss, target = (
        graph.placeholder(n, default_value=None) for n in ("context", "loss", "target")
    )
    values, leaves = _open_inputs(graph, inputs, stage, received)
    outputs = _run_stage(graph, stage, values)
    results: dict[str, fx.Node] = {}
    roots: list[fx.Node] = []
    gradients: list[fx.Node] = []
    value_out = None
    if OUTPUT in outputs:
        output = outputs.pop(OUTPUT)
        value = _named(graph, evaluate, (loss, output, target), "loss_value")
        roots.append(value)
        gradients.append(_named(graph, torch.ones_like, (value,), "loss_gradient"))
        results[OUTPUT] = _named(graph, detached, (output,), "output_sent")
        value_out = _named(graph, detached, (value,), "loss_sent")
    for name, out in outputs.items():
        results[name] = out
        if name in sent or name in unasked:
            label = f"{identifier(name)}_sent"
            results[name] = _named(graph, "detach", (out,), label)
    predictions, found = _ask_sources(graph, served, results, context)
    roots = [*(outputs[n] for n in sent), *roots]
    gradients = [*(found[n] for n in sent), *gradients]
    graph.call_function(pull_back, (tuple(roots), tuple(gradients)))
    result = (results, _gradients(graph, leaves), predictions, value_out)
    graph.output(graph.call_function(StepResult, result))
    sources = [group.source for group in served]
    attributes = dict(zip(_source_targets(served), sources, strict=True))
    return fx.GraphModule({"stage": stage.module, **attributes}, graph, f"Step{stage.index}")


def _ask_sources(
    graph: fx.Graph, served: tuple[Served, ...], values: dict[str, fx.Node], context: fx.Node
) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
    """What each source predicts, by its own name, and the gradient of each value that it serves."""
    predictions, gradients = {}, {}
    for group, target in zip(served, _source_targets(served), strict=True):
        given = (tuple(values[n] for n in group.names), context)
        label = identifier(group.name)
        prediction = graph.create_node("call_module", target, given, name=f"{label}_prediction")
        predictions[group.name] = prediction
        every = _named(graph, getattr, (prediction, "gradients"), f"{label}_gradients")
        for i, name in enumerate(group.names):
            gradients[name] = _item(graph, every, i, f"{identifier(name)}_gradient")
    return predictions, gradients


def _source_targets(served: tuple[Served, ...]) -> list[str]:
    """Where a step keeps its sources."""
    return list(safe_targets(f"sources.{source_key(group.name)}" for group in served).values())


def source_key(interface: str) -> str:
    """The name of an interface's source in a module table, which may hold no dots and no names of
    its own (``to``).
    """
    key = interface.replace(".", "/")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def _open_inputs(
    graph: fx.Graph,
    inputs: fx.Node,
    stage: StageGraph,
    received: list[str],
    keep_layout: bool = False,
) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
    values, leaves = {}, {}
    kept = (True,) if keep_layout else ()
    for name in stage.inputs:
        label = identifier(name)
        values[name] = _item(
            graph, inputs, name, label if name not in received else f"{label}_received"
        )
        if name in received:
            leaves[name] = _named(graph, Leaf, (values[name], *kept), f"{label}_leaf")
            values[name] = _named(graph, "view", (leaves[name],), label)
    return values, leaves


def _run_stage(
    graph: fx.Graph, stage: StageGraph, values: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    given = tuple(values[n] for n in stage.inputs)
    label = OUTPUT if stage.outputs == (OUTPUT,) else "outputs"
    called = graph.create_node("call_module", "stage", given, name=label)
    if stage.outputs == (OUTPUT,):
        return {OUTPUT: called}
    return {n: _item(graph, called, i, identifier(n)) for i, n in enumerate(stage.outputs)}


def _gradients(graph: fx.Graph, leaves: dict[str, fx.Node]) -> dict[str, fx.Node]:
    found = {}
    for name, leaf in leaves.items():
        found[name] = _named(graph, "gradient", (leaf,), f"{identifier(name)}_input_gradient")
    return found


def _named(graph: fx.Graph, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
    """A call of a function, or of a method by its name, under a name that is free and allowed."""
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(op, target, args, name=name)


def _item(graph: fx.Graph, container: fx.Node, key: str | int, name: str | None = None) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (container, key), name=name)
