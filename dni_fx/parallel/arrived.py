"""Answers between stages that see nothing of each other: what they hold, and what has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..runtime.answers import Answers, mean_of
from ..runtime.batch_state import BatchState, Setting
from ..sources import Served
from ..sources.base import like
from .routes import Routes


@dataclass(frozen=True)
class Answer:
    """What one stage says to another about one batch.

    Attributes:
        gradients: for the values that it took; in a locked step with what later users answered.
        parts: in a locked step, of these what this stage alone added.
        estimates: losses ``(batch,)`` or logits, by kind.
        error: the loss's gradient for the output's logits, from the last stage.
    """

    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    estimates: dict[str, Tensor] = field(default_factory=dict)
    error: Tensor | None = None


class ArrivedAnswers(Answers):
    """What other stages have answered to one stage about one batch.

    Args:
        setting: what holds for the batch.
        state: what is known of it in this stage.
        index: of the stage.
        routes: who answers whom.

    Attributes:
        heard: stages that have answered, or will not.
        lost: those of them that have nothing to say.
    """

    def __init__(self, setting: Setting, state: BatchState, index: int, routes: Routes) -> None:
        super().__init__(setting, state)
        self.index, self.routes = index, routes
        self.heard: set[int] = set()
        self.lost: set[int] = set()
        self._estimates: dict[tuple[str, int], Tensor] = {}
        self._gradients: dict[tuple[str, int], Tensor | None] = {}

    # ---- answers come ----------------------------------------------------------------------------

    def hear(self, stage: int, answer: Answer | None) -> None:
        """An answer has come; None where that stage was not updated with this batch."""
        self.heard.add(stage)
        if answer is None:
            self.lost.add(stage)
            return
        progress, locked = self.state.progress, self.setting.share > 0
        for name, gradient in answer.gradients.items():
            self._gradients[name, stage] = gradient
            if gradient is not None and not locked:
                progress.parts[name, stage] = gradient
        progress.parts.update({(n, stage): part for n, part in answer.parts.items()})
        self._estimates.update({(k, stage): e for k, e in answer.estimates.items()})
        if answer.error is not None:
            self.state.error = answer.error
        for interface in self.setting.split.interfaces:
            name = interface.name
            if locked:
                if (name, stage) in self._gradients:
                    progress.gradients[name] = self._gradients[name, stage]
            elif interface.producer == self.index:
                users = interface.consumers
                if set(users) <= self.heard - self.lost:
                    progress.gradients[name] = self._total(name, users)

    def _total(self, name: str, users: tuple[int, ...]) -> Tensor | None:
        total = None
        for gradient in (self._gradients.get((name, c)) for c in users):
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return total

    def lose(self) -> None:
        """Nothing more is to come."""
        missing = self.routes.answering - self.heard
        self.heard |= missing
        self.lost |= missing

    @property
    def is_complete(self) -> bool:
        """Whether everybody who answers has done so."""
        return self.routes.answering <= self.heard

    # ---- what this stage answers -----------------------------------------------------------------

    def answer(self, stage: int) -> tuple[bool, Answer | None]:
        """What to send back to a stage, once it is known.

        Returns:
            Whether it is known, and the answer; None where there is nothing to say.
        """
        setting, progress, index = self.setting, self.state.progress, self.index
        locked = setting.share > 0
        if not locked and index not in setting.active:
            return True, None
        if index not in progress.finished:
            gone = not locked and index not in progress.tapes  # its own answer cannot come any more
            return gone, None
        asked = self.routes.asked[stage]
        estimates = {k: self.estimate(k, index) for k in asked if k in ("loss", "logits")}
        known = {k: e for k, e in estimates.items() if e is not None}
        if len(known) < len(estimates):
            return bool(self.lost) and self.is_complete, None
        error = self.state.error if "error" in asked and index == setting.last else None
        return True, Answer(self._gradients_for(stage), self._parts_for(stage), known, error)

    def _gradients_for(self, stage: int) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        locked, chain = self.setting.share > 0, self.routes.chain
        for interface in self.setting.split.interfaces:
            name = interface.name
            before = chain[name][0] if name in chain else interface.producer
            if self.index in interface.consumers and before == stage:
                gradient = self.state.progress.gradients.get(name)
                if gradient is not None and not locked:  # in the value's own layout, as .grad is
                    gradient = like(gradient, self.state.known()[name])
                found[name] = gradient
        return found

    def _parts_for(self, stage: int) -> dict[str, Tensor]:
        if self.setting.share == 0:
            return {}
        sent = [i.name for i in self.setting.split.interfaces if i.producer == stage]
        parts = self.state.progress.parts
        return {n: parts[n, self.index] for n in sent if (n, self.index) in parts}

    # ---- what the sources ask --------------------------------------------------------------------

    def has_answered(self, stage: int) -> bool:
        """Whether a stage has sent back its gradients."""
        return stage in self.heard - self.lost

    def has_heard(self, group: Served) -> bool:
        """Whether every consumer has sent its gradient."""
        return super().has_heard(group) if self.setting.share == 0 else self.is_complete

    def cannot_hear(self, group: Served) -> bool:
        """Whether a consumer was not updated with this batch, or its answer is lost."""
        return bool(self.lost & set(group.consumers))

    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether somebody who was to answer did not."""
        hears = any(k != "error" for k in kinds)
        return (hears and self.cannot_hear(group)) or (
            "error" in kinds and self.routes.error_from in self.lost
        )

    def is_there(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether everything of these kinds has come."""
        estimated = [k for k in kinds if k in ("loss", "logits")]
        estimates = [self.estimate(k, c) for k in estimated for c in group.consumers]
        return all(e is not None for e in estimates) and super().is_there(group, kinds)

    def is_ready(self, group: Served) -> bool:
        """Whether what a source waits for has come, or never will."""
        kinds = group.source.asks.awaited
        return self.is_lost(group, kinds) or self.is_there(group, kinds)

    def estimate(self, kind: str, stage: int) -> Tensor | None:
        """As the stage answered; of this one, from its own sources, else from what came."""
        if stage != self.index or (kind, stage) in self._estimates:
            return self._estimates.get((kind, stage))
        if self.index == self.setting.last:
            if self.state.loss is None:
                return None
            self._estimates[kind, stage] = self.true(kind)
            return self._estimates[kind, stage]
        own = self.predicted(kind, self.setting.by_producer[self.index])
        if own:
            return mean_of(own)
        behind = [self._estimates.get((kind, c)) for c in self.routes.consumers]
        found = [e for e in behind if e is not None]
        return None if not found or len(found) < len(behind) else mean_of(found)
