"""What comes back to a source from the stages behind it: gradients, losses, logits, the output's
error.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import DecouplingError
from ..sources import Served, awaited_kinds

if TYPE_CHECKING:
    from .in_turn import Run


class Messages:
    """The messages of one batch.

    A message about losses or logits is what the sources of the consuming stages estimate, in the
    mean where there are several; where they estimate nothing it comes from the stages behind these,
    at last from the true output.
    """

    def __init__(self, run: Run) -> None:
        self.run: Run = weakref.proxy(run)  # no circle: a batch's tensors go when the batch does
        self.last = len(run.stages) - 1
        self.known: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, group: Served, kinds: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        """Everything of these kinds that comes back to a source, in their order."""
        message: list[torch.Tensor] = []
        for kind in kinds:
            if kind == "gradient":
                message += self.gradients(group)
            elif kind == "error":
                assert self.run.error is not None
                message.append(self.run.error)
            else:
                estimates = [self._estimate(kind, c) for c in group.consumers]
                message.append(_mean([e for e in estimates if e is not None]))
        return tuple(message)

    def gradients(self, group: Served) -> tuple[torch.Tensor, ...]:
        """What arrived for each value; zeros where nothing did."""
        found = [self.run.gradients.get(n) for n in group.names]
        pairs = zip(group.names, found, strict=True)
        return tuple(torch.zeros_like(self.run.sent[n]) if g is None else g for n, g in pairs)

    def has_gradients(self, group: Served) -> bool:
        """Whether every consumer has sent its gradient."""
        return self.run.has_heard(group)

    def is_there(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether everything of these kinds can be had now."""
        return (
            not self.is_lost(group, kinds)
            and ("gradient" not in kinds or self.has_gradients(group))
            and ("error" not in kinds or self.run.error is not None)
        )

    def awaited_since(self, group: Served) -> int | None:
        """The step in which the last part of what a source waits for came; None before."""
        kinds = awaited_kinds(group.source)
        if not self.is_there(group, kinds):
            return None
        return (
            max(self.run.finished[c] for c in group.consumers)
            if "gradient" in kinds
            else self.run.started
        )

    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether a message can never come, since a stage that it needs is not updated with this
        batch.
        """
        run = self.run
        if run.share > 0:
            return False
        if "gradient" in kinds and run.cannot_hear(group):
            return True
        if "error" in kinds and self.last not in run.active:
            return True
        return any(
            self._estimate(k, c) is None
            for k in kinds
            if k in ("loss", "logits")
            for c in group.consumers
        )

    def _estimate(self, kind: str, stage: int) -> torch.Tensor | None:
        """Losses ``(batch,)`` or logits as estimated behind a stage's inputs; None where that stage
        is not run.
        """
        if (kind, stage) in self.known:
            return self.known[kind, stage]
        if stage == self.last:
            if self.run.loss is None:
                return None
            found = self._true(kind)
        else:
            groups = self.run.by_producer[stage]
            answers = [
                self.run.predictions[s.name] for s in groups if s.name in self.run.predictions
            ]
            own = [a.loss if kind == "loss" else a.logits for a in answers]
            estimates = [e for e in own if e is not None]
            if not estimates:
                behind = [self._estimate(kind, c) for s in groups for c in s.consumers]
                estimates = [e for e in behind if e is not None]
            if not estimates:
                return None
            found = _mean(estimates)
        self.known[kind, stage] = found
        return found

    def _true(self, kind: str) -> torch.Tensor:
        run = self.run
        if kind == "loss":
            return sample_losses(run.plain_loss, run.output, run.target)
        found = logits_of(run.output)
        if found is None:
            raise DecouplingError(
                "a source asks for the model's output as logits, but it is a "
                f"{type(run.output).__name__}, neither a tensor nor anything with a tensor called "
                "'logits'; use a source that does not, such as 'local'"
            )
        return found


def logits_of(output: Any) -> torch.Tensor | None:
    """The output itself, or what it calls its logits (as an attribute or key); None where there is
    no such tensor.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, torch.Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, torch.Tensor) else None


def sample_losses(loss: Callable[..., torch.Tensor], output: Any, target: Any) -> torch.Tensor:
    """Each sample's own loss, its mean over positions that count.

    Losses of torch give them by ``reduction="none"``; other callables are asked one sample at a
    time.

    Args:
        loss: ``loss(output, target)``.
        output: the model's output, ``(batch, ...)``.
        target: the target, ``(batch, ...)``.

    Returns:
        ``(batch,)``, without a graph.

    Raises:
        DecouplingError: neither way is possible.
    """
    loss = getattr(
        loss, "_orig_mod", loss
    )  # a compiled loss shares its attributes with the original
    ignored = _ignored(loss, target)
    with torch.no_grad():
        if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
            unreduced: Any = copy.copy(loss)
            unreduced.reduction = "none"
            return _per_sample(unreduced(output, target), ignored)
        if _takes(loss, "reduction"):
            return _per_sample(loss(output, target, reduction="none"), ignored)
        try:
            count = len(output)
            each = [loss(output[i : i + 1], target[i : i + 1]) for i in range(count)]
            return torch.stack([e.reshape(()) for e in each]).nan_to_num(
                posinf=math.inf, neginf=-math.inf
            )
        except Exception as error:
            raise DecouplingError(
                "a source asks for each sample's loss, but the loss can not be had sample by "
                f"sample ({error}): it must take reduction='none', or slices of output and target; "
                "or use a source that needs no losses, such as 'local' or 'linear'"
            ) from error


def _takes(loss: Callable[..., Any], argument: str) -> bool:
    try:
        return argument in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


def _ignored(loss: Callable[..., Any], target: Any) -> torch.Tensor | None:
    """Which labels a loss of classes leaves out of its mean; None where it does not say."""
    index = getattr(loss, "ignore_index", None)
    if index is None:
        with contextlib.suppress(TypeError, ValueError):
            index = (
                inspect.signature(loss).parameters["ignore_index"].default
                if _takes(loss, "ignore_index")
                else None
            )
    if (
        not isinstance(index, int)
        or not isinstance(target, torch.Tensor)
        or target.is_floating_point()
    ):
        return None
    return target == index


def _per_sample(losses: torch.Tensor, ignored: torch.Tensor | None) -> torch.Tensor:
    if losses.dim() == 0:
        raise DecouplingError(
            "a source asks for each sample's loss, but with reduction='none' the loss is one "
            "number; it must be (batch, ...)"
        )
    if ignored is None or ignored.shape != losses.shape:
        return losses.reshape(len(losses), -1).mean(1)
    kept = (~ignored).reshape(len(losses), -1)
    return losses.reshape(len(losses), -1).sum(1) / kept.sum(1).clamp(min=1)


def _mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)
