"""Makes sources from names and factories."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import DecouplingError, did_you_mean
from ..plan import TensorSpec
from .base import GradientSource, SourceFactory
from .checking import check_source, explain_start
from .grouping import JOINT

Made = TypeVar("Made", bound=nn.Module)

SOURCES: dict[str, type[GradientSource]] = {}  # by name; filled where all classes are known


def make_source(
    option: str | SourceFactory, specs: Sequence[TensorSpec], context_spec: TensorSpec | None = None
) -> GradientSource:
    """Make the gradient source for an interface or a whole boundary.

    The global random state is left as it was; a source's initial weights follow from it all the
    same.

    Args:
        option: a name of :data:`SOURCES`, with or without ``"joint:"`` before it, or a callable
            ``(specs, context_spec) -> GradientSource``; a GradientSource class is one.
        specs: the values served.
        context_spec: the context, None where there is none.

    Returns:
        A new source, on the CPU (or torch's default device).

    Raises:
        DecouplingError: unknown name; not a factory; a source that does not fit the value or the
            context, or that is not written as one.
    """
    name = option.removeprefix(JOINT) if isinstance(option, str) else option
    factory = find_factory(name, SOURCES, "gradient source", GradientSource)
    arguments = {"specs": tuple(specs), "context_spec": context_spec}
    try:
        source = call_factory(factory, "gradient source", GradientSource, arguments)
    except (AttributeError, TypeError) as error:
        if (refusal := explain_start(error)) is not None:
            raise refusal from error
        raise
    check_source(source)
    return source


def find_factory(option: Any, known: Mapping[str, Any], what: str, kind: type[nn.Module]) -> Any:
    """The factory of that name, or the option itself.

    Args:
        option: a name, or a factory.
        known: factories by name.
        what: as messages call it.
        kind: of what is made.

    Raises:
        DecouplingError: an unknown name; close ones are suggested.
    """
    if not isinstance(option, str):
        return option
    if option not in known:
        names = ", ".join(map(repr, known))
        raise DecouplingError(
            f"unknown {what} {option!r}{did_you_mean(option, known)}. Known: {names}, or a factory "
            f"that makes a {kind.__name__}."
        )
    return known[option]


def call_factory(factory: Any, what: str, kind: type[Made], arguments: Mapping[str, Any]) -> Made:
    """Call a factory, and leave the global random states as they were.

    Args:
        factory: called with the arguments in order.
        what: as messages call it.
        kind: of what it must return.
        arguments: by the names that messages give them.

    Raises:
        DecouplingError: no factory, one that takes other arguments or makes something else.
    """
    wanted = f"a callable ({', '.join(arguments)}) -> {kind.__name__}"
    if isinstance(factory, nn.Module):
        raise DecouplingError(
            f"got a {type(factory).__name__} object as {what}, but each interface makes its own. "
            f"Pass the class, or {wanted}."
        )
    if not callable(factory):
        raise DecouplingError(f"a {what} is a name or {wanted}, but got {factory!r}")
    try:
        inspect.signature(factory).bind(*arguments.values())
    except TypeError as error:
        raise DecouplingError(
            f"the {what} factory {factory!r} must take ({', '.join(arguments)}): {error}"
        ) from error
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if used else ()
    with torch.random.fork_rng(devices=devices):
        made = factory(*arguments.values())
    if not isinstance(made, kind):
        article = "an" if kind.__name__.startswith("I") else "a"
        raise DecouplingError(
            f"the {what} factory {factory!r} returned {type(made).__name__}, expected {article} "
            f"{kind.__name__}"
        )
    return made
