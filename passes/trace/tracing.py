"""From a model and example inputs to a graph: a ladder of tracers, from the most faithful to the
last resort.

1. ``trace_calls``: record torch functions and leaf modules (see ``recorder``) on fake tensors,
   then on real ones; a submodule that cannot be looked into becomes one opaque node.
2. ``trace_export`` (in ``exporting``): ``torch.export`` (non-strict, batch dimension dynamic),
   whose operators are then recorded likewise.

Which rung to believe is for the numeric self-check (``checking``) to say.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import BakedInError, DataDependentError, TracingError, user_line
from ...graphs.nested import Structure, flatten
from .containers import Assembled, signature
from .modules import Visits
from .naming import check_inputs, constants, hidden_tensor, input_names, where_is
from .recorder import Recorder
from .routing import recording
from .state import untouched
from .symbols import Size, TracedInt, sizes_wanted

_MOST_OPAQUE = 200
_SAME_ON_REAL_TENSORS = DataDependentError | BakedInError
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
        graph: nodes with the facts listed in ``provenance`` in their ``meta``; never changed after
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
        name = getattr(node.target, "__name__", node.target)
        return f"{getattr(node.target, '__module__', '')}.{name}"


def trace_calls(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opaque: Mapping[str, str] | None = None,
) -> Trace:
    """Record the model's functions and leaf modules on fake tensors, else on real ones.

    Args:
        model: any module, in the mode in which it is to run.
        args: example positional inputs, nested as the model takes them.
        kwargs: example keyword inputs.
        opaque: paths of modules to keep as single nodes from the start, with the reason.

    Returns:
        The trace. The model, its buffers and the random state are as they were.

    Raises:
        TracingError: the model as a whole cannot be recorded; says why and where.
        BakedInError: an argument holds tensors that cannot be seen.
    """
    check_inputs(model, args, kwargs)
    attempts = _Attempts(model, _is_small(model, args, kwargs), opaque or {})
    while True:
        with untouched(model):
            fake = None if attempts.real else FakeTensorMode(allow_non_fake_inputs=True)
            recorder = Recorder(model, fake, frozenset(attempts.opaque), attempts.plain)
            try:
                trace = record(recorder, model, args, kwargs, attempts.opaque)
            except Exception as error:
                attempts.learn(recorder.visits, error)
                continue
        if attempts.real and not attempts.small:
            trace.rung = "calls on real tensors"
        bind_originals(trace)
        return trace


class _Attempts:
    """What the attempts so far have shown, and how the next one is made.

    Attributes:
        real: whether the model runs on real tensors.
        small: whether real ones were chosen because they cost less.
        opaque: paths of modules to keep as single nodes, with the reason.
        plain: sizes that the model's code needs as plain integers.
    """

    def __init__(self, model: nn.Module, small: bool, opaque: Mapping[str, str]) -> None:
        self.real = self.small = small
        self.opaque = dict(opaque)
        self._given = opaque
        self.plain: frozenset[Size] = frozenset()
        self._model = model

    def learn(self, visits: Visits, error: Exception) -> None:
        """Choose what to do differently after a failure.

        Raises:
            TracingError: nothing is left to try.
        """
        wanted = sizes_wanted(error)
        place, is_leaf = visits.failed_at, visits.failed_leaf
        if wanted:
            self.plain |= wanted
        elif self.real and self.small and isinstance(error, DataDependentError):
            # code that asks whether it is traced knows fake tensors, and reads no values
            self.real = self.small = False
            self.opaque = dict(self._given)
        elif place and not is_leaf and place not in self.opaque and len(self.opaque) < _MOST_OPAQUE:
            self.opaque[place] = reason_of(error)
        elif not self.real and (is_leaf or not isinstance(error, _SAME_ON_REAL_TENSORS)):
            self.real = True
        else:
            self.small = False  # fake tensors cannot do more here than real ones
            self._open_less(place, is_leaf, error)

    def _open_less(self, place: str | None, is_leaf: bool, error: Exception) -> None:
        reason = reason_of(error)
        if is_leaf and place and not isinstance(error, TracingError):
            kind = type(self._model.get_submodule(place)).__name__
            raise TracingError(f"'{place}' ({kind}) fails: {reason}") from error
        outer = _next_outer(self._model, place, self.opaque) if place else None
        if outer is None:
            refusal = BakedInError if isinstance(error, BakedInError) else TracingError
            name = type(self._model).__name__
            where = "" if user_line(error) else f"; it is {where_is(self._model, '')}"
            raise refusal(f"the top level of {name} cannot be recorded: {reason}{where}") from error
        self.opaque[outer] = reason


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
    """Run a model once under a recorder.

    Args:
        recorder: a new one.
        model: the model, or what is called in its place.
        args: example positional inputs.
        kwargs: example keyword inputs.
        opaque: paths of modules kept as single nodes, with the reason.

    Returns:
        The trace.

    Raises:
        TracingError: something that no graph can hold; other errors are the model's own.
    """
    known, visits, guards = recorder.known, recorder.visits, recorder.sizes.looks.guards
    leaves, structure = flatten((args, kwargs))
    values = []
    for name, leaf in zip(input_names(model, args, kwargs), leaves, strict=True):
        alone = leaf.detach().requires_grad_(leaf.requires_grad)
        value = recorder.fake.from_tensor(alone) if recorder.fake else _copied(leaf)
        known.placeholder(name, value)
        values.append(value)
    own_args, own_kwargs = structure.build(iter(values))
    with recording(recorder), torch.enable_grad():
        output = model(*own_args, **own_kwargs)
    out_leaves, out_structure = flatten(output, lambda v: isinstance(v, torch.Tensor | TracedInt))
    _check_sight(out_structure)
    known.graph.output(tuple(known.argument(leaf) for leaf in out_leaves))
    _prune(known.graph, set(guards))
    known.graph.lint()
    for node in known.graph.nodes:
        if "value" in node.meta:
            differentiable = node.meta.get("differentiable", False)
            node.meta["value"] = _without_data(node.meta["value"], differentiable)
    return Trace(
        graph=known.graph,
        model=model,
        attributes=known.attributes,
        inputs=structure,
        outputs=out_structure,
        guards=tuple(guards.items()),
        calls=tuple(
            (path, None if node and node._erased else node, _surviving(last))
            for path, node, last in visits.calls
        ),
        modes=tuple(visits.visited.values()),
        rung="calls",
        opaque=dict(opaque),
        notes=tuple(dict.fromkeys(visits.notes)),
    )


def _copied(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _check_sight(outputs: Structure) -> None:
    """Refuse outputs that hold tensors where they cannot be seen."""
    for part in constants(outputs):
        if hidden_tensor(part) is not None:
            raise TracingError(
                f"the model returns a {type(part).__name__}, whose tensors cannot be seen; "
                "return tuples, dicts or dataclasses, or register the class with "
                "torch.utils._pytree"
            )


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
    if isinstance(value, Assembled):
        built = signature(value.structure)
        return f"{type(value).__name__}({','.join(map(_signature, value))}){built}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_signature(v) for v in value) + ")"
    return repr(value)
