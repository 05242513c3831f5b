"""Which source serves which interfaces: one each, or one for the whole boundary of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plan import Interface, TensorSpec
from .base import GradientSource, SourceFactory

JOINT = "joint:"


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
