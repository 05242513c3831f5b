"""Writes each stage's training function as an fx graph: forward, sources, pull-back.

Four graph modules come out of the same two halves:

* ``forward``: from a dict of values to ``(outputs, leaves, entries)``, all with their autograd
  graph;
* ``backward``: from those, with gradients for the outputs and partial gradients for the inputs, to
  input gradients; it may keep the graph for another call;
* ``step``: both in one, with the stage's sources in between, for training without waiting; and
  ``step_unheard`` for a batch where nobody hears of its inputs' gradients.

How bits are kept: the stage's input is a view of a leaf, ``value = leaf.view()``, and ``value`` is
a root of the pull-back besides the outputs, with what later stages already sent for it as
cotangent, so that autograd adds partial gradients in the order in which it would add them without
cuts.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...runtime.emitted import Leaf, StepResult, detached, evaluate, pull_back
from ...sources import GradientSource, serve
from ..trace.nodes import identifier, safe_targets
from .splitting import OUTPUT, Split

_PREFIXES = re.compile(r"dni_fx_runtime_emitted_|^import .*\n|^from .*\n", re.MULTILINE)


Nodes = dict[str, fx.Node]


class StageFunctions:
    """The emitted functions of one stage, each written when it is first asked for; see the module's
    docstring.

    The stage's module, its shared parameters and its sources are in them by reference.

    Args:
        split: all stages and what crosses.
        index: of the stage.
        sources: the gradient source of each interface, by interface name.
    """

    def __init__(self, split: Split, index: int, sources: Mapping[str, GradientSource]) -> None:
        stage = split.stages[index]
        self._stage = stage
        self._served = serve([i for i in split.interfaces if i.name in stage.outputs], sources)
        self._shared = split.summed_in(index)
        self._received, self._sent = split.received_in(index), split.sent_by(index)
        self._unasked = split.unasked
        self._seen = [
            None if s.source.asks.inputs is None else split.seen_by(index, s.source.asks.inputs)
            for s in self._served
        ]

    @functools.cached_property
    def _source_targets(self) -> list[str]:
        """Where a step keeps its sources."""
        keys = (f"sources.{source_key(group.name)}" for group in self._served)
        return list(safe_targets(keys).values())

    @functools.cached_property
    def forward(self) -> fx.GraphModule:
        """``inputs -> (outputs, leaves, entries)``."""
        graph = fx.Graph()
        values, leaves = self._open_inputs(graph, graph.placeholder("inputs"), self._received, True)
        outputs = self._run_stage(graph, values)
        graph.output((outputs, leaves, {name: values[name] for name in self._received}))
        return fx.GraphModule({"stage": self._stage.module}, graph, f"Forward{self._stage.index}")

    @functools.cached_property
    def backward(self) -> fx.GraphModule:
        """``(outputs, leaves, entries, gradients, partials, retain_graph=False) -> input
        gradients``.
        """
        graph = fx.Graph()
        outputs, leaves, entries, gradients, partials = (
            graph.placeholder(n) for n in ("outputs", "leaves", "entries", "gradients", "partials")
        )
        retain = graph.placeholder("retain_graph", default_value=False)
        names = [*self._sent, *(["loss"] if OUTPUT in self._stage.outputs else [])]
        roots = [_item(graph, outputs, n) for n in names]
        roots += [_item(graph, entries, n) for n in self._received]
        targets = safe_targets(f"shared.{name}" for name in self._shared)
        roots += [graph.create_node("get_attr", target) for target in targets.values()]
        arrived = [graph.call_method("get", (gradients, n)) for n in names]
        arrived += [graph.call_method("get", (partials, n)) for n in self._received]
        arrived += [graph.call_method("get", (partials, n)) for n in self._shared]
        graph.call_function(pull_back, (tuple(roots), tuple(arrived), retain))
        graph.output(_gradients(graph, {n: _item(graph, leaves, n) for n in self._received}))
        shared = dict(zip(targets.values(), self._shared.values(), strict=True))
        return fx.GraphModule(shared, graph, f"Backward{self._stage.index}")

    @functools.cached_property
    def step(self) -> fx.GraphModule:
        """``(inputs, context, loss, target) -> StepResult``."""
        return self._write_step(self._received)

    @functools.cached_property
    def step_unheard(self) -> fx.GraphModule:
        """The same without gradients of what was received."""
        return self._write_step([])

    def _write_step(self, heard: Sequence[str]) -> fx.GraphModule:
        graph = fx.Graph()
        inputs = graph.placeholder("inputs")
        context, loss, target = (
            graph.placeholder(n, default_value=None) for n in ("context", "loss", "target")
        )
        values, leaves = self._open_inputs(graph, inputs, heard)
        outputs = self._run_stage(graph, values)
        results: Nodes = {}
        last: list[tuple[fx.Node, fx.Node]] = []
        loss_sent = None
        if OUTPUT in outputs:
            output = outputs.pop(OUTPUT)
            value = _call(graph, "loss_value", evaluate, loss, output, target)
            last = [(value, _call(graph, "loss_gradient", torch.ones_like, value))]
            results[OUTPUT] = _call(graph, "output_sent", detached, output)
            loss_sent = _call(graph, "loss_sent", detached, value)
        for name, out in outputs.items():
            detaches = name in self._sent or name in self._unasked
            label = f"{identifier(name)}_sent"
            results[name] = _call(graph, label, "detach", out) if detaches else out
        predictions, gradients = self._ask_sources(graph, results, context, inputs)
        pairs = [*((outputs[n], gradients[n]) for n in self._sent), *last]
        roots, arrived = tuple(r for r, _ in pairs), tuple(g for _, g in pairs)
        graph.call_function(pull_back, (roots, arrived))
        result = (results, _gradients(graph, leaves), predictions, loss_sent)
        graph.output(graph.call_function(StepResult, result))
        sources = [group.source for group in self._served]
        own = dict(zip(self._source_targets, sources, strict=True))
        attributes = {"stage": self._stage.module, **own}
        return fx.GraphModule(attributes, graph, f"Step{self._stage.index}")

    def _open_inputs(
        self, graph: fx.Graph, inputs: fx.Node, heard: Sequence[str], *keep_layout: bool
    ) -> tuple[Nodes, Nodes]:
        """The stage's inputs by name, and the leaf of each whose gradient is heard of."""
        values, leaves = {}, {}
        for name in self._stage.inputs:
            label = identifier(name)
            if name not in heard:
                values[name] = _item(graph, inputs, name, label)
                continue
            received = _item(graph, inputs, name, f"{label}_received")
            leaves[name] = _call(graph, f"{label}_leaf", Leaf, received, *keep_layout)
            values[name] = _call(graph, label, "view", leaves[name])
        return values, leaves

    def _run_stage(self, graph: fx.Graph, values: Nodes) -> Nodes:
        stage = self._stage
        given = tuple(values[n] for n in stage.inputs)
        whole = stage.outputs == (OUTPUT,)
        label = OUTPUT if whole else "outputs"
        called = graph.create_node("call_module", "stage", given, name=label)
        if whole:
            return {OUTPUT: called}
        return {n: _item(graph, called, i, identifier(n)) for i, n in enumerate(stage.outputs)}

    def _ask_sources(
        self, graph: fx.Graph, values: Nodes, context: fx.Node, inputs: fx.Node
    ) -> tuple[Nodes, Nodes]:
        """What each source predicts, by its own name, and the gradient of each value that it
        serves.
        """
        predictions, gradients = {}, {}
        triples = zip(self._served, self._source_targets, self._seen, strict=True)
        for group, target, seen in triples:
            label = identifier(group.name)
            given: tuple[Any, ...] = (tuple(values[n] for n in group.names), context)
            if seen is not None:
                items = [_item(graph, inputs, n, f"{identifier(n)}_seen") for n in seen]
                given = (*given, tuple(items))
            asked = graph.create_node("call_module", target, given, name=f"{label}_prediction")
            predictions[group.name] = asked
            every = _call(graph, f"{label}_gradients", getattr, asked, "gradients")
            for i, name in enumerate(group.names):
                gradients[name] = _item(graph, every, i, f"{identifier(name)}_gradient")
        return predictions, gradients


def emit_functions(
    split: Split, sources: Mapping[str, GradientSource]
) -> tuple[StageFunctions, ...]:
    """The training functions of every stage; see :class:`StageFunctions`."""
    return tuple(StageFunctions(split, stage.index, sources) for stage in split.stages)


def readable_code(module: fx.GraphModule) -> str:
    """The source of an emitted function without module prefixes and housekeeping."""
    code = _PREFIXES.sub("", module.code)
    code = re.sub(r";  (\w+ = )+None", "", code)
    code = re.sub(r"^(\s+)\w+ = pull_back\(", r"\1pull_back(", code, flags=re.MULTILINE)
    code = re.sub(r"(\w+) = StepResult\((.*)\)\n(\s+)return \1", r"return StepResult(\2)", code)
    return code.strip() + "\n"


def source_key(interface: str) -> str:
    """The name of an interface's source in a module table, which may hold no dots and no names of
    its own (``to``).
    """
    key = interface.replace(".", "/")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def _gradients(graph: fx.Graph, leaves: Nodes) -> Nodes:
    return {
        name: _call(graph, f"{identifier(name)}_input_gradient", "gradient", leaf)
        for name, leaf in leaves.items()
    }


def _call(graph: fx.Graph, name: str, what: Callable[..., Any] | str, *args: Any) -> fx.Node:
    """A call of a function, or of a method of the first argument, under a name that is free and
    allowed.
    """
    op = "call_method" if isinstance(what, str) else "call_function"
    return graph.create_node(op, what, args, name=name)


def _item(graph: fx.Graph, container: fx.Node, key: str | int, name: str | None = None) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (container, key), name=name)
