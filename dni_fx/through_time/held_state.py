"""The state of recurrent modules that a model holds: put in and taken out where they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import restored
from .layers import Layers
from .window import InitialState, States, Window


class _Standin(nn.Module):
    """Stands in a model for one of its recurrent modules while a window runs: puts the state in,
    and takes it out.
    """

    def __init__(
        self, module: nn.RNNBase, run: Callable[[Tensor, Any], tuple[Any, Any]], state: Any
    ) -> None:
        super().__init__()
        self.__dict__["held"] = (module, run)
        self.__dict__["state"] = state
        self.training = module.training
        self.__dict__["found"] = self.__dict__["given"] = None

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """The module's own call; the state that the model gives is passed over."""
        if self.found is not None:
            raise DecouplingError(
                f"a {type(self.held[0]).__name__} is called more than once in a forward pass, so "
                "it has no one state to carry; let the model take and return its state: forward(x, "
                "state) -> (y, state)"
            )
        self.__dict__["given"] = hx
        y, self.__dict__["found"] = self.held[1](x, self.state)
        return y, self.found

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own."""
        return iter(self.held[0].named_parameters(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["held"][0], name)


class HeldState(Window):
    """A model of ``x`` alone that holds ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` modules, or is one:
    their state is put in and taken out where they are called.

    Args:
        model, batch_first, initial_state: as for :class:`Window`.
        cores: the recurrent modules, by path.
        layered: take stacked ones apart into their layers, so that cuts can fall between them.
    """

    stateless = False

    def __init__(
        self,
        model: nn.Module,
        batch_first: bool,
        initial_state: InitialState | None,
        cores: dict[str, nn.RNNBase],
        layered: bool,
    ) -> None:
        super().__init__(model, batch_first, initial_state)
        self.cores = cores
        stacks = {p: c for p, c in cores.items() if layered and c.num_layers > 1}
        self.layers = {path: Layers(core) for path, core in stacks.items()}
        self.apart = self.layers.get("", nn.Module())  # under the modules' own paths
        for path, layers in self.layers.items() if "" not in self.layers else ():
            holder = self.apart
            *outer, last = path.split(".")
            for name in outer:
                if name not in dict(holder.named_children()):
                    holder.add_module(name, nn.Module())
                holder = holder.get_submodule(name)
            holder.add_module(last, layers)

    def run(self, x: Any, state: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """The model's output over a window, and the state after it."""
        y, found, _ = self._through(x, self._by_core(state))
        return y, [leaf for path in self.cores for leaf in flatten(found[path])[0]]

    def _through(
        self, x: Any, states: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Output, states after the window, and those that the model itself would have given."""
        runs: dict[str, Callable[..., Any]] = {
            p: self.layers.get(p, core) for p, core in self.cores.items()
        }
        if "" in self.cores:
            y, state = runs[""](x, states[""])
            return y, {"": state}, {"": None}
        inside = {p: _Standin(core, runs[p], states[p]) for p, core in self.cores.items()}
        with _exchanged(self.model, inside):
            y = self.model(x)
        unused = [p for p, core in inside.items() if core.found is None]
        if unused:
            raise DecouplingError(
                f"the forward pass does not call {unused[0]!r}, whose state was to be carried"
            )
        after = {p: core.found for p, core in inside.items()}
        return y, after, {p: core.given for p, core in inside.items()}

    def _by_core(self, leaves: list[Tensor]) -> dict[str, Any]:
        """What each recurrent module takes: its state, or a list of its layers' states."""
        rest, found = iter(leaves), {}
        for path, core in self.cores.items():
            pair, parts = isinstance(core, nn.LSTM), range(self._parts(path))
            each = [(next(rest), next(rest)) if pair else next(rest) for _ in parts]
            found[path] = each if path in self.layers else each[0]
        return found

    def _parts(self, path: str) -> int:
        return self.cores[path].num_layers if path in self.layers else 1

    def find_states(self, x: Any) -> States:
        """Learn of the state from the recurrent modules.

        Raises:
            DecouplingError: the model starts one of them from a state of its own, or does not
                compute the same when they are taken apart.
        """
        names, initial = self._names(), self.initial_state
        make = self._zeros if initial is None else lambda batch: self.unpack(initial(batch))
        start = make(int(flatten(x)[0][0].shape[self.batch_dim]))
        if not self.layers:
            self._check_start(x, start)
        elif initial is None:
            self._check_layers(x, start)
        return States(names, (1,) * len(names), make)

    def _names(self) -> tuple[str, ...]:
        names = []
        for path, core in self.cores.items():
            for k in range(self._parts(path)):
                ends = [f"layer_{k}"] * (path in self.layers)
                is_told = path != "" and (len(self.cores) > 1 or bool(ends))
                starts = [path.replace(".", "_")] * is_told
                kinds = ["hidden", "cell"] if isinstance(core, nn.LSTM) else ["hidden"]
                names += ["_".join([*starts, *ends, kind]) for kind in kinds]
        return tuple(n if n not in names[:i] else f"{n}_{i}" for i, n in enumerate(names))

    def _zeros(self, batch: int) -> list[Tensor]:
        zeros = []
        for path, core in self.cores.items():
            weight, parts = next(core.parameters()), self._parts(path)
            sizes = [core.proj_size or core.hidden_size]
            sizes += [core.hidden_size] * isinstance(core, nn.LSTM)
            shapes = [(core.num_layers // parts, batch, size) for size in sizes]
            zeros += [weight.new_zeros(shape) for _ in range(parts) for shape in shapes]
        return zeros

    def _check_start(self, x: Any, start: list[Tensor]) -> None:
        """The model must leave its modules to start from zeros."""
        with torch.enable_grad(), restored(self.model):
            given = self._through(x, self._by_core(start))[2]
        for path, hx in given.items():
            if any(t.requires_grad or bool((t != 0).any()) for t in flatten(hx)[0]):
                raise DecouplingError(
                    f"the model starts {path!r} from a state of its own, which is learnt or not "
                    "zero; let the model take and return its state: forward(x, state) -> (y, state)"
                )

    def _check_layers(self, x: Any, start: list[Tensor]) -> None:
        """Taken apart, the model must compute what it did."""
        try:
            with torch.no_grad(), restored(self.model):
                whole = self.model(x)
            with torch.no_grad(), restored(self.model):
                apart = self.run(x, start)[0]
            ours, theirs = flatten(apart)[0], flatten(whole[0] if "" in self.cores else whole)[0]
            same = [t.shape for t in ours] == [t.shape for t in theirs] and all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-6)
                for a, b in zip(ours, theirs, strict=True)
            )
            reason = ""
        except DecouplingError:
            raise
        except Exception as error:
            same, reason = False, f" ({type(error).__name__}: {error})"
        if not same:
            names = ", ".join(repr(p or type(self.model).__name__) for p in self.layers)
            raise DecouplingError(
                f"taken apart into its layers, {names} does not compute what it did{reason}: it "
                "has hooks or a forward of its own, the model starts it itself, or uses the state "
                "that it returns. Leave out cuts= between its layers, or let the model take and "
                "return its state"
            )

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """The state as ``nn.LSTM`` and its kind take it, by path where there are several."""
        found = {}
        for path, state in self._by_core(list(leaves)).items():
            if path in self.layers:
                parts = list(zip(*state, strict=True)) if isinstance(state[0], tuple) else [state]
                joined = tuple(torch.cat(tuple(part)) for part in parts)
                state = joined if len(joined) > 1 else joined[0]
            found[path] = state
        return found if len(found) > 1 else next(iter(found.values()))

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state.

        Raises:
            DecouplingError: its structure is not the modules'.
        """
        by_path = state if len(self.cores) > 1 else {next(iter(self.cores)): state}
        if not isinstance(by_path, dict) or set(by_path) != set(self.cores):
            raise DecouplingError(
                f"the state must be a dict with {', '.join(map(repr, self.cores))}, as report.state"
            )
        found: list[Tensor] = []
        for path, core in self.cores.items():
            tensors = _state_of(core, by_path[path])
            if path in self.layers:
                by_layer = zip(*(t.split(1) for t in tensors), strict=True)
                tensors = [part for each in by_layer for part in each]
            found += tensors
        return found


def _state_of(core: nn.RNNBase, given: Any) -> list[Tensor]:
    """The tensors of one recurrent module's state."""
    wanted = 2 if isinstance(core, nn.LSTM) else 1
    tensors = [given] if isinstance(given, Tensor) else []
    if isinstance(given, tuple | list):
        tensors = list(given)
    is_layered = all(isinstance(t, Tensor) and t.dim() == 3 for t in tensors)
    if len(tensors) != wanted or not is_layered:
        kind = "a pair (hidden, cell)" if wanted == 2 else "one tensor"
        raise DecouplingError(
            f"the state of a {type(core).__name__} must be {kind} of 3 dimensions (layers, "
            f"batch, features), but is {_described(given)}"
        )
    return tensors


def _described(value: Any) -> str:
    leaves = flatten(value)[0]
    return (
        f"{type(value).__name__} of shapes {[tuple(t.shape) for t in leaves]}"
        if leaves
        else repr(value)[:60]
    )


@contextlib.contextmanager
def _exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The modules at some paths, and wherever else the same objects stand, exchanged for others."""
    originals = {id(model.get_submodule(p)): m for p, m in modules.items()}
    places = [
        (owner._modules, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if id(child) in originals
    ]
    for table, name, child in places:
        table[name] = originals[id(child)]
    try:
        yield
    finally:
        for table, name, child in places:
            table[name] = child
