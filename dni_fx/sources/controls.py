"""The controls, without which an accuracy table is not a result, and the marker of exact mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import GradientSource, Prediction


class Zero(GradientSource):
    """Control: ``g = 0``. Nothing crosses the interface, so what lies before it learns from nothing
    behind it.

    Source:
        The "no backprop" column of Jaderberg et al. 2016 (arXiv:1608.05343), table of feed-forward
        results.
    """

    asks = Asks(learns_from=())
    takes_labels = True  # as no context at all

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        return Prediction(tuple(torch.zeros_like(value) for value in values))


class Stale(GradientSource):
    """Control: the true gradient of the last step, whatever its batch: ``g_t = dL_{t-1}/dh_{t-1}``;
    zero at first.

    It belongs to other samples, so it shows how much of a synthesizer's success is only the right
    scale and the mean direction. Where shapes differ (a last short batch, another sequence length)
    the overlapping part is used, with zeros elsewhere. The message is kept in the ``state_dict``,
    so that a resumed run is the same run.
    """

    takes_labels = True  # as no context at all

    def __init__(self, specs: Sequence[TensorSpec], context: TensorSpec | None = None) -> None:
        super().__init__(specs, context)
        self._last: tuple[Tensor, ...] | None = None

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """The messages of the last ``fit``, cut or padded to the values' shapes."""
        if self._last is None:
            return Prediction(tuple(torch.zeros_like(value) for value in values))
        return Prediction(
            tuple(_fitted(old, value) for old, value in zip(self._last, values, strict=True))
        )

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None:
        """Remember the message; nothing learns."""
        # A clone: the caller may go on adding to its tensors.
        self._last = tuple(gradient.detach().clone() for gradient in message)

    def get_extra_state(self) -> dict[str, list[Tensor] | None]:
        """The remembered messages, in a form that ``torch.load(weights_only=True)`` reads."""
        return {"messages": None if self._last is None else list(self._last)}

    def set_extra_state(self, state: Any) -> None:
        """Take over the messages of a checkpoint; they move to the values' device when used."""
        messages = state["messages"]
        self._last = None if messages is None else tuple(gradient.clone() for gradient in messages)


class Exact(GradientSource):
    """Marker of exact mode, which the trainer runs: stages locked, true gradients, as backprop."""

    asks = Asks(exact=True)
    takes_labels = True  # as no context at all

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Refuse: there is nothing to predict.

        Raises:
            DecouplingError: always.
        """
        raise DecouplingError(
            "gradients='exact' has no gradients before the later stages have run: exact mode is "
            "run by Trainer.step, for the whole model only. Call Trainer.step, or use another "
            "source, such as 'linear' or 'stale'."
        )

    def flops(self) -> int:
        """None at all: exact mode is backprop."""
        return 0


def _fitted(old: Tensor, value: Tensor) -> Tensor:
    """``old`` in the shape of ``value``: the overlap, zeros elsewhere."""
    result = torch.zeros_like(value)
    if old.dim() == value.dim():
        overlap = tuple(slice(min(a, b)) for a, b in zip(old.shape, value.shape, strict=True))
        result[overlap] = old[overlap].to(value)
    return result
