"""Chooses and makes the gradient source, and where asked for the synthetic input, of every
interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ...errors import DecouplingError, did_you_mean, placed
from ...plan import Interface, TensorSpec
from ...sources import (
    SOURCES,
    Exampled,
    GradientSource,
    InputFactory,
    InputSource,
    LossHead,
    SourceFactory,
    auto_name,
    check_features,
    for_consumers,
    is_joint,
    make_input,
    make_source,
    try_predict,
)
from ..trace.traces import Trace
from .specs import infer_specs
from .splitting import Split

Gradients = str | SourceFactory | Mapping[str, str | SourceFactory]
Inputs = str | InputFactory | Mapping[str, str | InputFactory]
Context = Callable[[Any], torch.Tensor]


class Leaving(Protocol):
    """How values that leave the graph are served.

    Attributes:
        context: what those sources see besides.
    """

    context: TensorSpec | None

    def serve(self, interface: Interface, option: Any) -> Any:
        """From what was asked for at an interface to the option that its source is made from."""


@dataclass(frozen=True)
class Inserted:
    """What stands at the interfaces of a split model.

    Attributes:
        gradients: the source of every interface.
        inputs: synthetic inputs, at the interfaces that they were asked for.
        kinds: what a plan calls the source of every interface.
        unlocks: the same of the synthetic inputs.
    """

    gradients: dict[str, GradientSource]
    inputs: dict[str, InputSource]
    kinds: dict[str, str]
    unlocks: dict[str, str]


def insert_sources(
    trace: Trace,
    split: Split,
    gradients: Gradients,
    inputs: Inputs | None = None,
    context: Context | None = None,
    leaving: Leaving | None = None,
    sized: Mapping[str, str] | None = None,
) -> Inserted:
    """Make what was asked for at every interface of a split model, on the model's device.

    Args:
        trace: the traced model.
        split: its stages.
        gradients: one source for all interfaces, or a mapping from interface name (or another name
            of the value) to sources; those that it leaves out get ``"auto"``.
        inputs: synthetic inputs likewise; those that a mapping leaves out get none.
        context: turns targets into what the sources see.
        leaving: how values that leave the graph are served; None where there are none.
        sized: what ``"auto"`` stands for, by interface, where it is not its full form.

    Raises:
        DecouplingError: names of no interface, unknown sources, or some that cannot serve a value;
            ``"exact"`` for some interfaces only.
    """
    interfaces, specs = split.interfaces, infer_specs(trace)
    taken = tuple(specs[n] for n in split.model_inputs)
    seen = None if leaving is not None else infer_context(context, taken)
    device = next(trace.model.parameters()).device
    asked = resolve_gradients(interfaces, gradients) | dict(sized or {})
    within = tuple(i for i in interfaces if not i.leaves)
    known = specs | {i.name: i.spec for i in interfaces}
    seen_by = _seen_by(split, known)
    sources = make_sources(within, asked, seen, device, seen_by)
    if leaving is not None:
        outward = tuple(i for i in interfaces if i.leaves)
        options = {i.name: leaving.serve(i, asked[i.name]) for i in outward}
        sources = make_sources(outward, options, leaving.context, device, seen_by) | sources
    if isinstance(context, Exampled):
        _check_heads(sources, context)
    exact = {n for n, source in sources.items() if source.asks.exact}
    some = isinstance(gradients, Mapping) or len(exact) < len(sources)
    if some and any(i.name in exact for i in within):
        raise DecouplingError(
            "'exact' waits for the true gradient of every stage: pass gradients='exact' for the "
            "whole model"
        )
    kinds = {n: _name_of(option) for n, option in asked.items()}
    kinds.update({i.name: auto_name(i.spec, seen) for i in within if kinds[i.name] == "auto"})
    chosen = {} if inputs is None else _by_interface(interfaces, inputs, "inputs")
    made = {}
    for interface in (i for i in interfaces if i.name in chosen):
        with placed(f"synthetic input at interface {interface.name!r}"):
            source = make_input(chosen[interface.name], interface.spec, taken)
        made[interface.name] = source.to(device)
    return Inserted(sources, made, kinds, {n: _name_of(option) for n, option in chosen.items()})


def _name_of(option: Any) -> str:
    """An option as a plan says it; a factory of the user's is never called as a built-in source."""
    if isinstance(option, str):
        return option
    name = getattr(option, "__name__", type(option).__name__)
    return f"{option.__module__}.{name}" if name in SOURCES else name


def resolve_gradients(
    interfaces: tuple[Interface, ...], gradients: Gradients
) -> dict[str, str | SourceFactory]:
    """The source that was asked for at every interface; ``"auto"`` where a mapping names none.

    Raises:
        DecouplingError: a name that is no interface (close names are suggested).
    """
    chosen = _by_interface(interfaces, gradients, "gradients")
    return {i.name: chosen.get(i.name, "auto") for i in interfaces}


def make_sources(
    interfaces: tuple[Interface, ...],
    chosen: Mapping[str, str | SourceFactory],
    context: TensorSpec | None,
    device: torch.device,
    seen_by: Callable[[int, str], list[TensorSpec]] | None = None,
) -> dict[str, GradientSource]:
    """Make one source for each interface; one for all of a stage's that ask for the same
    ``"joint:..."``. The global random state is left as it was.

    ``seen_by`` says what sources of a stage will see that ask for inputs.

    Raises:
        DecouplingError: an unknown source, or one that cannot serve its value.
    """
    groups: dict[object, list[Interface]] = {}
    for interface in interfaces:
        option = chosen[interface.name]
        key = (interface.producer, option) if is_joint(option) else interface.name
        groups.setdefault(key, []).append(interface)
    sources: dict[str, GradientSource] = {}
    for group in groups.values():
        names = [i.name for i in group]
        with placed(f"interface {', '.join(map(repr, names))}"):
            option = for_consumers(chosen[names[0]], len(group[0].consumers))
            inputs = None if seen_by is None else partial(seen_by, group[0].producer)
            source = make_source(option, tuple(i.spec for i in group), context, inputs)
            if source.asks.jacobian and not group[0].leaves:
                raise DecouplingError(
                    f"{type(source).__name__} learns from how the state between windows depends on "
                    "the one before, so it serves no cut within one: ask for it by the state's "
                    "interfaces, gradients={'next_...': ...}"
                )
            try_predict(source)
        sources.update(dict.fromkeys(names, source.to(device)))
    return {i.name: sources[i.name] for i in interfaces}


def _seen_by(
    split: Split, specs: Mapping[str, TensorSpec]
) -> Callable[[int, str], list[TensorSpec]]:
    return lambda stage, whose: [specs[n] for n in split.seen_by(stage, whose)]


def _check_heads(sources: Mapping[str, GradientSource], context: Exampled) -> None:
    """Refuse heads whose loss the example's context is not made for."""
    for name, source in sources.items():
        with placed(f"interface {name!r}"):
            for head in source.modules():
                if isinstance(head, LossHead):
                    head.check_example(context.not_classes)


def _by_interface(interfaces: tuple[Interface, ...], options: Any, argument: str) -> dict[str, Any]:
    """The options of a mapping, or one for all, by interface name."""
    if not isinstance(options, Mapping):
        return {i.name: options for i in interfaces}
    by_name = {name: i.name for i in interfaces for name in (i.name, *i.aliases)}
    unknown = [n for n in options if n not in by_name]
    if unknown:
        lines = "; ".join(f"{n!r}{did_you_mean(n, by_name)}" for n in unknown)
        known = ", ".join(repr(i.name) for i in interfaces)
        raise DecouplingError(
            f"{argument}= names no interface of this plan: {lines}. The interfaces are {known}"
        )
    return {by_name[n]: option for n, option in options.items()}


def infer_context(context: Context | None, inputs: tuple[TensorSpec, ...]) -> TensorSpec | None:
    """Shape and dtype of what a context callable returns for a batch of the example's size; None
    without one.

    Known where there was an example of a target; else asked of its attributes ``features`` and
    ``positions`` (number of dimensions between batch and features, 0 if missing), else found by
    calling it with labels of zero.

    Raises:
        DecouplingError: the callable has no ``features`` and does not take integer labels.
    """
    if context is None:
        return None
    if isinstance(context, Exampled):
        return context.spec
    if not callable(context):
        raise DecouplingError(
            f"context= must be a callable from the training target to a tensor, not {context!r}"
        )
    batch = inputs[0].shape[0] if inputs and inputs[0].shape else 1
    features = getattr(context, "features", None)
    if isinstance(features, int):
        positions = getattr(context, "positions", 0)
        dtype = getattr(context, "dtype", torch.get_default_dtype())
        return TensorSpec((batch, *(1,) * positions, features), dtype)
    try:
        value = context(torch.zeros(batch, dtype=torch.long))
    except Exception as error:
        raise DecouplingError(
            "the number of features of context= is not known before the first target: it failed on "
            f"integer labels ({error}); pass example_target= as well, a batch's target as the loss "
            "takes it, or set an integer attribute `features` on the callable"
        ) from error
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 1:
        raise DecouplingError(
            "context= must return a float tensor whose last dimension holds the features, but did "
            "not for integer labels; where your targets are others pass example_target= as well"
        )
    if value.shape[0] not in (1, batch):
        raise DecouplingError(
            f"context= returned shape {tuple(value.shape)} for {batch} labels; its first "
            "dimension must be the batch's. Where your targets are no labels pass example_target= "
            "as well"
        )
    check_features(value, "; where your targets are no labels pass example_target= as well")
    return TensorSpec(tuple(value.shape), value.dtype)
