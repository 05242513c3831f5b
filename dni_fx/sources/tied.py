"""A head of a language model's own norm and unembedding, a few tokens at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import GradientSource, Prediction, like, wide_dtype
from .head_networks import HandedOver

MOST = 2**22  # logits that exist at once, unless asked for otherwise


class Tied(GradientSource):
    r"""The label loss of what the model's own last layers make of a value: :math:`p = U
    \operatorname{norm}(h + A h + b)`.

    :math:`U` and the norm are the model's, by reference and as they are now; the head does not
    train them. It learns :math:`A` and :math:`b`, which start at zero. Logits are made of a few
    tokens at a time, forward and backward, so that those of a large vocabulary never exist at once;
    so the norm must be one of each token by itself.

    The context holds the labels themselves, ``dni_fx.one_hot(vocabulary, positions=1, shift=1,
    sparse=True)``; negative ones are ignored. Since it reads weights that another stage trains,
    stages must run in turn in one process; with ``share=False`` the head has copies of its own,
    which it trains, and runs anywhere.

    Args:
        specs: the value served, ``(batch, *positions, features)``; one.
        context: the labels, ``(batch, *positions, 1)``, integers. Required.
        output: the model's unembedding, from features to logits.
        norm: what the model does before that; None for nothing.
        share: whether the layers are the model's own; else copies, as they are when it is made.
        tokens: how many have logits at once; by default as many as make four million logits.
        factor: multiplies the gradients on use.

    Raises:
        DecouplingError: several values, maps, or a context that does not hold labels; what is no
            module.

    Source:
        Belrose et al. 2023, arXiv:2303.08112 (the tuned lens); that it trains the stage is greedy
        learning, Belilovsky et al. 2019, arXiv:1901.08164.
    """

    takes_labels = True

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        output: nn.Module,
        norm: nn.Module | None = None,
        share: bool = True,
        tokens: int | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__(specs, context)
        layers = [layer for layer in (norm, output) if layer is not None]
        if output is None or not all(isinstance(layer, nn.Module) for layer in layers):
            raise DecouplingError(
                "Tied takes modules of the model: partial(dni_fx.sources.Tied, norm=model.norm, "
                "output=model.lm_head)"
            )
        spec = self.specs[0]
        if context is None or context.dtype.is_floating_point or context.shape[-1] != 1:
            raise DecouplingError(
                "Tied needs the labels themselves as context, integers (batch, *positions, 1): "
                "pass context=dni_fx.one_hot(vocabulary, positions=1, shift=1, sparse=True)"
            )
        if len(self.specs) > 1 or spec.feature_dim == 1 or len(spec.shape) != len(context.shape):
            shapes = ", ".join(str(s.shape) for s in self.specs)
            raise DecouplingError(
                f"Tied serves one value (batch, *positions, features) whose positions have labels, "
                f"{tuple(context.shape[:-1])} here, not {shapes}"
            )
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise DecouplingError(f"tokens= is how many have logits at once, not {tokens!r}")
        self.asks = Asks(learns_from=(), shares=share)
        # In a tuple, since they belong to the model: no part of this module's state.
        self._shared = tuple(layers)
        self.own = nn.ModuleList(() if share else map(copy.deepcopy, layers))
        features, dtype = spec.shape[-1], wide_dtype(self.specs)
        self.translate = nn.Linear(features, features, dtype=dtype)
        for parameter in self.translate.parameters():
            nn.init.zeros_(parameter)
        self.tokens, self.factor = tokens, factor

    @property
    def _layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.own) or self._shared

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Gradients of the mean loss; ``state`` is that, with the graph of what learns.

        Raises:
            DecouplingError: labels that do not lie at the value's positions.
        """
        value = values[0]
        if context is None or context.shape != (*value.shape[:-1], 1):
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            raise DecouplingError(
                f"a head for a value of shape {tuple(value.shape)} needs labels of shape "
                f"{(*value.shape[:-1], 1)}, but got {got}: the label of each position, "
                "ignored ones negative, as one_hot(..., shift=1, sparse=True) makes them"
            )
        rows, labels = value.detach().reshape(-1, value.shape[-1]), context.reshape(-1)
        known = labels >= 0
        counts = known.view(len(value), -1).sum(1)
        scale = 1 / counts.sum().clamp(min=1)
        learnt = [p for p in self.parameters() if p.requires_grad and torch.is_grad_enabled()]
        found, losses, sums = torch.empty_like(rows), [], [torch.zeros_like(p) for p in learnt]
        for first in range(0, len(rows), self._at_once()):
            part = slice(first, first + self._at_once())
            with torch.enable_grad():
                leaf = rows[part].to(self.translate.weight.dtype).requires_grad_()
                each = self._losses(leaf, labels[part])
                wanted = torch.autograd.grad(each.sum() * scale, (leaf, *learnt))
            found[part] = wanted[0].to(found.dtype) * (self.unit * self.factor)
            losses.append(each.detach())
            for total, gradient in zip(sums, wanted[1:], strict=True):
                total += gradient
        every = torch.cat(losses)
        mean = every.sum() * scale
        if learnt:
            mean = HandedOver.apply(mean, tuple(sums), *learnt)
        by_sample = every.view(len(value), -1).sum(1) / counts.clamp(min=1)
        return Prediction((like(found.view(value.shape), value),), mean, by_sample)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """The mean label loss; its gradient was found with that for the value."""
        mean: Tensor = prediction.state
        return mean if mean.requires_grad else None

    def _losses(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Each token's loss; 0 of one without a label."""
        made = rows + self.translate(rows)
        weight = next(self._layers[-1].parameters(), made)
        made = made.to(weight.dtype)
        for layer in self._layers:
            made = layer(made)
        return F.cross_entropy(
            made.to(rows.dtype), labels.clamp(min=-1), ignore_index=-1, reduction="none"
        )

    def _at_once(self) -> int:
        if self.tokens is not None:
            return self.tokens
        sizes = [len(p) for p in self._layers[-1].parameters() if p.dim() > 1]
        return max(1, MOST // max(sizes, default=1))

    def flops(self) -> int:
        """Forward, and backward to the value, of all tokens; and the backward of what learns."""
        tokens, features = math.prod(self.specs[0].shape[:-1]), self.specs[0].shape[-1]
        layers = sum(p.numel() for part in self._layers for p in part.parameters() if p.dim() > 1)
        trained = layers if len(self.own) else 0
        return 2 * tokens * (2 * layers + trained + 3 * features**2)
