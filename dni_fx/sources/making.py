"""From what is asked for at an interface, a name or a factory, to the source that serves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..passes.trace.settings import drawing_devices
from ..plan import Interface, TensorSpec
from .base import GradientSource, Prediction, SourceFactory
from .checking import check_source, explain_start
from .naming import JOINT, named_factory

Made = TypeVar("Made", bound=nn.Module)

EXACT = ("exact", f"{JOINT}exact")  # true gradients, by either name
SOURCES: dict[str, type[GradientSource]] = {}  # by name; filled where all classes are known


def make_source(
    option: str | SourceFactory,
    specs: Sequence[TensorSpec],
    context_spec: TensorSpec | None = None,
    inputs: Callable[[str], Sequence[TensorSpec]] | None = None,
) -> GradientSource:
    """Make the gradient source for an interface or a whole boundary.

    The global random state is left as it was, though a source's initial weights follow from it.

    Args:
        option: a name of :data:`SOURCES`, with or without ``"joint:"`` before it and options behind
            it (``"linear(rank=16)"``), or a callable ``(specs, context_spec) -> GradientSource``; a
            GradientSource class is one.
        specs: the values served.
        context_spec: the context, None where there is none.
        inputs: says what a source will see that asks for inputs, by its ``asks.inputs``; without
            it the values stand in for them.

    Returns:
        A new source, on the CPU (or torch's default device).

    Raises:
        DecouplingError: unknown name or option; not a factory; a source that does not fit the value
            or the context, or that is not written as one.
    """
    name = option.removeprefix(JOINT) if isinstance(option, str) else option
    arguments = {"specs": tuple(specs), "context_spec": context_spec}
    try:
        source = make(name, SOURCES, "gradient source", GradientSource, arguments)
    except (AttributeError, TypeError) as error:
        if (refusal := explain_start(error)) is not None:
            raise refusal from error
        raise
    check_source(source)
    if inputs is not None and source.asks.inputs is not None:
        with torch.random.fork_rng(devices=drawing_devices()):
            source.see_inputs(inputs(source.asks.inputs))
    return source


def make(
    option: Any, known: Mapping[str, Any], what: str, kind: type[Made], arguments: Mapping[str, Any]
) -> Made:
    """Call a factory, or the one that is known by that name, and leave the random states alone.

    Errors call it ``what``, and its arguments by the names that they have here.

    Raises:
        DecouplingError: an unknown name or option; no factory, one that takes other arguments or
            makes something else.
    """
    names = ", ".join(arguments)
    wanted = f"a callable ({names}) -> {kind.__name__}"
    factory = named_factory(option, known, what) if isinstance(option, str) else option
    if isinstance(factory, nn.Module):
        raise DecouplingError(
            f"got a {type(factory).__name__} object as {what}, but each interface makes its own. "
            f"Pass the class, or {wanted}."
        )
    if not callable(factory):
        raise DecouplingError(f"a {what} is a name or {wanted}, but got {factory!r}")
    if _makes_others(factory, kind):
        raise DecouplingError(
            f"{factory.__name__} is a class of another kind: a {what} must be a {kind.__name__}, a "
            f"subclass of which, or {wanted}, may be passed"
        )
    try:
        inspect.signature(factory).bind(*arguments.values())
    except TypeError as error:
        raise DecouplingError(
            f"the {what} factory {factory!r} must take ({names}): {error}"
        ) from error
    with torch.random.fork_rng(devices=drawing_devices()):
        made = factory(*arguments.values())
    if not isinstance(made, kind):
        article = "an" if kind.__name__.startswith("I") else "a"
        raise DecouplingError(
            f"the {what} factory {factory!r} returned {type(made).__name__}, expected {article} "
            f"{kind.__name__}"
        )
    return made


def _makes_others(factory: Any, kind: type[nn.Module]) -> bool:
    """Whether a factory is a class whose objects are of another kind."""
    if not isinstance(factory, type) or issubclass(factory, kind):
        return False
    # Else what comes out may be of any class.
    return not any("__new__" in vars(owner) for owner in factory.__mro__[:-1])


@dataclass(frozen=True)
class Joint:
    """One source for all interfaces of a stage that ask for it, as ``"joint:name"`` is for a name.

    Attributes:
        factory: makes the source from the specs of all these values.
    """

    factory: SourceFactory

    def __call__(
        self, specs: Sequence[TensorSpec], context: TensorSpec | None = None
    ) -> GradientSource:
        """Make the source."""
        return self.factory(specs, context)


def is_joint(option: object) -> bool:
    """Whether an option asks for one source for a whole boundary."""
    return isinstance(option, Joint) or (isinstance(option, str) and option.startswith(JOINT))


@dataclass(frozen=True)
class Served:
    """A source and the interfaces of one stage that it serves.

    Attributes:
        names: interfaces, in program order; the source goes by the name of the first.
        source: the source.
        producer: index of the stage that asks it.
        consumers: indices of the stages that use any of the values.
        leaves: whether the values go to the next window or to another network.
    """

    names: tuple[str, ...]
    source: GradientSource
    producer: int
    consumers: tuple[int, ...]
    leaves: bool = False

    @property
    def name(self) -> str:
        """The first interface."""
        return self.names[0]

    @property
    def by_consumer(self) -> bool:
        """Whether each of several consumers teaches a part of the source, by ``fit_part``."""
        return self.source.asks.per_consumer and len(self.consumers) > 1

    def fit(
        self, prediction: Prediction, message: tuple[Tensor, ...], place: int | None = None
    ) -> Tensor | None:
        """The loss that the source learns by; None where it learns nothing, or is frozen.

        Args:
            prediction: what it said.
            message: what it learns from.
            place: of several consumers the one whose part learns; None for the whole source.

        Raises:
            DecouplingError: it returned something else than a scalar with its graph.
        """
        source = self.source
        if place is None:
            loss: Any = source.fit(prediction, message)
        else:
            loss = source.fit_part(place, prediction, message)
        if loss is None or (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            return loss
        parameters = list(source.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            return None
        found = repr(loss)[:60]
        if isinstance(loss, Tensor):
            shape = tuple(loss.shape)
            found = f"a tensor of shape {shape}, requires_grad={loss.requires_grad}"
        method = "fit" if place is None else "fit_part"
        raise DecouplingError(
            f"{type(source).__name__}.{method} must return a scalar with its graph, or None, but "
            f"returned {found}"
        )


def serve(
    interfaces: Sequence[Interface], sources: Mapping[str, GradientSource]
) -> tuple[Served, ...]:
    """Group interfaces by the source that serves them, in program order."""
    groups: dict[int, list[Interface]] = {}
    for interface in interfaces:
        groups.setdefault(id(sources[interface.name]), []).append(interface)
    return tuple(
        Served(
            names=tuple(i.name for i in group),
            source=sources[group[0].name],
            producer=group[0].producer,
            consumers=tuple(sorted({c for i in group for c in i.consumers})),
            leaves=group[0].leaves,
        )
        for group in groups.values()
    )
