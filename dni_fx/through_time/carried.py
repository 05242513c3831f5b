"""The state between windows: who may start from it, and what must not happen to it meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..graphs.nested import flatten
from .window import States


class Carried:
    """The state that the next window starts from.

    Attributes:
        leaves: its tensors, detached; None at the start of a sequence.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] | None = None
        self._handed: list[tuple[Tensor, int]] = []  # as the last report has it, with versions
        self._shapes: dict[int, list[tuple[torch.Size, torch.dtype]]] = {}  # by batch size

    def keep(self, leaves: list[Tensor] | None = None, reported: Any = None) -> None:
        """Take the state after a window, and as the user gets it; None where sequences ended."""
        self.leaves = leaves
        self._handed = [(t, t._version) for t in flatten(reported)[0]]

    def is_same(self, state: Any) -> bool:
        """Whether a state is the one of the last report: the same memory, detached or not."""
        leaves = flatten(state)[0]
        if self.leaves is None or len(leaves) != len(self._handed):
            return False
        return all(_place(a) == _place(b) for a, (b, _) in zip(leaves, self._handed, strict=True))

    def check_untouched(self) -> None:
        """The reported state must still be what gradients flow back through."""
        if any(t._version != version for t, version in self._handed):
            raise DecouplingError(
                "report.state was written to in place, but gradients still flow back through what "
                "it was: use done= to start samples anew, or pass a new state (a clone)"
            )

    def check_fits(self, states: States, leaves: list[Tensor], batch: int) -> None:
        """What a window starts from must be as at the start of a sequence in shape and dtype."""
        if batch not in self._shapes:
            self._shapes[batch] = [(t.shape, t.dtype) for t in states.initial(batch)]
        for name, a, (shape, dtype) in zip(states.names, leaves, self._shapes[batch], strict=True):
            if a.shape != shape or a.dtype != dtype:
                raise DecouplingError(
                    f"tensor {name!r} of the state has shape {tuple(a.shape)}, {a.dtype}, but a "
                    f"window of batch {batch} needs {tuple(shape)}, {dtype}: batch and dtype may "
                    "change only where all sequences have ended (done=True, or reset())"
                )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def read_done(done: Any, batch: int, device: torch.device) -> Tensor | None:
    """Whose sequence ends, ``(batch,)``; None for nobody's.

    Args:
        done: True, False, 0 or 1, of one sample each or one for all: a tensor, an array, a list or
            a number.
        batch: number of samples.
        device: of the result.

    Raises:
        DecouplingError: something else.
    """
    if done is None or done is False:
        return None
    try:
        ended = torch.as_tensor(done)
        fits = ended.shape in ((), (batch,)) and bool(((ended == 0) | (ended == 1)).all())
        found = f"{ended.dtype}, {tuple(ended.shape)}"
    except (TypeError, ValueError, RuntimeError):
        fits, found = False, repr(done)[:40]
    if not fits:
        raise DecouplingError(
            f"done must be True or False (1 or 0), or a tensor or array of them of shape ({batch},)"
            f", one for each sample: whether its sequence ends with this window; got {found}. A "
            "sequence that ends within a window is padded to its end"
        )
    ended = ended.to(device, torch.bool).expand(batch)
    return ended if bool(ended.any()) else None
