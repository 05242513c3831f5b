"""What is trained for: the loss, what it says of single samples, and how well it is predicted."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..reports.steps import InterfaceReport
from .emitted import evaluate

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Objective:
    """The user's loss, and what sources see of the target.

    Attributes:
        loss: ``loss(output, target)``, a scalar tensor.
        accumulate: how many steps' gradients make one update; each loss counts 1 / accumulate.
        encoder: gives what turns a target into what sources see, asked at every step; that is None
            where they see nothing.
    """

    loss: Loss
    accumulate: int = 1
    encoder: Callable[[], Callable[[Any], Tensor] | None] = lambda: None

    def scaled(self, output: Any, target: Any) -> Tensor:
        """The loss that is pulled back.

        Raises:
            DecouplingError: a loss that is no scalar, or has no graph.
        """
        value = evaluate(self.loss, output, target)
        return value / self.accumulate if self.accumulate > 1 else value

    def context(self, target: Any) -> Tensor | None:
        """What sources see of a target."""
        encode = self.encoder()
        return None if encode is None or target is None else encode(target)


@dataclass
class Metrics:
    """When predictions are compared with their targets, and what was found.

    Attributes:
        every: in steps.
        requested: whether the next step compares, whatever ``every`` says.
        found: the newest report of each interface.
    """

    every: int
    requested: bool = False
    found: dict[str, InterfaceReport] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        """Whether a step compares."""
        return self.requested or step % self.every == 0


def logits_of(output: Any) -> Tensor | None:
    """The output itself, or what it calls its logits (as an attribute or key); None where there is
    no such tensor.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


def sample_losses(loss: Callable[..., Tensor], output: Any, target: Any) -> Tensor:
    """Each sample's own loss, its mean over positions that count.

    Losses of torch give them by ``reduction="none"``; other callables are asked one sample at a
    time.

    Args:
        loss: ``loss(output, target)``.
        output: the model's output, ``(batch, ...)``, or a nesting of such tensors.
        target: the target, likewise.

    Returns:
        ``(batch,)``, without a graph.

    Raises:
        DecouplingError: neither way is possible.
    """
    loss = getattr(loss, "_orig_mod", loss)  # a compiled loss shares its attributes with that
    takes = _parameters(loss)
    default = takes["ignore_index"].default if "ignore_index" in takes else None
    index = getattr(loss, "ignore_index", None)
    index = default if index is None else index
    with torch.no_grad():
        if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
            unreduced: Any = copy.copy(loss)
            unreduced.reduction = "none"
            return _per_sample(unreduced(output, target), target, index)
        if "reduction" in takes:
            return _per_sample(loss(output, target, reduction="none"), target, index)
        try:
            pairs = zip(_samples(output), _samples(target), strict=True)
            each = torch.stack([loss(o, t).reshape(()) for o, t in pairs])
            return each.nan_to_num(posinf=math.inf, neginf=-math.inf)
        except Exception as error:
            raise DecouplingError(
                "a source asks for each sample's loss, but the loss can not be had sample by "
                f"sample ({error}): it must take reduction='none', or output and target of one "
                "sample, each tensor (batch, ...); or use a source that needs no losses, such as "
                "'local' or 'linear'"
            ) from error


def _samples(value: Any) -> list[Any]:
    """Batches of one sample each, of a tensor or a nesting of tensors that all have a batch.

    Raises:
        DecouplingError: one of them has none: what it says of the whole batch is no sample's.
    """
    leaves, structure = flatten(value)
    sizes = {len(leaf) if leaf.dim() else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(leaf.shape) for leaf in leaves] or type(value).__name__
        raise DecouplingError(f"not all of it has a first dimension that is the batch's: {shapes}")
    count = len(leaves[0])
    return [structure.build(iter([leaf[i : i + 1] for leaf in leaves])) for i in range(count)]


def _parameters(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return {}


def _per_sample(losses: Tensor, target: Any, index: Any) -> Tensor:
    """The mean over what is left when labels called ``index`` count nothing."""
    if losses.dim() == 0:
        raise DecouplingError(
            "a source asks for each sample's loss, but with reduction='none' the loss is one "
            "number; it must be (batch, ...)"
        )
    flat = losses.reshape(len(losses), -1)
    classes = isinstance(target, Tensor) and not target.is_floating_point()
    if not classes or not isinstance(index, int) or target.shape != losses.shape:
        return flat.mean(1)
    return flat.sum(1) / (target != index).reshape(len(losses), -1).sum(1).clamp(min=1)
