"""What an executor knows of a batch that it runs, whatever kind it is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..reports.steps import InterfaceReport
from .batch_state import BatchState, Setting


class UnderWay(Protocol):
    """What the executor knows of a batch: a :class:`~dni_fx.runtime.in_turn.Batch`, or a window."""

    @property
    def state(self) -> BatchState:
        """What is known of it."""

    @property
    def setting(self) -> Setting:
        """What holds for it."""

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is under way any more."""

    def advance(self, now: int) -> None:
        """Pull back what waited for what is there now."""

    def learn(self) -> list[tuple[str, Tensor]]:
        """Train every source whose message is there."""

    def forget(self) -> None:
        """Drop what nothing that is still under way needs."""

    def compare(self, step: int) -> dict[str, InterfaceReport]:
        """How near each prediction is to what arrived."""

    def places(self) -> list[tuple[str, Tensor]]:
        """What must be finite besides values, with its name."""
