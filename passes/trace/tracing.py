"""From a model and example inputs to a graph: a ladder of tracers, from the most faithful to the
last resort.

1. ``trace_calls``: record torch functions and leaf modules (see ``_recorder``) on fake tensors,
   then on real ones; a submodule that cannot be looked into becomes one opaque node.
2. ``trace_export`` (in ``exporting``): ``torch.export`` (non-strict, batch dimension dynamic),
   whose operators are then recorded likewise.

Which rung to believe is for the numeric self-check (``checking``) to say.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import BakedInError, DataDependentError, TracingError, user_line
from ...graphs.nested import Structure, flatten
from .recorder import Recorder, recording
from .state import untouched
from .symbols import Size, TracedInt, sizes_wanted

_MOST_OPAQUE = 200
SMALL = 1 << 22  # elements of parameters and inputs


@dataclass(frozen=True)
class Port:
    """A value that leaves the graph for the next window or for another network.

    Attributes:
        name: of the interface.
        index: which of the output node's arguments it is; those after the model's own output.
        feeds: as in :class:`dni_fx.plan.Interface`.
        batch_dim: dimension of the batch.
    """

    name: str
    index: int
    feeds: str
    batch_dim: int = 0


@dataclass
class Trace:
    """A traced model.

    Attributes:
        graph: nodes with the facts listed in ``_recorder`` in their ``meta``; never changed after
            tracing.
        model: the user's model.
        attributes: what ``call_module`` and ``get_attr`` targets stand for, by reference.
        inputs: structure of ``(args, kwargs)``; its leaves are the placeholders, in order.
        outputs: structure of the result; its leaves are the arguments of the output node.
        guards: nodes whose value, if it differs for other inputs, makes this graph invalid for
            them.
        calls: module path, output node and last node made in it, in the order in which modules
            returned.
        modes: modules whose ``training`` flag this graph holds fast.
        rung: which tracer made the graph: ``"calls"``, ``"calls on real tensors"`` or ``"export"``.
        opaque: paths of modules kept as one node because they could not be looked into, with the
            reason.
        notes: further remarks for the plan.
        ports: values that leave the graph besides the output.
        incoming: names of the placeholders that such values arrive at and gradients leave from.
    """

    graph: fx.Graph
    model: nn.Module
    attributes: dict[str, Any]
    inputs: Structure
    outputs: Structure
    guards: tuple[tuple[fx.Node, Any], ...]
    calls: tuple[tuple[str, fx.Node | None, fx.Node], ...]
    modes: tuple[nn.Module, ...]
    rung: str
    opaque: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    incoming: tuple[str, ...] = ()

    @property
    def output_leaves(self) -> tuple[Any, ...]:
        """What the model's own output is made of: nodes, or constants."""
        leaves: Any = next(reversed(self.graph.nodes)).args[0]
        return tuple(leaves[: self.outputs.leaf_count])

    def port_node(self, port: Port) -> fx.Node:
        """The node whose value leaves."""
        leaves: Any = next(reversed(self.graph.nodes)).args[0]
        node: fx.Node = leaves[port.index]
        return node

    @property
    def digest(self) -> str:
        """Hash of nodes, operators and edges; equal for equal graphs in every process."""
        text = "\n".join(
            f"{n.name} {n.op} {self._target_name(n)} {_signature(n.args)} {_signature(n.kwargs)}"
            for n in self.graph.nodes
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _target_name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            kind = type(self.attributes[str(node.target)])
            return f"{node.target}:{kind.__module__}.{kind.__qualname__}"
        if isinstance(node.target, str):
            return node.target
        module = getattr(node.target, "__module__", "")
        return f"{module}.{getattr(node.target, '__name__', node.target)}"


def trace_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Record the model's functions and leaf modules on fake tensors, else on real ones.

    Args:
        model: any module, in the mode in which it is to run.
        args: example positional inputs, nested as the model takes them.
        kwargs: example keyword inputs.

    Returns:
        The trace. The model, its buffers and the random state are as they were.

    Raises:
        TracingError: the model as a whole cannot be recorded; says why and where.
    """
    opaque: dict[str, str] = {}
    plain: frozenset[Size] = frozenset()
    real = small = _is_small(model, args, kwargs)
    while True:
        with untouched(model):
            recorder = Recorder(
                model,
                None if real else FakeTensorMode(allow_non_fake_inputs=True),
                frozenset(opaque),
                plain,
            )
            try:
                trace = record(recorder, model, args, kwargs, opaque)
            except Exception as error:
                if wanted := sizes_wanted(error):
                    plain |= wanted
                    continue
                if real and small and isinstance(error, DataDependentError):
                    real = small = (
                        # code that asks whether it is traced knows fake tensors, and reads no
                        # values
                        False
                    )
                    opaque.clear()
                    continue
                place, reason = recorder.failed_at, reason_of(error)
                is_leaf = recorder.failed_leaf
                if place and not is_leaf and place not in opaque and len(opaque) < _MOST_OPAQUE:
                    opaque[place] = reason
                    continue
                if real and small:  # fake tensors cannot do more here than real ones
                    small = False
                if not real and not (
                    isinstance(error, DataDependentError | BakedInError) and not is_leaf
                ):
                    real = True
                    continue
                if is_leaf and place and not isinstance(error, TracingError):
                    raise TracingError(
                        f"'{place}' ({type(model.get_submodule(place)).__name__}) fails: {reason}"
                    ) from error
                outer = _next_outer(model, place, opaque) if place else None
                if outer is None:
                    kind = BakedInError if isinstance(error, BakedInError) else TracingError
                    raise kind(
                        f"the top level of {type(model).__name__} cannot be recorded: {reason}"
                    ) from error
                opaque[outer] = reason
                continue
        if real and not small:
            trace.rung = "calls on real tensors"
        bind_originals(trace)
        return trace


def _is_small(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether running the model costs less than faking it, which takes about a millisecond an
    operator.
    """
    return sum(t.numel() for t in [*model.parameters(), *flatten((args, kwargs))[0]]) <= SMALL


def _without_data(value: Any, differentiable: bool) -> Any:
    """A stand-in on the meta device, so that a trace keeps no activations."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta").requires_grad_(differentiable)


def bind_originals(trace: Trace) -> None:
    """Buffers were clones while tracing."""
    for name in trace.attributes:
        if not name.startswith("_constant_"):
            trace.attributes[name] = functools.reduce(getattr, name.split("."), trace.model)


def record(
    recorder: Recorder,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opaque: dict[str, str],
) -> Trace:
    leaves, structure = flatten((args, kwargs))
    names = input_names(model, args, kwargs)
    values = []
    for name, leaf in zip(names, leaves, strict=True):
        leaf = leaf.detach().requires_grad_(leaf.requires_grad)
        value = (
            recorder.fake.from_tensor(leaf)
            if recorder.fake
            else leaf.detach().clone().requires_grad_(leaf.requires_grad)
        )
        recorder.placeholder(name, value)
        values.append(value)
    fake_args, fake_kwargs = structure.build(iter(values))
    with recording(recorder), torch.enable_grad():
        output = model(*fake_args, **fake_kwargs)
    out_leaves, out_structure = flatten(output, lambda v: isinstance(v, torch.Tensor | TracedInt))
    for part in _constants(out_structure):
        if flatten(dict(getattr(part, "__dict__", {})))[0]:
            raise TracingError(
                f"the model returns a {type(part).__name__}, whose tensors cannot be seen; "
                "return tuples, dicts or dataclasses, or register the class with "
                "torch.utils._pytree"
            )
    recorder.graph.output(tuple(recorder._arguments(leaf) for leaf in out_leaves))
    _prune(recorder.graph, set(recorder.looks.guards))
    recorder.graph.lint()
    for node in recorder.graph.nodes:
        if "value" in node.meta:
            node.meta["value"] = _without_data(
                node.meta["value"], node.meta.get("differentiable", False)
            )
    return Trace(
        graph=recorder.graph,
        model=model,
        attributes=recorder.attributes,
        inputs=structure,
        outputs=out_structure,
        guards=tuple(recorder.looks.guards.items()),
        calls=tuple(
            (path, None if node and node._erased else node, _surviving(last))
            for path, node, last in recorder.calls
        ),
        modes=tuple(recorder.visited.values()),
        rung="calls",
        opaque=dict(opaque),
        notes=tuple(recorder.notes),
    )


def input_names(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for every tensor among the inputs: the parameter's, with keys and indices where it is
    nested.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    named = [
        (positional[i] if i < len(positional) else f"{rest}_{i - len(positional)}", v)
        for i, v in enumerate(args)
    ]
    names: list[str] = []
    for name, value in [*named, *kwargs.items()]:
        count = len(flatten(value)[0])
        if count == 1 and isinstance(value, torch.Tensor):
            names.append(name)
        else:
            names.extend(f"{name}_{key}" for key in leaf_keys(value))
    result: list[str] = []
    for name in names:
        name = re.sub(r"\W", "_", name)
        while name in result:
            name += "_"
        result.append(name)
    return result


def leaf_keys(value: Any) -> list[str]:
    """A name for every tensor of a nested value: keys and indices, joined by ``_``."""
    if isinstance(value, torch.Tensor):
        return [""]
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [str(i) for i in range(len(flatten(value)[0]))]
    return [f"{k}_{rest}".strip("_") for k, v in items for rest in leaf_keys(v)]


def _constants(structure: Structure) -> Iterator[Any]:
    if structure.kind == "constant":
        yield structure.payload
    for child in structure.children:
        yield from _constants(child)


def _prune(graph: fx.Graph, keep: set[fx.Node]) -> None:
    """Drop members and alias notes that nothing uses, but nothing that could have an effect."""
    for node in reversed(list(graph.nodes)):
        if node.users or node in keep or node.op in ("placeholder", "output"):
            continue
        note = getattr(node.target, "__name__", "") in ("getitem", "after", "getattr")
        effect = node.meta.get("mutates") or node.meta.get("random")
        looked_at = "value" not in node.meta  # an integer that was not computed with
        if node.op == "get_attr" or (note and not effect) or looked_at:
            graph.erase_node(node)


def _surviving(node: fx.Node) -> fx.Node:
    """The nearest node at or before this one that pruning left."""
    while node._erased:
        node = node.prev
    return node


def _next_outer(model: nn.Module, place: str, opaque: dict[str, str]) -> str | None:
    while "." in place:
        place = place.rpartition(".")[0]
        if place not in opaque and not isinstance(
            model.get_submodule(place), nn.ModuleList | nn.ModuleDict
        ):
            return place
    return None


def reason_of(error: BaseException) -> str:
    """First line of an error and the user's line that it passed last."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not isinstance(error, TracingError):
        text = f"{type(error).__name__}: {text}"
    line = user_line(error)
    return f"{text} ({line})" if line else text


def _signature(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_signature(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_signature(v) for v in value) + ")"
    return repr(value)
