"""A model that is traced again and again is slow, and is said to be."""

from __future__ import annotations

import collections
import warnings

import torch

from ..passes.trace.held import broken
from .nested import Structure
from .variants import Variant

_OFTEN = 12  # traces of any kind
_ANNEALED = 4  # because of one plain value
_LEVEL = 4  # of whoever has called


class Retraces:
    """Counts the traces of one model, and warns once.

    Args:
        name: of the model's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._traced = 0
        self._changed: collections.Counter[str] = collections.Counter()  # plain values, by place
        self._said = False

    def count(
        self, active: Variant | None, structure: Structure, leaves: list[torch.Tensor]
    ) -> None:
        """The model is traced, since the graph of the call before does not fit.

        Args:
            active: that graph; None at the first call.
            structure: of the inputs.
            leaves: their tensors.
        """
        self._traced += 1
        if active is None or self._said:
            return
        changed = broken(active.trace.held)
        if changed is not None:
            self._changed[changed.place] += 1
            if self._changed[changed.place] == _ANNEALED:
                self._say(
                    f"{_ANNEALED} times because of {changed.place}, each time for another value"
                    f"{changed.values()}, and a trace costs far more than a step. Keep a number "
                    "that changes from step to step in a buffer: self.register_buffer(name, "
                    "torch.tensor(1.0)), and fill_ it"
                )
        elif self._traced >= _OFTEN:
            self._say(
                f"{self._traced} times; this time because of {active.objection(structure, leaves)},"
                " which differs from the call before: what changes in every call had better be a "
                "tensor (a buffer, an input) than a plain value"
            )

    def _say(self, what: str) -> None:
        self._said = True
        warnings.warn(f"{self._name} has been traced {what}", stacklevel=_LEVEL)
