"""Chooses and makes the gradient source of every interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import DecouplingError, did_you_mean
from ..plan import Interface, TensorSpec
from ..sources import GradientSource, SourceFactory, make_source

Gradients = str | SourceFactory | Mapping[str, str | SourceFactory]


def resolve_gradients(interfaces: tuple[Interface, ...], gradients: Gradients) -> dict[str, str | SourceFactory]:
    """What was asked for at every interface.

    Args:
        interfaces: values that carry a gradient across a cut.
        gradients: one source for all, or a mapping from interface name (or another name of the value) to sources;
            interfaces that it leaves out get ``"auto"``.

    Returns:
        A source name or factory for every interface name.

    Raises:
        DecouplingError: a name that is no interface (close names are suggested), or ``"exact"`` for some of them only.
    """
    if not isinstance(gradients, Mapping):
        return {i.name: gradients for i in interfaces}
    by_name = {name: i.name for i in interfaces for name in (i.name, *i.aliases)}
    unknown = [n for n in gradients if n not in by_name]
    if unknown:
        lines = "; ".join(f"{n!r}{did_you_mean(n, by_name)}" for n in unknown)
        known = ", ".join(repr(i.name) for i in interfaces)
        raise DecouplingError(f"gradients= names no interface of this plan: {lines}. The interfaces are {known}")
    chosen = {by_name[n]: source for n, source in gradients.items()}
    if "exact" in chosen.values():
        raise DecouplingError(
            "'exact' waits for the true gradient of every stage: pass gradients='exact' for the whole model"
        )
    return {i.name: chosen.get(i.name, "auto") for i in interfaces}


def make_sources(
    interfaces: tuple[Interface, ...],
    chosen: Mapping[str, str | SourceFactory],
    context: TensorSpec | None,
    devices: Mapping[str, torch.device],
) -> dict[str, GradientSource]:
    """Make one source for each interface, on the device of its value.

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
    sources = {}
    for interface in interfaces:
        try:
            source = make_source(chosen[interface.name], (interface.spec,), context)
        except DecouplingError as error:
            raise type(error)(f"interface {interface.name!r}: {error}") from error
        sources[interface.name] = source.to(devices[interface.name])
    return sources


def infer_context(context: Callable[[Any], torch.Tensor] | None, batch: int) -> TensorSpec | None:
    """Shape of what a context callable returns for a batch.

    Asked of its ``features`` attribute, else found by calling it with labels of zero.

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
        raise DecouplingError(f"context= must be a callable from the training target to a tensor, not {context!r}")
    features = getattr(context, "features", None)
    if isinstance(features, int):
        return TensorSpec((batch, features), torch.get_default_dtype())
    try:
        value = context(torch.zeros(batch, dtype=torch.long))
    except Exception as error:
        raise DecouplingError(
            "the number of features of context= is not known before the first target: it failed on integer labels "
            f"({error}); set an integer attribute `features` on the callable"
        ) from error
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 1:
        raise DecouplingError("context= must return a float tensor whose last dimension holds the features")
    if value.shape[0] not in (1, batch):
        raise DecouplingError(
            f"context= returned shape {tuple(value.shape)} for {batch} labels; its first dimension must be the batch's"
        )
    return TensorSpec(tuple(value.shape), value.dtype)
