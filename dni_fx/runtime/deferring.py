"""The finite check looked at one step later, so that the host does not wait for the device.

A step that was not finite must leave nothing behind. Optimisers cannot be told on the device that
an update is not to happen, without code for each of them, so an eager step is undone from copies of
what it changed, which are made on the device as well; in a compiled step the choice is part of the
graph, and each one takes the verdict on the one before. Either way the step is then made again with
the check at once, which names the place: good steps pay for no more than the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError


class SpoiltError(Exception):
    """Ends a step in which it is found that the one before was not finite."""


class Verdict:
    """Whether a step was finite, on its way to the host.

    Args:
        tensor: the answer, a bool without dimensions, on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._home = tensor, tensor
        self._there: Any = None
        if tensor.device.type != "cpu":
            home = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._home = home.copy_(tensor, non_blocking=True)
            self._there = torch.Event(tensor.device)
            self._there.record()

    def read(self) -> bool:
        """The answer; waits for the step that it is about, and for nothing that came after."""
        if self._there is not None:
            self._there.synchronize()
        return bool(self._home)


@dataclass(frozen=True)
class Unseen:
    """A step whose verdict nobody has looked at.

    Attributes:
        verdict: whether it was finite.
        undo: puts everything back to where it was before.
        again: makes it again, with the check at once.
    """

    verdict: Verdict
    undo: Callable[[], None]
    again: Callable[[], Any]


class Deferral:
    """The last step, until it is known to be finite.

    Attributes:
        last: that step; None where all is known.
    """

    last: Unseen | None = None

    @property
    def is_fine(self) -> bool:
        """Whether the last step was finite, as far as it has not been looked at."""
        return self.last is None or self.last.verdict.read()

    def look_back(self) -> None:
        """Raises: SpoiltError: the last step was not finite."""
        if not self.is_fine:
            raise SpoiltError

    def settle(self, when: str) -> None:
        """Look at the last step; where it was not finite, undo it and make it again.

        Args:
            when: what was found to be in vain meanwhile, for the error.

        Raises:
            NonFiniteError: made again it is not finite, either, and everything is as before it.
        """
        last, is_fine = self.last, self.is_fine
        self.last = None
        if last is None or is_fine:
            return
        last.undo()
        try:
            last.again()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}. The check was deferred, and looked at {when}"
            ) from error
