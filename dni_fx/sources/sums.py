"""Several sources at one cut, whose gradients are added."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import MESSAGES, Asks
from .base import GradientSource, Prediction, SourceFactory
from .making import make_source


class Sum:
    """Makes one source of several, such as ``Sum("reconstruct", "local")``: each learns as it would
    by itself, and what they predict is added.

    What other sources hear of losses and logits is the first part's that estimates them.

    Args:
        options: a name or a factory of each part, two or more; sources that answer at once.

    Raises:
        DecouplingError: fewer than two.
    """

    def __init__(self, *options: str | SourceFactory) -> None:
        if len(options) < 2:
            raise DecouplingError(
                f"Sum takes two sources or more, such as Sum('reconstruct', 'local'), not {options}"
            )
        self.options = options

    @property
    def __name__(self) -> str:
        """What a plan calls the source."""
        names = (o if isinstance(o, str) else getattr(o, "__name__", "...") for o in self.options)
        return "+".join(names)

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.options))})"

    def __call__(
        self, specs: Sequence[TensorSpec], context: TensorSpec | None = None
    ) -> GradientSource:
        """Make the source."""
        return Summed(specs, context, options=self.options)


class Summed(GradientSource):
    r"""What :class:`Sum` makes: :math:`\hat g = \sum_i \hat g_i`.

    Args:
        specs, context: as for every source.
        options: as for :class:`Sum`.

    Raises:
        DecouplingError: a part waits, or they would see different inputs.
    """

    takes_labels = True  # where what it is made of does

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        options: Sequence[str | SourceFactory],
    ) -> None:
        super().__init__(specs, context)
        made = [make_source(option, specs, context) for option in options]
        for part in made:
            asks = part.asks
            if asks.wait or asks.per_consumer or asks.exact or asks.ends or asks.jacobian:
                raise DecouplingError(
                    "a sum needs sources that answer at once, such as 'reconstruct' and 'local', "
                    f"not {type(part).__name__}. Wrap the sum instead, as "
                    "partial(Corrected, source=Sum(...)) does"
                )
        seen = sorted({p.asks.inputs for p in made if p.asks.inputs is not None})
        if len(seen) > 1:
            raise DecouplingError(
                f"the parts of a sum must see the same inputs, but ask for those of the {seen[0]} "
                f"and of the {seen[1]}: give them one target="
            )
        heard = {kind for part in made for kind in part.asks.learns_from}
        kinds, shares = tuple(k for k in MESSAGES if k in heard), any(p.asks.shares for p in made)
        self.asks = Asks(kinds, inputs=seen[0] if seen else None, shares=shares)
        self.parts = nn.ModuleList(made)

    def see_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """The parts that ask for them see them."""
        super().see_inputs(specs)
        for part in self._every():
            if part.asks.inputs is not None:
                part.see_inputs(specs)

    def predict(
        self,
        values: tuple[Tensor, ...],
        context: Tensor | None = None,
        inputs: tuple[Tensor, ...] | None = None,
    ) -> Prediction:
        """The sum of what the parts predict; ``state`` holds their predictions."""
        made: list[Prediction] = []
        for part in self._every():
            self.hand_on(part)
            made.append(part(values, context, inputs))
        by_value = zip(*(p.gradients or () for p in made), strict=True)
        total = tuple(reduce(torch.add, gradients) for gradients in by_value)
        return Prediction(total, made, _first(made, "loss"), _first(made, "logits"))

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """The sum of the parts' losses, each by the messages that it asks for."""
        given, rest = dict[str, tuple[Tensor, ...]](), message
        for kind in self.asks.learns_from:
            count = len(self.specs) if kind == "gradient" else 1
            given[kind], rest = rest[:count], rest[count:]
        losses: list[Tensor] = []
        for part, made in zip(self._every(), prediction.state, strict=True):
            heard = tuple(t for kind in part.asks.learns_from for t in given[kind])
            loss = part.fit(made, heard)
            if loss is not None and loss.requires_grad:
                losses.append(loss)
        return reduce(torch.add, losses) if losses else None

    def flops(self) -> int:
        """All parts'."""
        return sum(part.flops() for part in self._every())

    def _every(self) -> list[GradientSource]:
        return list(self.parts)  # type: ignore[arg-type]


def _first(made: Sequence[Prediction], name: str) -> Any:
    """What the first of the parts says that says anything."""
    return next((v for v in (getattr(p, name) for p in made) if v is not None), None)
