"""Optimisers that threads step with the settings that the caller had set when a step was posted.

A scheduler changes rates between two calls of ``step``, while stages are still at work on earlier
batches. So a thread steps a double of the user's optimiser: parameters and states are the same,
the settings are its own, and what the caller has changed travels with the batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

Changes = dict[int, dict[str, Any]]  # by group


class Posted:
    """One optimiser, and its double that a thread steps.

    Args:
        optimizer: the user's.

    Attributes:
        double: steps the same parameters, with the settings of the newest batch that was taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.double: torch.optim.Optimizer = object.__new__(type(optimizer))
        vars(self.double).update(vars(optimizer))
        vars(self.double).pop("step", None)  # that of the original, where a scheduler counts calls
        self.double.param_groups = [_copied(group) for group in optimizer.param_groups]
        self._known = [_copied(group) for group in optimizer.param_groups]

    def post(self) -> Changes:
        """What the caller has changed since the last batch; in the caller's thread."""
        found: Changes = {}
        for index, group in enumerate(self.optimizer.param_groups):
            known = self._known[index] if index < len(self._known) else {}
            changed = {n: v for n, v in group.items() if n not in known or _differ(v, known[n])}
            if changed:
                found[index] = _copied(changed)
                self._known[index : index + 1] = [known | _copied(changed)]
        return found

    def take(self, changes: Changes) -> None:
        """A batch begins, for which this holds; in the stage's thread."""
        self.double.state = self.optimizer.state  # another one, once a state was loaded
        groups = self.double.param_groups
        for index, changed in changes.items():
            if index < len(groups):
                groups[index].update(changed)
            else:
                groups.append(changed)

    def step(self) -> None:
        """Step the double; what it changes in its settings itself is the original's, too."""
        before = [_copied(group) for group in self.double.param_groups]
        self.double.step()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it
        for index, (old, group) in enumerate(zip(before, self.double.param_groups, strict=True)):
            own = {n: v for n, v in group.items() if n not in old or _differ(v, old[n])}
            if own:
                self.optimizer.param_groups[index].update(_copied(own))
                self._known[index].update(_copied(own))


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    """Settings with tensors of their own, and the same parameters."""
    return {n: v if n in ("params", "param_names") else _copy(v) for n, v in group.items()}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return one is not other and bool(one != other)
