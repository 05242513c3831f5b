"""The state of recurrent modules that a model holds: put in and taken out where they are called;
and stacked ones taken apart into their layers, so that cuts can fall between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import restored
from .window import InitialState, States, Window


class _Follows:
    """Mixed into a module that stands for a part of another one: trains when that does, and stays
    one graph node.
    """

    is_graph_leaf = True

    @property
    def training(self) -> bool:
        return self.__dict__["_owner"][0].training if "_owner" in self.__dict__ else True

    @training.setter
    def training(self, value: bool) -> None:
        pass

    def follow(self, owner: nn.Module) -> Any:
        self.__dict__["_owner"] = [owner]  # no submodule
        return self


class _Dropout(_Follows, nn.Dropout):
    pass


_KINDS: dict[type[nn.RNNBase], Any] = {
    kind: type(f"_{kind.__name__}", (_Follows, kind), {}) for kind in (nn.LSTM, nn.GRU, nn.RNN)
}


class Layers(nn.Module):
    """A stacked ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` as its layers, one after the other; the
    parameters are shared.
    """

    def __init__(self, stacked: nn.RNNBase) -> None:
        super().__init__()
        for k in range(stacked.num_layers):
            if k and stacked.dropout:
                self.add_module(f"dropout_{k - 1}", _Dropout(stacked.dropout).follow(stacked))
            self.add_module(f"layer_{k}", _single_layer(stacked, k))

    def forward(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        rest, found = iter(states), []
        for module in self.children():
            if isinstance(module, _Dropout):
                x = module(x)
            else:
                x, state = module(x, next(rest))
                found.append(state)
        return x, found


def _single_layer(stacked: nn.RNNBase, k: int) -> nn.RNNBase:
    kind = next((c for base, c in _KINDS.items() if isinstance(stacked, base)), None)
    ends = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] * stacked.bias)]
    ends += ["weight_hr"] * bool(stacked.proj_size)
    names = [n for n, _ in stacked.named_parameters() if n.endswith(f"_l{k}")]
    if kind is None or set(names) != {f"{end}_l{k}" for end in ends}:
        raise DecouplingError(
            f"a {type(stacked).__name__} with re-made weights cannot be cut between its layers; "
            "cut before or after it"
        )
    size = stacked.input_size if k == 0 else (stacked.proj_size or stacked.hidden_size)
    told = ["bias", "batch_first", *(["proj_size"] * bool(stacked.proj_size))]
    told += ["nonlinearity"] * isinstance(stacked, nn.RNN)
    options = {name: getattr(stacked, name) for name in told}
    layer: Any = kind(size, stacked.hidden_size, device="meta", **options)
    for name in names:
        setattr(layer, f"{name.removesuffix(f'_l{k}')}_l0", getattr(stacked, name))
    made: nn.RNNBase = layer.follow(stacked)
    return made


class _Standin(nn.Module):
    """Stands in a model for one of its recurrent modules while a window runs: puts the state in,
    and takes it out. What it is asked for otherwise is the module's own.
    """

    def __init__(self, module: nn.RNNBase, run: Callable[..., Any], state: Any) -> None:
        super().__init__()
        self.training = module.training
        vars(self).update(held=(module, run), state=state, found=None, given=None)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if self.found is not None:
            raise DecouplingError(
                f"a {type(self.held[0]).__name__} is called more than once in a forward pass, so "
                "it has no one state to carry; let the model take and return its state: forward(x, "
                "state) -> (y, state)"
            )
        _check_batched(x, self.held[0])
        y, found = self.held[1](x, self.state)
        vars(self).update(found=found, given=hx)
        return y, found

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.held[0].named_parameters(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["held"][0], name)


def _check_batched(x: Tensor, core: nn.RNNBase) -> None:
    """Refuse a sequence without a batch, which torch's recurrent modules take."""
    if x.dim() == 2:
        layout = "(batch, time, features)" if core.batch_first else "(time, batch, features)"
        raise DecouplingError(
            f"a {type(core).__name__} was given {tuple(x.shape)}, a sequence without a batch, but "
            f"windows are {layout}: x.unsqueeze({0 if core.batch_first else 1}) makes a batch of "
            "one sequence"
        )


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
            holder: Any = self.apart
            *outer, last = path.split(".")
            for name in outer:
                holder = holder._modules.setdefault(name, nn.Module())
            holder.add_module(last, layers)

    def run(self, x: Any, state: list[Tensor]) -> tuple[Any, list[Tensor]]:
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
            _check_batched(x, self.cores[""])
            y, state = runs[""](x, states[""])
            return y, {"": state}, {"": None}
        inside = {p: _Standin(core, runs[p], states[p]) for p, core in self.cores.items()}
        with _exchanged(self.model, inside):
            y = self.model(x)
        for path, core in inside.items():
            if core.found is None:
                raise DecouplingError(
                    f"the forward pass does not call {path!r}, whose state was to be carried"
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
        """From the recurrent modules; refused where the model starts one of them from a state of
        its own, or does not compute the same when they are taken apart.
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
        found = {}
        for path, state in self._by_core(list(leaves)).items():
            if path in self.layers:
                parts = list(zip(*state, strict=True)) if isinstance(state[0], tuple) else [state]
                joined = tuple(torch.cat(tuple(part)) for part in parts)
                state = joined if len(joined) > 1 else joined[0]
            found[path] = state
        return found if len(found) > 1 else next(iter(found.values()))

    def unpack(self, state: Any) -> list[Tensor]:
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
    tensors, is_pair = [given] if isinstance(given, Tensor) else given, isinstance(core, nn.LSTM)
    if (
        not isinstance(tensors, tuple | list)
        or len(tensors) != 1 + is_pair
        or not all(isinstance(t, Tensor) and t.dim() == 3 for t in tensors)
    ):
        kind = "a pair (hidden, cell)" if is_pair else "one tensor"
        shapes = [tuple(t.shape) for t in flatten(given)[0]]
        found = f"{type(given).__name__} of shapes {shapes}" if shapes else repr(given)[:60]
        raise DecouplingError(
            f"the state of a {type(core).__name__} must be {kind} of 3 dimensions (layers, "
            f"batch, features), but is {found}"
        )
    return list(tensors)


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
