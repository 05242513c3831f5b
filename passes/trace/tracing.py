"""From a model and example inputs to a graph: a ladder of tracers, from the most faithful to the
last resort.

1. ``trace_calls``: record torch functions and leaf modules (see ``recorder``) on fake tensors,
   then on real ones; a submodule that cannot be looked into becomes one opaque node.
2. ``trace_export`` (in ``exporting``): ``torch.export`` (non-strict, batch dimension dynamic),
   whose operators are then recorded likewise.

Which rung to believe is for the numeric self-check (``checking``) to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ...errors import BakedInError, DataDependentError, TracingError, user_line
from ...graphs.nested import Structure, flatten
from ...graphs.pictures import picture
from .caches import Fakes, fakes
from .calls import ReadAttribute
from .contents import Contents
from .modules import Visits
from .naming import argument_names, check_inputs, hidden_tensor, input_names, where_is
from .overwritten import Overwritten
from .recorder import Recorder
from .routing import recording
from .state import Changes, restored
from .symbols import Size, TracedInt, sizes_wanted
from .traces import Trace
from .values import copied

_MOST_OPAQUE = 200
_SAME_ON_REAL_TENSORS = DataDependentError | BakedInError
SMALL = 1 << 22  # elements of parameters and inputs


def trace_calls(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grad: bool = True,
    opaque: Mapping[str, str] | None = None,
) -> Trace:
    """Record the model's functions and leaf modules on fake tensors, else on real ones.

    Args:
        model: any module, in the mode in which it is to run.
        args: example positional inputs, nested as the model takes them.
        kwargs: example keyword inputs.
        grad: whether gradients are asked for, which code may look at.
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
        on_fakes = contextlib.nullcontext() if attempts.real else fakes()
        with on_fakes as fake, restored(model, args, kwargs) as changes:
            attempts.overwritten.hide()
            trace = _attempt(attempts, fake, grad, changes.reached, args, kwargs)
        if trace is not None and attempts.is_done(changes, trace):
            break
    if attempts.real and not attempts.small:
        trace.rung = "calls on real tensors"
    trace.changes = changes
    return trace


def _attempt(
    attempts: _Attempts,
    fake: Fakes | None,
    grad: bool,
    reached: frozenset[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Trace | None:
    """Record the model once; None where something was learnt from a failure."""
    recorder = attempts.recorder(fake, grad, reached)  # here, so that it does not outlive the call
    try:
        return record(recorder, attempts.model, args, kwargs, attempts.opaque)
    except Exception as error:
        for node in recorder.known.graph.nodes:  # whose circles would keep its values
            node.meta.clear()
        attempts.learn(recorder.visits, error)
        return None


class _Attempts:
    """What the attempts so far have shown, and how the next one is made.

    Attributes:
        model: the user's model.
        real: whether it runs on real tensors.
        small: whether real ones were chosen because they cost less.
        opaque: paths of modules to keep as single nodes, with the reason.
        plain: sizes that the model's code needs as plain integers.
        watched: what was changed.
        overwritten: of that, what carries nothing from call to call.
    """

    def __init__(self, model: nn.Module, small: bool, opaque: Mapping[str, str]) -> None:
        self.real = self.small = small
        self.opaque = dict(opaque)
        self._given = opaque
        self.plain: frozenset[Size] = frozenset()
        self.watched: tuple[Contents, ...] = ()
        self.overwritten = Overwritten()
        self.model = model

    def recorder(self, fake: Fakes | None, grad: bool, reached: frozenset[int]) -> Recorder:
        """For the next attempt, in which some tensors are there before."""
        opaque = frozenset(self.opaque)
        watched, without = self.watched, self.overwritten.keys
        return Recorder(self.model, fake, opaque, self.plain, grad, watched, reached, without)

    def is_done(self, changes: Changes, trace: Trace) -> bool:
        """Whether no other recording is needed."""
        return not self._watch(changes) and self.overwritten.confirms(trace)

    def _watch(self, changes: Changes) -> bool:
        """Whether to record once more, to see which module changes things that are not its own."""
        if self.watched:
            return False
        self.watched = tuple(changes.contents)
        return bool(self.watched)

    def learn(self, visits: Visits, error: Exception) -> None:
        """Choose what to do differently after a failure.

        Raises:
            TracingError: nothing is left to try.
        """
        self.overwritten.check()
        wanted = sizes_wanted(error)
        place, is_leaf = visits.failed_at, visits.failed_leaf
        if wanted:
            self.plain |= wanted
        elif self.real and self.small and isinstance(error, DataDependentError):
            # code that asks whether it is traced knows fake tensors, and reads no values
            self.real = self.small = False
            self.opaque = dict(self._given)
        elif not place and self.overwritten.suspect(visits.refused, error):
            pass
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
            kind = type(self.model.get_submodule(place)).__name__
            raise TracingError(f"'{place}' ({kind}) fails: {reason}") from error
        outer = _next_outer(self.model, place, self.opaque) if place else None
        if outer is None:
            refusal = BakedInError if isinstance(error, BakedInError) else TracingError
            name = type(self.model).__name__
            where = "" if user_line(error) else f"; it is {where_is(self.model, '')}"
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
    copies: dict[int, torch.Tensor] = {}
    for name, leaf in zip(input_names(model, args, kwargs), leaves, strict=True):
        value = copies.get(id(leaf))  # the same tensor again is the same one to the model
        if value is None:
            if recorder.fake:
                alone = leaf.detach().requires_grad_(leaf.requires_grad)
                value = recorder.fake.from_tensor(alone)
            else:
                value = copied(leaf)
            copies[id(leaf)] = value
        known.placeholder(name, value)
        recorder.inputs[known.nodes[id(value)]] = leaf
        values.append(value)
    own_args, own_kwargs = structure.build(iter(values))
    before = _pictures(model, own_args, own_kwargs)
    with torch.set_grad_enabled(recorder.grad), recording(recorder):
        output = model(*own_args, **own_kwargs)
    after = _pictures(model, own_args, own_kwargs)
    written = [name for name, was in before.items() if after[name] != was]
    if written:
        raise BakedInError(
            f"forward changes what is in argument '{written[0]}', which stages cannot: return it "
            "instead"
        )
    out_leaves, out_structure = flatten(output, lambda v: isinstance(v, torch.Tensor | TracedInt))
    visits.notes += _check_sight(out_structure)
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
        held=recorder.reads.held,
        rung="calls",
        opaque=dict(opaque),
        notes=tuple(dict.fromkeys([*visits.notes, *recorder.reads.baked_in()])),
    )


def _pictures(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What each argument holds, by its place or name."""
    return {name: picture(value) for name, value in argument_names(model, args, kwargs).items()}


def _check_sight(outputs: Structure) -> list[str]:
    """Refuse outputs that hold tensors where they cannot be seen; of objects made of further
    objects (a cache of keys and values beside what is trained on) notes are enough.
    """
    notes = []
    for part in outputs.constants():
        if flatten(dict(getattr(part, "__dict__", {})))[0]:
            raise TracingError(
                f"the model returns a {type(part).__name__}, whose tensors cannot be seen; "
                "return tuples, dicts or dataclasses, or register the class with "
                "torch.utils._pytree"
            )
        if hidden_tensor(part) is not None:
            notes.append(
                f"the model returns a {type(part).__name__}, which stays that of the example: "
                "stages do not fill it (use_cache=False leaves it out)"
            )
    return notes


def _prune(graph: fx.Graph, keep: set[fx.Node]) -> None:
    """Drop members and alias notes that nothing uses, but nothing that could have an effect."""
    for node in reversed(list(graph.nodes)):
        if node.users or node in keep or node.op in ("placeholder", "output"):
            continue
        note = getattr(node.target, "__name__", "") in ("getitem", "after", "getattr")
        effect = node.meta.get("mutates") or node.meta.get("random")
        note = note or isinstance(node.target, ReadAttribute)
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
