"""What loss heads are made of: encoders, a loss with known gradients, and a running scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .layers import make_norms
from .regression import Network, Regression, Shaped

# channels of hidden layers, unless asked for: twice 1024 channels would cost more than their stage
WIDEST = 256


class Encoder(Shaped):
    """One value as features at the positions that the context has; arguments as for
    :class:`~dni_fx.sources.LossHead`.
    """

    def __init__(
        self,
        spec: TensorSpec,
        hidden: int | None,
        width: int | None,
        stride: int,
        norm: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(spec)
        features = self.features
        hidden = (2 if self.space else 1) if hidden is None else hidden
        if self.space:
            first = min(features * stride, WIDEST) if width is None else width
            widths = [min(first * stride**i, max(first, WIDEST)) for i in range(hidden)]
        else:
            widths = [max(features, 64) if width is None else width] * hidden
        norms = make_norms(norm, widths if self.space else (), dtype)
        blocks: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise([features, *widths])):
            if self.space:
                convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.space - 1]
                blocks.append(convolution(a, b, 3, stride, 1, bias=not norms, dtype=dtype))
            else:
                blocks.append(nn.Linear(a, b, dtype=dtype))
            blocks += [*norms[i : i + 1], nn.ReLU()]
        self.blocks, self.outputs = nn.Sequential(*blocks), [features, *widths][-1]

    def forward(self, value: Tensor, context: tuple[int, ...]) -> Tensor:
        """Features, as many dimensions as a context of that shape has, of its sizes or 1."""
        self.line_up(tuple(value.shape), context)
        h: Tensor = self.blocks(value if value.dim() > 1 else value[:, None])
        h = h.movedim(1, -1) if self.space else h
        rank = len(context)
        if once := [i for i in range(1, min(rank, h.dim()) - 1) if context[i] == 1 < h.shape[i]]:
            h = h.mean(once, keepdim=True)
        if h.dim() > rank:
            h = h.mean(tuple(range(rank - 1, h.dim() - 1)))
        return h[(..., *(None,) * (rank - h.dim()), slice(None))]

    def line_up(self, shape: tuple[int, ...], context: tuple[int, ...]) -> None:
        """Refuse a value of another kind, or one that does not line up with the context."""
        full = self.check(shape)
        lead = full[:1] + full[2:] if self.space else full[:-1]
        pairs = zip(lead, context[:-1], strict=False)
        if any(have != want and 1 not in (have, want) for have, want in pairs):
            raise DecouplingError(
                f"a context of shape {context} does not line up with a value of shape {shape} "
                f"(features in dimension {self.feature_dim}): its sizes must match {lead} from the "
                "left, each equal or 1. Return such a shape from context=<callable>, or use "
                "'linear' or 'delayed' here."
            )


class HandedOver(torch.autograd.Function):
    """A loss whose gradients for some parameters are known already; None of those without one."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        return None, None, *(None if g is None else above[0] * g for g in ctx.gradients)


class RunningScale(Regression):
    """A regression without networks: the scale of gradients that are computed elsewhere."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        super().__init__(specs, None, Network)  # the networks' base has no parameters

    def compare(self, gradients: Sequence[Tensor], message: Sequence[Tensor]) -> Tensor:
        """As :meth:`fit`, of gradients that are in no units yet."""
        targets, inverses = self.rescale(gradients, message)
        errors = [
            F.mse_loss(gradient.to(target.dtype) * inverse, target * inverse)
            for gradient, target, inverse in zip(gradients, targets, inverses, strict=True)
        ]
        return torch.stack(errors).sum()
