"""What is trained for, and how often it is looked at how well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
