"""A recurrent model as a function of one window, ``(x, state) -> (y, state)``, whatever it takes by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten

InitialState = Callable[[int], Any]


@dataclass(frozen=True)
class States:
    """The tensors of a recurrent state.

    Attributes:
        names: of each tensor.
        batch_dims: which of its dimensions is the batch; None for one that all samples share.
        initial: the tensors at the start of a sequence, for a batch size.
    """

    names: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    initial: Callable[[int], list[Tensor]]

    def begin_anew(self, after: list[Tensor], ended: Tensor, is_over: bool) -> list[Tensor]:
        """The state after a window, with that of a new sequence for samples whose own has ended."""
        parts = zip(after, self.initial(len(ended)), self.batch_dims, strict=True)
        return [
            (b if is_over else a) if dim is None else torch.where(along(ended, a, dim), b, a)
            for a, b, dim in parts
        ]


def along(mask: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A mask over the batch in a shape that lines up with a tensor's batch dimension."""
    return mask.view([-1 if d == dim else 1 for d in range(tensor.dim())])


class Window(nn.Module):
    """A model as ``(x, state) -> (y, state)`` over the steps of ``x``, the state as a dict of
    tensors. This one carries nothing, and its windows are plain batches; others are derived.

    Args:
        model: the user's module.
        batch_first: layout of the windows.
        initial_state: the state at the start of a sequence, for a batch size; zeros by default.

    Attributes:
        states: what is known of the state, from the first window on.
    """

    stateless: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, batch_first: bool = True, initial_state: InitialState | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.time_dim, self.batch_dim = (1, 0) if batch_first else (0, 1)
        self.initial_state = initial_state
        self.states: States | None = None

    def forward(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The model's output over a window, and the state after it.

        Args:
            x: a tensor, or a nesting of tensors, each ``(time, batch, ...)`` or ``(batch, time,
                ...)``.
            state: the state's tensors, by name.
        """
        y, after = self.run(x, list(state.values()))
        # Autocast makes a state of its own type; it goes on as what it was.
        pairs = zip(state.items(), after, strict=True)
        return y, {n: t if t.dtype == old.dtype else t.to(old.dtype) for (n, old), t in pairs}

    def known_states(self, x: Any) -> States:
        """What is known of the state, learnt of from a first window."""
        if self.states is None:
            self.states = self.find_states(x)
        return self.states

    # ---- what depends on the kind of model -------------------------------------------------------

    def run(self, x: Any, state: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """The model's output over a window, and the state after it."""
        return self.model(x), []

    def find_states(self, x: Any) -> States:
        """Learn of the state from a window.

        Raises:
            DecouplingError: it cannot be told, or is not what the model itself starts from.
        """
        return States((), (), lambda batch: [])

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """The state as users see it: as the model takes it; that of ``nn.LSTM`` and its kind by
        path where there are several.
        """
        return None

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state as users see it.

        Raises:
            DecouplingError: its structure is not the model's.
        """
        raise DecouplingError(
            f"{type(self.model).__name__} carries no state, but was given a "
            f"{type(state).__name__}: pass state=None"
        )

    # ---- the window itself -----------------------------------------------------------------------

    def check(self, x: Any, most: int | None) -> int:
        """The batch size of a window that can be run, of at most so many time steps (None: any).

        Raises:
            DecouplingError: tensors of other shapes, or too many steps.
        """
        leaves = flatten(x)[0]
        if self.stateless:
            return int(leaves[0].shape[0]) if leaves and leaves[0].dim() else 0
        time, batch = self.time_dim, self.batch_dim
        layout = "(batch, time, ...)" if time else "(time, batch, ...)"
        if not leaves or any(t.dim() < 2 for t in leaves):
            found = [tuple(t.shape) for t in leaves] or type(x).__name__
            raise DecouplingError(
                f"a window must be a tensor, or several, of shape {layout}, but is {found}"
            )
        sizes = {(t.shape[time], t.shape[batch]) for t in leaves}
        if len(sizes) > 1:
            raise DecouplingError(
                f"the tensors of a window must agree in time and batch, {layout}, but are {sizes}"
            )
        ((steps, count),) = sizes
        if steps < 1 or count < 1:
            raise DecouplingError(f"a window of shape {tuple(leaves[0].shape)}, {layout}, is empty")
        if most is not None and steps > most:
            raise DecouplingError(
                f"this window has {steps} time steps ({layout}, shape {tuple(leaves[0].shape)}), "
                f"but window={most}: split the sequence into windows of at most "
                f"{most}, for example x.split({most}, dim={time}); the last one may "
                "be shorter"
            )
        return int(count)


def stacked(values: Sequence[Any], dim: int) -> Any:
    """Nested values of one structure as one, each tensor with a dimension more."""
    taken = [flatten(value) for value in values]
    every = zip(*(leaves for leaves, _ in taken), strict=True)
    return taken[-1][1].build(iter([torch.stack(tensors, dim) for tensors in every]))
