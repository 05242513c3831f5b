"""A window of a model that takes its state and returns it: ``forward(x, state) -> (y, state)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten, map_tensors
from ..passes.trace.naming import leaf_keys
from ..passes.trace.state import restored
from .window import InitialState, States, Window, stacked

_PASS_IT = (
    "pass initial_state=, a callable from the batch size to the state at the start of a sequence"
)


class GivenState(Window):
    """A model that takes its state and returns it, of whole windows or of single steps.

    Args:
        model, batch_first, initial_state: as for :class:`Window`.
        unrolls: whether the model takes single steps.
    """

    stateless = False

    def __init__(
        self, model: nn.Module, batch_first: bool, initial_state: InitialState | None, unrolls: bool
    ) -> None:
        super().__init__(model, batch_first, initial_state)
        self.unrolls = unrolls
        self.structure = flatten(None)[1]  # of the state; known with its tensors

    def run(self, x: Any, state: list[Tensor]) -> tuple[Any, list[Tensor]]:
        y, nested = self._call(x, self.pack(state))
        leaves, found = flatten(nested)
        if found != self.structure:
            raise DecouplingError(
                f"{type(self.model).__name__} returned a state of another structure than it was "
                f"given: {len(leaves)} tensors, expected {len(state)}, nested the same way; what "
                "changes must be a tensor"
            )
        return y, leaves

    def _call(self, x: Any, state: Any) -> tuple[Any, Any]:
        if not self.unrolls:
            return self._answer(x, state)
        leaves, structure = flatten(x)
        outputs = []
        for step in zip(*(leaf.unbind(self.time_dim) for leaf in leaves), strict=True):
            y, state = self._answer(structure.build(iter(step)), state)
            outputs.append(y)
        return stacked(outputs, self.time_dim), state

    def _answer(self, x: Any, state: Any) -> tuple[Any, Any]:
        found = self.model(x, state)
        if isinstance(self.model, nn.RNNCellBase):
            return (found[0] if isinstance(found, tuple) else found), found
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DecouplingError(
                f"{type(self.model).__name__}.forward(x, state) must return (y, state), but "
                f"returned {type(found).__name__}"
            )
        return found[0], found[1]

    def find_states(self, x: Any) -> States:
        """From what the model starts from, or is to; refused where samples share it, where it is
        learnt, or where the model does not start from zeros.
        """
        batch = int(flatten(x)[0][0].shape[self.batch_dim])
        first = map_tensors(lambda leaf: leaf.narrow(self.time_dim, 0, 1), x)
        output = None
        if self.initial_state is None:
            output, started = self._start(first)
            one, self.structure = flatten(started)
            other = flatten(self._start(map_tensors(self._with_one_more, first))[1])[0]
        else:
            one, self.structure = flatten(self.initial_state(batch))
            other = flatten(self.initial_state(batch + 1))[0]
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
        make = _maker(self.initial_state, [t.detach() for t in one], dims)
        if self.initial_state is None:
            self._check_zero_start(first, output, make(batch))
        keys = tuple(key or "0" for key in leaf_keys(self.pack(one)))
        return States(keys, dims, make)

    def _with_one_more(self, leaf: Tensor) -> Tensor:
        """One more sample, the first again."""
        return torch.cat((leaf, leaf.narrow(self.batch_dim, 0, 1)), self.batch_dim)

    def _start(self, x: Any) -> tuple[Any, Any]:
        try:
            return self._try(x, None)
        except DecouplingError:
            raise
        except Exception as error:
            leaves, what, way = flatten(x)[0], "a window", ""
            if self.unrolls:
                leaves = [leaf.select(self.time_dim, 0) for leaf in leaves]
                what, way = "a single step", "pass unroll=False if it takes whole windows, or "
            given = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise DecouplingError(
                f"{type(self.model).__name__} does not start from {what} of shape {given} and "
                f"state=None ({type(error).__name__}: {error}); {way}{_PASS_IT}"
            ) from error

    def _try(self, x: Any, state: Any) -> tuple[Any, Any]:
        with torch.no_grad(), restored(self.model):
            return self._call(x, state)

    def _check_zero_start(self, x: Any, output: Any, zeros: list[Tensor]) -> None:
        own, ours = flatten(output)[0], flatten(self._try(x, self.pack(zeros))[0])[0]
        if [t.shape for t in own] != [t.shape for t in ours] or not all(
            map(torch.equal, own, ours)
        ):
            raise DecouplingError(
                f"{type(self.model).__name__} does not start from zeros when state=None; {_PASS_IT}"
            )

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        return self.structure.build(iter(leaves))

    def unpack(self, state: Any) -> list[Tensor]:
        leaves, structure = flatten(state)
        if structure != self.structure:
            raise DecouplingError(
                f"the state has another structure than the model's: {len(leaves)} tensors in a "
                f"{type(state).__name__}, expected {self.structure.leaf_count}, nested as the "
                "model returns them"
            )
        return leaves


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


def _maker(
    initial: InitialState | None, templates: list[Tensor], dims: tuple[int | None, ...]
) -> Callable[[int], list[Tensor]]:
    """Makes the state at a start: what the user says, or zeros in the shapes of ``templates``."""

    def zeros(size: int) -> list[Tensor]:
        return [
            t.new_zeros([size if d == dim else n for d, n in enumerate(t.shape)])
            for t, dim in zip(templates, dims, strict=True)
        ]

    return zeros if initial is None else lambda size: flatten(initial(size))[0]
