"""What comes back to a source from the stages behind it: gradients, losses, logits, the error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..sources import Served
from ..sources.base import like
from .batch_state import BatchState, Setting
from .objective import logits_of, sample_losses

ESTIMATED = ("loss", "logits")  # kinds that a stage's own sources may say, else those behind it


class Answers(ABC):
    """What has come back to the sources of one batch.

    Losses and logits are what the sources of the consuming stages estimate, in the mean where there
    are several; where they estimate nothing they come from the stages behind these, at last from
    the true output. Who has answered is known in one of two ways: of stages that share the batch's
    state (:class:`LocalAnswers`), or from what others have sent.

    Args:
        setting: what holds for the batch.
        state: what is known of it.
    """

    def __init__(self, setting: Setting, state: BatchState) -> None:
        self.setting, self.state = setting, state

    @abstractmethod
    def has_answered(self, stage: int) -> bool:
        """Whether a stage has sent back its gradients."""

    @abstractmethod
    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether a message can never come, since a stage that it needs is not updated."""

    @abstractmethod
    def is_ready(self, group: Served) -> bool:
        """Whether a source that waits can say now what to pull back, or never will."""

    @abstractmethod
    def estimate(self, kind: str, stage: int) -> Tensor | None:
        """Losses ``(batch,)`` or logits as estimated behind a stage's inputs; None if unknown."""

    def has_heard(self, group: Served) -> bool:
        """Whether everything that uses a source's values has sent its gradient."""
        return all(self.has_answered(c) for c in group.consumers)

    def is_there(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether everything of these kinds can be had now."""
        return (
            not self.is_lost(group, kinds)
            and ("gradient" not in kinds or self.has_heard(group))
            and ("error" not in kinds or self.state.error is not None)
        )

    def gradients(self, group: Served) -> tuple[Tensor, ...]:
        """What arrived for each value; zeros where nothing did."""
        arrived, sent = self.state.progress.gradients, self.state.sent
        return tuple(or_zeros(arrived.get(n), sent[n]) for n in group.names)

    def of(self, group: Served, kinds: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Everything of these kinds that comes back to a source, in their order."""
        message: list[Tensor] = []
        for kind in kinds:
            if kind == "gradient":
                pairs = zip(group.names, self.gradients(group), strict=True)
                message += [laid_out(g, self.state.sent[n]) for n, g in pairs]
            elif kind == "error":
                assert self.state.error is not None
                message.append(self.state.error)
            else:
                mean = mean_of(self.estimate(kind, c) for c in group.consumers)
                assert mean is not None
                message.append(mean)
        return tuple(message)

    def true(self, kind: str) -> Tensor:
        """Losses or logits of the model's own output.

        Raises:
            DecouplingError: the output has no logits, or the loss cannot be had sample by sample.
        """
        output = self.state.output
        if kind == "loss":
            return sample_losses(self.setting.objective.loss, output, self.state.target)
        found = logits_of(output)
        if found is None:
            raise DecouplingError(
                "a source asks for the model's output as logits, but it is a "
                f"{type(output).__name__}, neither a tensor nor anything with a tensor called "
                "'logits'; use a source that does not, such as 'local'"
            )
        return found

    def predicted(self, kind: str, groups: Sequence[Served]) -> list[Tensor]:
        """What the sources of a stage estimate themselves."""
        said = [self.state.predictions[s.name] for s in groups if s.name in self.state.predictions]
        own = [p.loss if kind == "loss" else p.logits for p in said]
        return [e for e in own if e is not None]


class LocalAnswers(Answers):
    """Of stages that run one after the other and share the batch's state."""

    def __init__(self, setting: Setting, state: BatchState) -> None:
        super().__init__(setting, state)
        self._known: dict[tuple[str, int], Tensor] = {}

    def has_answered(self, stage: int) -> bool:
        """Whether the stage was pulled back."""
        return stage in self.state.progress.finished

    def has_heard(self, group: Served) -> bool:
        """Of what has left the graph, somebody else brings the answer."""
        if group.leaves:
            return self.state.progress.heard.issuperset(group.names)
        return super().has_heard(group)

    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Never with a share of the true gradient, for which all stages run; an answer to what has
        left the graph may always come.
        """
        progress, setting = self.state.progress, self.setting
        if setting.share > 0:
            return False
        running = {*progress.finished, *progress.tapes}
        if "gradient" in kinds and not (group.leaves or running.issuperset(group.consumers)):
            return True
        if "error" in kinds and setting.last not in setting.active:
            return True
        estimated = [k for k in kinds if k in ESTIMATED]
        return any(self.estimate(k, c) is None for k in estimated for c in group.consumers)

    def is_ready(self, group: Served) -> bool:
        """As many steps after the message came as the source says."""
        state, asks = self.state, group.source.asks
        if self.is_lost(group, asks.awaited):
            return True
        if not self.is_there(group, asks.awaited):
            return False
        hears = "gradient" in asks.awaited
        answered = [state.progress.finished[c] for c in group.consumers if hears]
        return state.now >= max(answered, default=state.started) + (asks.lag or 0)

    def estimate(self, kind: str, stage: int) -> Tensor | None:
        """From the sources of the stage, else from the stages behind it, else from the output."""
        found = self._known.get((kind, stage))
        if found is None:
            found = self._estimate(kind, stage)
            if found is not None:
                self._known[kind, stage] = found
        return found

    def _estimate(self, kind: str, stage: int) -> Tensor | None:
        if stage == self.setting.last:
            return None if self.state.loss is None else self.true(kind)
        groups = self.setting.by_producer[stage]
        own = self.predicted(kind, groups)
        return mean_of(own or [self.estimate(kind, c) for s in groups for c in s.consumers])


def mean_of(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """The mean of those tensors of one shape that there are; the only one itself."""
    known = [t for t in tensors if t is not None]
    return torch.stack(known).mean(0) if len(known) > 1 else next(iter(known), None)


def or_zeros(gradient: Tensor | None, value: Tensor) -> Tensor:
    """What arrived for a value: zeros where nothing did."""
    return torch.zeros_like(value) if gradient is None else gradient


def laid_out(gradient: Tensor, value: Tensor) -> Tensor:
    """What a source hears, in the memory format of the value: on its way from another process it
    may get another one than autograd gave it, and sums over it would differ in the last bits.
    """
    return like(gradient, value) if gradient.layout is torch.strided else gradient


def added(before: Tensor | None, more: Tensor) -> Tensor:
    """What has arrived now that there is more."""
    return more if before is None else before + more
