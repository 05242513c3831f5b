"""A stage as a file: its module, its sources, and the function that trains both on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..graphs.variants import Variant
from ..passes.cut.splitting import OUTPUT, StageGraph
from ..passes.trace.nodes import Graph, Node, identifier
from ..sources import Served
from .attributes import class_lines
from .bodies import Body, type_of
from .classes import Classes, GraphWriter, method_lines
from .scopes import live_nodes, traced
from .sources import Written, write_source
from .text import docstring, free_name


@dataclass(frozen=True)
class Asked:
    """One source of a stage.

    Attributes:
        group: the source, and what it serves.
        name: the attribute of the stage's sources that it is.
        written: its text.
    """

    group: Served
    name: str
    written: Written

    @property
    def learns(self) -> bool:
        """Whether it hears what comes back."""
        return self.written.kind in ("regression", "joint", "window")


@dataclass
class StageFile:
    """One stage as it is written.

    Attributes:
        index: of the stage.
        labels: what each value is called in code, by its name in the plan.
        inputs: names of what it takes, in order.
        kinds: types of these.
        received: those of them that a gradient is sent back for.
        outputs: names of what it sends, in order; empty for the last stage.
        sent: those of them that a gradient comes back for, in the order of the backward.
        sources: what it asks.
        takes_context: whether a source of it sees the context.
        is_last: whether it holds the model's output.
        returns_tensor: whether that is a tensor.
        tensors: of the stage and of its sources, by key.
        lines: its own classes and functions, each a list of lines.
        imports: besides torch's.
        names: of the classes in it.
        uses: names of the kit.
    """

    index: int
    labels: Mapping[str, str]
    inputs: tuple[str, ...]
    kinds: tuple[str, ...]
    received: list[str]
    outputs: tuple[str, ...]
    sent: list[str]
    sources: list[Asked]
    is_last: bool
    returns_tensor: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)
    source_tensors: dict[str, Tensor] = field(default_factory=dict)
    lines: list[list[str]] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)

    @property
    def takes_context(self) -> bool:
        """Whether a source of it sees the context."""
        return any(a.written.takes_context for a in self.sources)

    @property
    def asks_state(self) -> bool:
        """Whether a source of it must know that a sequence ends."""
        return any(a.written.kind == "window" for a in self.sources)

    @property
    def holds_sources(self) -> bool:
        """Whether there is anything to its sources."""
        return any(a.written.expression for a in self.sources)

    @property
    def wanted(self) -> list[str]:
        """Names of the arguments of ``step`` besides modules and values."""
        told = {"context": self.takes_context, "target": self.is_last, "done": self.asks_state}
        return [name for name, is_wanted in told.items() if is_wanted]


def label_values(variant: Variant) -> dict[str, str]:
    """What each value that crosses is called in code, by its name in the plan."""
    taken = ["context", "done", "target", "stage", "sources", "loss", "output", "gradient_of"]
    labels: dict[str, str] = {}
    split = variant.split
    for name in dict.fromkeys([*split.model_inputs, *(n for s in split.stages for n in s.outputs)]):
        word = identifier(name) if not name[:1].isdigit() else f"layer_{identifier(name)}"
        labels[name] = free_name(word.replace("__", "_"), [*taken, *labels.values()])
    return labels


def write_stage(
    variant: Variant,
    stage: StageGraph,
    served: Sequence[Served],
    labels: Mapping[str, str],
    loss: str,
    classes: Classes,
) -> StageFile:
    """Write one stage.

    Args:
        variant: the graph that it is a stage of.
        stage: its subgraph.
        served: the sources that it asks.
        labels: as of :func:`label_values`.
        loss: the expression of the loss of ``output`` and ``target``.
        classes: where classes of modules are registered.
    """
    split = variant.split
    is_last = OUTPUT in stage.outputs
    graph = stage.module.graph
    results: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    results = results if isinstance(results, tuple) else (results,)
    results = results[0] if len(results) == 1 else results
    places = [n for n in graph.nodes if n.op == "placeholder"]
    returned = results if isinstance(results, tuple) else (results,)
    writer = GraphWriter(graph, variant.trace, variant.trace.model, returned, classes)
    given = {n: labels[name] for n, name in zip(places, stage.inputs, strict=True)}
    held, body = writer.written(given, results)
    sources = [
        Asked(g, labels[g.name], write_source(g, classes))
        for g in served
        if g.producer == stage.index
    ]
    made = StageFile(
        index=stage.index,
        labels=labels,
        inputs=stage.inputs,
        kinds=tuple(map(type_of, places)),
        received=split.received_in(stage.index),
        outputs=tuple(n for n in stage.outputs if n != OUTPUT),
        sent=split.sent_by(stage.index),
        sources=sources,
        is_last=is_last,
        returns_tensor=body.returns[1].removeprefix("tuple[").split(",")[0] == "Tensor",
        tensors=dict(held.tensors),
    )
    for asked in sources:
        made.uses.update(asked.written.uses)
        found = asked.written.tensors.items()
        made.source_tensors |= {f"{asked.name}.{k}": t for k, t in found}
    made.imports |= writer.imports
    kind = type(variant.trace.model).__name__
    about = f"Stage {stage.index} of ``{kind}``: {_flow(made)}."
    made.lines = [class_lines(about, held, method_lines("forward", body))]
    made.lines[0] = [line.replace("\0", f"Stage{stage.index}") for line in made.lines[0]]
    if made.holds_sources:
        made.lines.append(_source_lines(made))
    made.lines.append(_result_lines(made, body))
    made.lines.append(_step_lines(made, body, loss, _needs_views(graph, places, returned)))
    return made


def _flow(made: StageFile) -> str:
    """What goes in and comes out, in words."""
    inputs = ", ".join(f"``{made.labels[n]}``" for n in made.inputs)
    outputs = ", ".join(f"``{made.labels[n]}``" for n in made.outputs)
    outputs = ", ".join(part for part in (outputs, "the output" if made.is_last else "") if part)
    return f"{inputs} to {outputs}"


def _source_lines(made: StageFile) -> list[str]:
    lines = [f"class Sources{made.index}(nn.Module):"]
    lines += docstring(f"What stands in for the stages behind stage {made.index}.")
    lines += ["", "    def __init__(self) -> None:", "        super().__init__()"]
    held = [a for a in made.sources if a.written.expression]
    return lines + [f"        self.{a.name} = {a.written.expression}" for a in held]


def state_type(asked: Asked) -> str:
    """The type of what a source says about its values."""
    return "Sequence[Tensor]" if asked.written.kind == "joint" else "Tensor"


def _result_lines(made: StageFile, body: Body) -> list[str]:
    """What ``step`` returns, as a dataclass."""
    lines = ["@dataclass", f"class Result{made.index}:"]
    lines += [*docstring(f"What one step of stage {made.index} gives: values and gradients."), ""]
    kinds = _output_kinds(made, body)
    lines += [f"    {made.labels[n]}: {kinds[n]}" for n in made.outputs]
    lines += [f"    {made.labels[n]}_gradient: Tensor" for n in made.received]
    lines += [f"    {a.name}_said: {state_type(a)}" for a in made.sources if a.learns]
    if made.is_last:
        lines += ["    loss: Tensor", f"    output: {'Tensor' if made.returns_tensor else 'Any'}"]
    return lines


def _output_kinds(made: StageFile, body: Body) -> dict[str, str]:
    returned = body.returns[1]
    inside = returned.removeprefix("tuple[").removesuffix("]").split(", ")
    kinds = inside if returned.startswith("tuple[") and len(made.outputs) > 1 else [returned]
    kinds = kinds[-len(made.outputs) :] if made.outputs else []
    return dict(zip(made.outputs, kinds, strict=True))


def _step_lines(made: StageFile, body: Body, loss: str, views: bool) -> list[str]:
    """The function that runs the stage and pulls back what its sources say."""
    own = [f"stage: Stage{made.index}"]
    own += [f"sources: Sources{made.index}"] if made.holds_sources else []
    own += [f"{made.labels[n]}: {k}" for n, k in zip(made.inputs, made.kinds, strict=True)]
    own += ["context: Tensor"] if made.takes_context else []
    own += ["target: Any"] if made.is_last else []
    own += ["done: bool"] if made.asks_state else []
    lines = [f"def step(\0{', '.join(own)}) -> Result{made.index}:".replace("\0", "")]
    lines += docstring("Run the stage and pull back; gradients are added to those that are there.")
    label = made.labels
    lines += [f"    {label[n]} = {label[n]}.detach().requires_grad_()" for n in made.received]
    lines += _call_lines(made, views)
    if made.is_last:
        lines.append(f"    loss = {loss}")
    pairs = [(label[n], f"{label[n]}_gradient") for n in made.sent]
    lines += _ask_lines(made)
    if made.is_last:
        pairs.append(("loss", "torch.ones_like(loss)"))
    if len(pairs) == 1:
        value, gradient = pairs[0]
        told = value if made.is_last else f"{value}, {gradient}"
        lines.append(f"    torch.autograd.backward({told})")
    elif pairs:
        values, gradients = ", ".join(v for v, _ in pairs), ", ".join(g for _, g in pairs)
        lines.append(f"    torch.autograd.backward(({values}), ({gradients}))")
    return [*lines, f"    return Result{made.index}({', '.join(_result(made, body))})"]


def _call_lines(made: StageFile, views: bool) -> list[str]:
    """The stage's forward. Written to, a leaf of a graph must be a view."""
    label = made.labels
    seen = [f".view_as({label[n]})" if views and n in made.received else "" for n in made.inputs]
    given = ", ".join(f"{label[n]}{v}" for n, v in zip(made.inputs, seen, strict=True))
    names = [*(["output"] if made.is_last else []), *(label[n] for n in made.outputs)]
    text = f"    {', '.join(names)} = stage({given})"
    note = "  # views, since the stage writes into what it is given"
    return [text + (note if any(seen) and len(text + note) <= 100 else "")]


def _ask_lines(made: StageFile) -> list[str]:
    lines = []
    for asked in made.sources:
        values = [made.labels[n] for n in asked.group.names]
        gradients = [f"{v}_gradient" for v in values]
        detached = [f"{v}.detach()" for v in values]
        more = ", context" if asked.written.takes_context else ""
        call = f"sources.{asked.name}.predict"
        if asked.written.kind == "regression":
            left = f"{gradients[0]}, {asked.name}_said"
            lines.append(f"    {left} = {call}({detached[0]}{more})")
        elif asked.written.kind == "zero":
            lines.append(f"    {_targets(gradients)} = no_gradients({', '.join(detached)})")
        elif asked.written.kind == "head":
            told = f"{call}([{', '.join(detached)}]{more})"
            lines.append(f"    {_targets(gradients)} = {told}")
        else:
            left = f"{_bracketed(gradients)}, {asked.name}_said"
            more = f", done{more}" if asked.written.kind == "window" else more
            lines.append(f"    {left} = {call}([{', '.join(detached)}]{more})")
    return lines


def _targets(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) > 1 else f"({names[0]},)"


def _bracketed(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"


def _result(made: StageFile, body: Body) -> list[str]:
    """The arguments of the result, in the order of its fields."""
    kinds = _output_kinds(made, body)
    found = [f"{made.labels[n]}{'.detach()' * (kinds[n] == 'Tensor')}" for n in made.outputs]
    found += [f"gradient_of({made.labels[n]})" for n in made.received]
    made.uses.update(["gradient_of"] if made.received else [])
    found += [f"{a.name}_said" for a in made.sources if a.learns]
    if made.is_last:
        found += ["loss.detach()", "output" + ".detach()" * made.returns_tensor]
    return found


def _needs_views(graph: Graph, places: Sequence[Node], returned: Sequence[Any]) -> bool:
    """Whether a stage may write into what it is given, or gives it back."""
    nodes = live_nodes(graph, [r for r in returned if isinstance(r, Node)])
    return any(traced(n).meta.get("mutates") for n in nodes) or any(r in places for r in returned)
