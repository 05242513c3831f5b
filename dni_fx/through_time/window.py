"""A recurrent model as a function of one window, ``(x, state) -> (y, state)``, whatever it takes by
itself.

Kinds of model are told apart: ``nn.LSTM`` and its like; a model ``(x, state) -> (y, state)`` of
whole windows, or of single steps, which are then unrolled; and a model of ``x`` alone that holds
recurrent modules, whose state is put in and taken out where they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten
from .held_state import HeldState
from .layers import Layers
from .states import GivenState, InitialState, NoState, States


class Window(nn.Module):
    """A model as ``(x, state) -> (y, state)`` over the steps of ``x``, the state as a dict of
    tensors.

    Args:
        model: the user's module.
        unroll: whether the model takes single steps; None: it does unless it is, or holds, an
            ``nn.LSTM`` or its kind.
        batch_first: layout of the windows; None: as the model's recurrent modules have it, else
            time first.
        layered: take stacked recurrent modules apart into their layers, so that cuts can fall
            between them.
        stateless: allow a model that carries nothing, ``x -> y``; its windows are plain batches.

    Raises:
        DecouplingError: a model of no kind that can be carried from window to window.
    """

    def __init__(
        self,
        model: nn.Module,
        unroll: bool | None = None,
        batch_first: bool | None = None,
        layered: bool = False,
        stateless: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.apart = nn.Module()  # layers of stacked modules, under the paths of these
        cores = {p: m for p, m in model.named_modules() if isinstance(m, nn.RNNBase)}
        for path, core in cores.items():
            if core.bidirectional:
                raise DecouplingError(
                    f"{path or type(model).__name__!r} is bidirectional: its backward direction "
                    "starts at the end of the sequence and cannot be carried from window to window"
                )
        takes_state = isinstance(model, nn.RNNBase | nn.RNNCellBase) or _positional(model) > 1
        self.stateless = stateless and not takes_state and not cores
        if not takes_state and not cores and not stateless:
            raise DecouplingError(
                f"{type(model).__name__}.forward takes one argument and the model holds no "
                "nn.LSTM, nn.GRU or nn.RNN whose state could be carried; let it take and return "
                "its state: forward(x, state) -> (y, state)"
            )
        self.unrolls = (takes_state and not cores) if unroll is None else unroll
        layouts = {core.batch_first for core in cores.values()}
        if batch_first is None and len(layouts) > 1:
            raise DecouplingError(
                "the model's recurrent modules differ in batch_first; pass batch_first="
            )
        self.batch_first = bool(layouts and layouts.pop()) if batch_first is None else batch_first
        self.time_dim, self.batch_dim = (1, 0) if self.batch_first or self.stateless else (0, 1)
        self.carrier: HeldState | GivenState | NoState
        if cores and (isinstance(model, nn.RNNBase) or not takes_state):
            stacked = {p: c for p, c in cores.items() if layered and c.num_layers > 1}
            layers = {p: self._put_apart(p, Layers(c)) for p, c in stacked.items()}
            self.carrier = HeldState(model, cores, layers, self.batch_dim)
        elif self.stateless:
            self.carrier = NoState(model)
        else:  # a model that takes its state as an argument is left to do so
            self.carrier = GivenState(model, self.unrolls, self.time_dim, self.batch_dim)

    def _put_apart(self, path: str, layers: Layers) -> Layers:
        if not path:
            self.apart = layers
            return layers
        holder = self.apart
        *outer, last = path.split(".")
        for name in outer:
            if name not in dict(holder.named_children()):
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(last, layers)
        return layers

    @property
    def states(self) -> States | None:
        """What is known of the state, from the first window on."""
        return self.carrier.states

    def check(self, x: Any, most: int) -> int:
        """The batch size of a window that can be run.

        Args:
            x: the window.
            most: time steps that it may have.

        Raises:
            DecouplingError: tensors of other shapes, or too many steps.
        """
        leaves = flatten(x)[0]
        if self.stateless:
            return int(leaves[0].shape[0]) if leaves and leaves[0].dim() else 0
        time, batch = self.time_dim, self.batch_dim
        layout = "(batch, time, ...)" if self.batch_first else "(time, batch, ...)"
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
        if steps > most:
            raise DecouplingError(
                f"this window has {steps} time steps ({layout}, shape {tuple(leaves[0].shape)}), "
                f"but window={most}: split the sequence into windows of at most "
                f"{most}, for example x.split({most}, dim={time}); the last one may "
                "be shorter"
            )
        return int(count)

    def forward(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """One window.

        Args:
            x: a tensor, or a nesting of tensors, each ``(time, batch, ...)`` or ``(batch, time,
                ...)``.
            state: the state's tensors, by name.

        Returns:
            The model's output over the window, and the state after it.
        """
        y, after = self.carrier.run(x, state)
        # Autocast makes a state of its own type; it goes on as what it was.
        return y, {
            n: t if t.dtype == state[n].dtype else t.to(state[n].dtype) for n, t in after.items()
        }

    def find_states(self, x: Any, initial: InitialState | None = None) -> States:
        """Learn of the state from a first window; asked once, kept in ``states``.

        Args:
            x: a window.
            initial: the state at the start of a sequence, for a batch size; zeros by default.

        Raises:
            DecouplingError: the state cannot be told, or does not start from what the model starts
                from.
        """
        return self.carrier.find(x, initial)

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """The state as the model takes it: that of ``nn.LSTM`` and its kind, by path where there
        are several.
        """
        return self.carrier.pack(leaves)

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state as users see it.

        Raises:
            DecouplingError: its structure is not the model's.
        """
        return self.carrier.unpack(state)


def _positional(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(model.forward).parameters.values())
