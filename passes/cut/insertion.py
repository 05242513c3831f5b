"""Chooses and makes the gradient source, and where asked for the synthetic input, of every
interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...errors import DecouplingError, did_you_mean
from ...plan import Interface, TensorSpec
from ...sources import (
    GradientSource,
    InputFactory,
    InputSource,
    SourceFactory,
    for_consumers,
    is_joint,
    make_input,
    make_source,
    try_predict,
)

Gradients = str | SourceFactory | Mapping[str, str | SourceFactory]
Inputs = str | InputFactory | Mapping[str, str | InputFactory]


def resolve_gradients(
    interfaces: tuple[Interface, ...], gradients: Gradients
) -> dict[str, str | SourceFactory]:
    """What was asked for at every interface.

    Args:
        interfaces: values that carry a gradient across a cut.
        gradients: one source for all, or a mapping from interface name (or another name of the
            value) to sources; interfaces that it leaves out get ``"auto"``.

    Returns:
        A source name or factory for every interface name.

    Raises:
        DecouplingError: a name that is no interface (close names are suggested), or ``"exact"`` for
            some of them only.
    """
    chosen = _by_interface(interfaces, gradients, "gradients")
    if not isinstance(gradients, Mapping):
        return chosen
    within = [chosen[i.name] for i in interfaces if not i.leaves and i.name in chosen]
    if {"exact", "joint:exact"} & {c for c in within if isinstance(c, str)}:
        raise DecouplingError(
            "'exact' waits for the true gradient of every stage: pass gradients='exact' for the "
            "whole model"
        )
    return {i.name: chosen.get(i.name, "auto") for i in interfaces}


def make_sources(
    interfaces: tuple[Interface, ...],
    chosen: Mapping[str, str | SourceFactory],
    context: TensorSpec | None,
    devices: Mapping[str, torch.device],
) -> dict[str, GradientSource]:
    """Make one source for each interface, on the device of its value; one for all of a stage's that
    ask for the same ``"joint:..."``.

    Args:
        interfaces: values that carry a gradient across a cut.
        chosen: what ``resolve_gradients`` returned.
        context: shape and dtype of the context, None without one.
        devices: device of each interface's value.

    Returns:
        Sources by interface name. The global random state is left as it was.

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
        try:
            option = for_consumers(chosen[names[0]], len(group[0].consumers))
            source = make_source(option, tuple(i.spec for i in group), context)
            if source.asks.jacobian and not group[0].leaves:
                raise DecouplingError(
                    f"{type(source).__name__} learns from how the state between windows depends on "
                    "the one before, so it serves no cut within one: ask for it by the state's "
                    "interfaces, gradients={'next_...': ...}"
                )
            try_predict(source)
        except DecouplingError as error:
            raise type(error)(f"interface {', '.join(map(repr, names))}: {error}") from error
        sources.update(dict.fromkeys(names, source.to(devices[names[0]])))
    if len({sources[i.name].asks.exact for i in interfaces if not i.leaves}) > 1:
        raise DecouplingError(
            "'exact' waits for the true gradient of every stage: pass gradients='exact' for the "
            "whole model"
        )
    return {i.name: sources[i.name] for i in interfaces}


def make_inputs(
    interfaces: tuple[Interface, ...],
    inputs: Inputs | None,
    model_inputs: tuple[TensorSpec, ...],
    devices: Mapping[str, torch.device],
) -> dict[str, InputSource]:
    """Make a synthetic input for every interface that one was asked for.

    Args:
        interfaces: values that carry a gradient across a cut.
        inputs: a name or factory for all, or a mapping from interface name to either (interfaces
            that it leaves out get none); None for none at all.
        model_inputs: the model's tensor inputs, in order.
        devices: device of each interface's value.

    Returns:
        By interface name. The global random state is left as it was.

    Raises:
        DecouplingError: an unknown name, or a value that cannot be predicted from the model's
            inputs.
    """
    chosen = chosen_inputs(interfaces, inputs)
    found = {}
    for interface in interfaces:
        if interface.name in chosen:
            try:
                made = make_input(chosen[interface.name], interface.spec, model_inputs)
            except DecouplingError as error:
                raise type(error)(
                    f"synthetic input at interface {interface.name!r}: {error}"
                ) from error
            found[interface.name] = made.to(devices[interface.name])
    return found


def chosen_inputs(
    interfaces: tuple[Interface, ...], inputs: Inputs | None
) -> dict[str, str | InputFactory]:
    """The option of each interface that a synthetic input was asked for."""
    return {} if inputs is None else _by_interface(interfaces, inputs, "inputs")


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


def infer_context(context: Callable[[Any], torch.Tensor] | None, batch: int) -> TensorSpec | None:
    """Shape of what a context callable returns for a batch.

    Asked of its attributes ``features`` and ``positions`` (number of dimensions between batch and
    features, 0 if missing), else found by calling it with labels of zero.

    Args:
        context: the callable, or None.
        batch: size of the example batch.

    Returns:
        ``(batch, features)`` and dtype; None without a context.

    Raises:
        DecouplingError: the callable has no ``features`` and does not take integer labels.
    """
    if context is None:
        return None
    if not callable(context):
        raise DecouplingError(
            f"context= must be a callable from the training target to a tensor, not {context!r}"
        )
    features = getattr(context, "features", None)
    if isinstance(features, int):
        positions = getattr(context, "positions", 0)
        return TensorSpec((batch, *(1,) * positions, features), torch.get_default_dtype())
    try:
        value = context(torch.zeros(batch, dtype=torch.long))
    except Exception as error:
        raise DecouplingError(
            "the number of features of context= is not known before the first target: it failed on "
            f"integer labels ({error}); set an integer attribute `features` on the callable"
        ) from error
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 1:
        raise DecouplingError(
            "context= must return a float tensor whose last dimension holds the features"
        )
    if value.shape[0] not in (1, batch):
        raise DecouplingError(
            f"context= returned shape {tuple(value.shape)} for {batch} labels; its first dimension "
            "must be the batch's"
        )
    return TensorSpec(tuple(value.shape), value.dtype)
