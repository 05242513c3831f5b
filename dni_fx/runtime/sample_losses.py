"""What a loss says of single samples, and what an output calls its logits."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError


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
