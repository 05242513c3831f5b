"""Who sends what to whom: what one stage exchanges with the others about one batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..runtime.batch_state import Setting
from ..sources import Served


@dataclass(frozen=True)
class Routes:
    """One stage's part in the exchange.

    Attributes:
        index: of the stage.
        needs: the stage that makes each value that it takes.
        producers: stages whose values it takes; each is answered.
        consumers: stages that take its values; each answers.
        awaited: producers whose values are waited for; those of the others are predicted.
        asked: by producer, the kinds of message that its sources ask of this stage.
        error_to: stages that hear the output's error without sending a value here.
        error_from: the stage that the output's error comes from; None where nobody asks for it.
        chain: for every interface of a locked step, whom the stage answers, and who answers it:
            the user of a value that is last in program order answers the one before it, and so on
            back to where the value was made, which keeps autograd's order of addition.
    """

    index: int
    needs: dict[str, int]
    producers: tuple[int, ...]
    consumers: tuple[int, ...]
    awaited: frozenset[int]
    asked: dict[int, tuple[str, ...]]
    error_to: tuple[int, ...]
    error_from: int | None
    chain: dict[str, tuple[int, int | None]]

    @classmethod
    def of(cls, setting: Setting, index: int) -> Routes:
        """Of one stage.

        Args:
            setting: what holds for the batch.
            index: of the stage.
        """
        stages, makers, last = setting.stages, setting.makers, index == setting.last
        needs = {n: makers[n] for n in stages[index].inputs if n in makers}
        producers = tuple(sorted(set(needs.values())))
        asked = {p: _asked(setting.by_producer[p], index, last) for p in range(len(stages))}
        waits = "error" in _kinds(setting.by_producer[index])
        locked = setting.share > 0
        return cls(
            index=index,
            needs=needs,
            producers=producers,
            consumers=tuple(
                s.index for s in stages if any(makers.get(n) == index for n in s.inputs)
            ),
            awaited=frozenset(p for n, p in needs.items() if n not in setting.inputs or locked),
            asked=asked,
            error_to=tuple(p for p, k in asked.items() if "error" in k and p not in producers),
            error_from=setting.last if waits and not last else None,
            chain=_chain(setting, index) if locked else {},
        )

    @cached_property
    def answering(self) -> frozenset[int]:
        """Stages that something comes back from."""
        chained = {after for _, after in self.chain.values() if after is not None}
        extra = set() if self.error_from is None else {self.error_from}
        return frozenset({*self.consumers, *chained, *extra})

    @cached_property
    def answered(self) -> frozenset[int]:
        """Stages that something is sent back to."""
        before = (before for before, _ in self.chain.values())
        return frozenset({*self.producers, *before, *self.error_to} - {self.index})


def _chain(setting: Setting, index: int) -> dict[str, tuple[int, int | None]]:
    found = {}
    for interface in setting.split.interfaces:
        users = [interface.producer, *interface.consumers]
        if index in users:
            place = users.index(index)
            after = users[place + 1] if place + 1 < len(users) else None
            found[interface.name] = (users[place - 1] if place else index, after)
    return found


def _kinds(groups: list[Served]) -> list[str]:
    return [k for s in groups for k in s.source.asks.hears]


def _asked(groups: list[Served], consumer: int, last: bool) -> tuple[str, ...]:
    """Kinds of message that a producer's sources ask of a consumer."""
    kinds: dict[str, None] = {}
    for group in groups:
        for kind in _kinds([group]):
            if last if kind == "error" else consumer in group.consumers:
                kinds[kind] = None
    return tuple(kinds)
