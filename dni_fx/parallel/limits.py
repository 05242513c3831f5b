"""How far stages that run at once may drift apart."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DecouplingError

POLICIES = ("wait", "drop_oldest")


@dataclass(frozen=True)
class Flow:
    """How far stages may drift apart.

    Attributes:
        queue: how many values of a stage may be under way to each stage that takes them, not
            answered yet.
        policy: what a stage does where so many are: ``"wait"``, or go on with ``"drop_oldest"``:
            the newest ``queue`` values are kept until there is room, older ones are never sent, and
            their batches are left out by the stage that they were for.
        staleness: how many steps after a batch its answers are learnt from, neither before nor
            later, which makes a run repeatable bit for bit; None: as soon as they are there.
        discount: what comes d steps late counts ``discount ** d`` in a source's regression.

    Raises:
        DecouplingError: a number out of range, an unknown policy, or one that contradicts a fixed
            staleness.
    """

    queue: int = 4
    policy: str = "wait"
    staleness: int | None = None
    discount: float = 1.0

    def __post_init__(self) -> None:
        if type(self.queue) is not int or self.queue < 1:
            raise DecouplingError(
                f"queue must be a whole number of batches, at least 1, not {self.queue!r}"
            )
        if self.policy not in POLICIES:
            raise DecouplingError(f"policy must be 'wait' or 'drop_oldest', not {self.policy!r}")
        if self.staleness is not None:
            if type(self.staleness) is not int or self.staleness < 0:
                raise DecouplingError(
                    f"staleness must be a whole number of steps, 0 or more, not {self.staleness!r}"
                )
            if self.policy != "wait":
                raise DecouplingError(
                    "a fixed staleness waits for its answers: it needs policy='wait'"
                )
        if not isinstance(self.discount, int | float) or not 0 < self.discount <= 1:
            raise DecouplingError(f"discount must be above 0 and at most 1, not {self.discount!r}")
