"""One source for each consumer of a value, so that none waits for the slowest of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import GradientSource, Prediction, SourceFactory
from .making import make_source
from .naming import EACH


def is_each(option: object) -> TypeGuard[str]:
    """Whether an option asks for one source for each consumer."""
    return isinstance(option, str) and option.startswith(EACH)


def for_consumers(option: str | SourceFactory, consumers: int) -> str | SourceFactory:
    """The option itself, or for ``"each:name"`` a factory with a part for each consumer."""
    if is_each(option):
        return partial(Each, source=option.removeprefix(EACH), parts=consumers)
    return option


class Each(GradientSource):
    r"""One source for each stage that uses the value: :math:`\hat g = \sum_c \hat g_c`, each
    regressed to its own consumer's gradient :math:`\delta_c`, whenever that comes.

    A single source hears nothing before the last of its consumers has answered, since it learns
    their sum. Asked for by ``"each:linear"`` and the like. Where a value has one consumer it is
    that one source.

    Args:
        source: name or factory of the source for one consumer; one that hears gradients, and is
            pulled back at once.
        parts: number of consumers.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, section 2, for one consumer; gradients of several
        add up.
    """

    asks = Asks(per_consumer=True)

    takes_labels = True  # where what it is made of does

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        source: str | SourceFactory = "auto",
        parts: int = 1,
    ) -> None:
        super().__init__(specs, context)
        made = [make_source(source, specs, context) for _ in range(parts)]
        if any(s.asks != Asks() for s in made):
            raise DecouplingError(
                "one source for each consumer must learn from gradients and answer at once, as "
                f"'linear', 'mlp', 'conv' and 'auto' do; {type(made[0]).__name__} does not"
            )
        self.parts = nn.ModuleList(made)

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """The sum of what the parts predict."""
        predictions: list[Prediction] = []
        for part in self._every():
            self.hand_on(part)
            predictions.append(part(values, context))
        by_value = zip(*(p.gradients or () for p in predictions), strict=True)
        total = tuple(reduce(torch.add, gradients) for gradients in by_value)
        return Prediction(total, predictions)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """A single part learns from the message; several each need their own consumer's, and
        :meth:`fit_part`, so that they are refused.
        """
        if len(self.parts) > 1:
            raise DecouplingError(
                f"this source has a part for each of {len(self.parts)} consumers, whose gradients "
                "it needs one by one: call fit_part, or train with a Trainer"
            )
        return self.fit_part(0, prediction, message)

    def fit_part(
        self, place: int, prediction: Prediction, message: tuple[Tensor, ...]
    ) -> Tensor | None:
        """One consumer's part learns from that consumer's gradients."""
        return self._every()[place].fit(prediction.state[place], message)

    def flops(self) -> int:
        return sum(part.flops() for part in self._every())

    def _every(self) -> list[GradientSource]:
        return list(self.parts)  # type: ignore[arg-type]
