"""The state that a recurrent model carries from window to window, where it takes it itself or has
none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import Structure, flatten
from ..passes.trace.naming import leaf_keys
from ..passes.trace.state import restored

InitialState = Callable[[int], Any]


@dataclass(frozen=True)
class States:
    """The tensors of a recurrent state.

    Attributes:
        names: of each tensor.
        batch_dims: which of its dimensions is the batch; None for one that all samples share.
        structure: of the state as users see it, where the model itself takes it apart.
        initial: the tensors at the start of a sequence, for a batch size.
    """

    names: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    structure: Structure | None
    initial: Callable[[int], list[Tensor]]


class NoState:
    """Nothing is carried: windows are plain batches.

    Args:
        model: the user's module, called with a window.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.states: States | None = None

    def run(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The model's output, and no state."""
        return self.model(x), {}

    def find(self, x: Any, initial: InitialState | None) -> States:
        """There is none."""
        self.states = States((), (), None, lambda batch: [])
        return self.states

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """There is none."""
        return None

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state that should not be there."""
        raise DecouplingError(
            f"{type(self.model).__name__} carries no state, but was given a "
            f"{type(state).__name__}: pass state=None"
        )


class GivenState:
    """A state that the model takes and returns: ``forward(x, state) -> (y, state)``.

    Args:
        model: the user's module.
        unrolls: whether it takes single steps.
        time_dim: dimension of a window's steps.
        batch_dim: dimension of the batch.
    """

    def __init__(self, model: nn.Module, unrolls: bool, time_dim: int, batch_dim: int) -> None:
        self.model, self.unrolls = model, unrolls
        self.time_dim, self.batch_dim = time_dim, batch_dim
        self.states: States | None = None

    def run(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The model's output over a window, and the state after it, by name."""
        structure = self._structure()
        y, nested = self._call(x, structure.build(iter(state.values())))
        leaves, found = flatten(nested)
        if found != structure:
            raise DecouplingError(
                f"{type(self.model).__name__} returned a state of another structure than it was "
                f"given: {len(leaves)} tensors, expected {len(state)}, nested the same way; what "
                "changes must be a tensor"
            )
        return y, dict(zip(state, leaves, strict=True))

    def _structure(self) -> Structure:
        assert self.states is not None
        assert self.states.structure is not None
        return self.states.structure

    def _call(self, x: Any, state: Any) -> tuple[Any, Any]:
        return self._unroll(x, state) if self.unrolls else self.model(x, state)

    def _unroll(self, x: Any, state: Any) -> tuple[Any, Any]:
        leaves, structure = flatten(x)
        outputs: list[list[Any]] = []
        shape: Structure | None = None
        for step in zip(*(leaf.unbind(self.time_dim) for leaf in leaves), strict=True):
            y, state = self._one_step(structure.build(iter(step)), state)
            found, shape = flatten(y)
            outputs.append(found)
        assert shape is not None
        stacked = [torch.stack(tensors, self.time_dim) for tensors in zip(*outputs, strict=True)]
        return shape.build(iter(stacked)), state

    def _one_step(self, x: Any, state: Any) -> tuple[Any, Any]:
        if isinstance(self.model, nn.RNNCellBase):
            state = self.model(x, state)
            return (state[0] if isinstance(state, tuple) else state), state
        y, state = self.model(x, state)
        return y, state

    def find(self, x: Any, initial: InitialState | None) -> States:
        """Learn of the state from what the model starts from.

        Raises:
            DecouplingError: the state cannot be told, is shared by samples or learnt, or the model
                does not start from zeros.
        """
        batch = batch_size(x, self.batch_dim)
        first = _narrowed(x, self.time_dim)
        if initial is None:
            one, structure = flatten(self._first_state(first))
            other = flatten(self._first_state(_repeated(first, self.batch_dim)))[0]
        else:
            one, structure = flatten(initial(batch))
            other = flatten(initial(batch + 1))[0]
        if not one:
            raise DecouplingError(
                f"{type(self.model).__name__} returns a state without tensors: nothing to carry"
            )
        dims = _batch_dims(one, other)
        if any(t.requires_grad for t in one):
            raise DecouplingError(
                "initial_state= returned a tensor that requires a gradient, but a start is not "
                "learnt: detach it"
            )
        if initial is None:
            make = _zeros_like([t.detach() for t in one], dims)
        else:
            make = lambda size: flatten(initial(size))[0]  # noqa: E731
        keys = [key or "0" for key in leaf_keys(structure.build(iter(one)))]
        if initial is None:
            self._check_zero_start(first, structure, make(batch))
        self.states = States(tuple(keys), dims, structure, make)
        return self.states

    def _first_state(self, x: Any) -> Any:
        try:
            with torch.no_grad(), restored(self.model):
                return self._answer(x, None)[1]
        except DecouplingError:
            raise
        except Exception as error:
            raise DecouplingError(
                f"{type(self.model).__name__} does not start from state=None "
                f"({type(error).__name__}: {error}); pass initial_state=, a callable from the "
                "batch size to the state at the start of a sequence"
            ) from error

    def _answer(self, x: Any, state: Any) -> tuple[Any, Any]:
        found = self._call(x, state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise DecouplingError(
                f"{type(self.model).__name__}.forward(x, state) must return (y, state), but "
                f"returned {type(found).__name__}"
            )
        return found

    def _check_zero_start(self, x: Any, structure: Structure, zeros: list[Tensor]) -> None:
        with torch.no_grad():
            with restored(self.model):
                own = flatten(self._answer(x, None))[0]
            with restored(self.model):
                ours = flatten(self._answer(x, structure.build(iter(zeros))))[0]
        if [t.shape for t in own] != [t.shape for t in ours] or not all(
            map(torch.equal, own, ours)
        ):
            raise DecouplingError(
                f"{type(self.model).__name__} does not start from zeros when state=None; pass "
                "initial_state=, a callable from the batch size to the state at the start of a "
                "sequence"
            )

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """The state as the model takes it."""
        return self._structure().build(iter(leaves))

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state.

        Raises:
            DecouplingError: its structure is not the model's.
        """
        assert self.states is not None
        leaves, structure = flatten(state)
        if structure != self.states.structure:
            raise DecouplingError(
                f"the state has another structure than the model's: {len(leaves)} tensors in a "
                f"{type(state).__name__}, expected {len(self.states.names)}, nested as the "
                "model returns them"
            )
        return leaves


def batch_size(x: Any, dim: int) -> int:
    """The batch size of a window, a tensor or a nesting of tensors."""
    return int(flatten(x)[0][0].shape[dim])


def _batch_dims(one: list[Tensor], other: list[Tensor]) -> tuple[int | None, ...]:
    """The batch dimension of each tensor, told by a state of one more sample."""
    dims: list[int | None] = []
    for a, b in zip(one, other, strict=True):
        differ = [d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        dims.append(differ[0] if differ else None)
        if not differ and a.is_floating_point():
            raise DecouplingError(
                f"a float tensor of the state, {tuple(a.shape)}, has no batch dimension: "
                "samples would share it. Give it one, or make it an integer tensor if no "
                "gradient flows through it"
            )
    return tuple(dims)


def _zeros_like(
    templates: list[Tensor], dims: tuple[int | None, ...]
) -> Callable[[int], list[Tensor]]:
    """Makes zeros in the shapes of a state, for another batch size."""

    def make(size: int) -> list[Tensor]:
        shapes = [
            [size if d == dim else n for d, n in enumerate(t.shape)]
            for t, dim in zip(templates, dims, strict=True)
        ]
        return [
            torch.zeros(s, dtype=t.dtype, device=t.device)
            for s, t in zip(shapes, templates, strict=True)
        ]

    return make


def _narrowed(x: Any, dim: int) -> Any:
    """The first step of a window."""
    leaves, structure = flatten(x)
    return structure.build(iter([leaf.narrow(dim, 0, 1) for leaf in leaves]))


def _repeated(x: Any, dim: int) -> Any:
    """One more sample, the first again."""
    leaves, structure = flatten(x)
    more = [torch.cat((leaf, leaf.narrow(dim, 0, 1)), dim) for leaf in leaves]
    return structure.build(iter(more))
