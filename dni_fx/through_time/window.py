"""A recurrent model as a function of one window, ``(x, state) -> (y, state)``, whatever it takes by
itself.

Kinds of model are told apart: ``nn.LSTM`` and its like; a model ``(x, state) -> (y, state)`` of
whole windows, or of single steps, which are then unrolled; and a model of ``x`` alone that holds
recurrent modules, whose state is put in and taken out where they are called.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import Structure, flatten
from ..passes.trace.naming import leaf_keys
from ..passes.trace.state import restored

InitialState = Callable[[int], Any]


class _Follows:
    """Mixed into a module that stands for a part of another one: trains when that does, and stays
    one graph node.
    """

    is_graph_leaf = True

    @property
    def training(self) -> bool:
        """The owner's."""
        return self.__dict__["_owner"][0].training if "_owner" in self.__dict__ else True

    @training.setter
    def training(self, value: bool) -> None:
        pass

    def follow(self, owner: nn.Module) -> Any:
        """Take over the owner's mode from now on."""
        self.__dict__["_owner"] = [owner]  # no submodule
        return self


class _LSTM(_Follows, nn.LSTM):
    pass


class _GRU(_Follows, nn.GRU):
    pass


class _RNN(_Follows, nn.RNN):
    pass


class _Dropout(_Follows, nn.Dropout):
    pass


_KINDS: dict[type[nn.RNNBase], Any] = {nn.LSTM: _LSTM, nn.GRU: _GRU, nn.RNN: _RNN}


class Layers(nn.Module):
    """A stacked ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` as its layers, one after the other; the
    parameters are shared.

    Args:
        stacked: the module.
    """

    def __init__(self, stacked: nn.RNNBase) -> None:
        super().__init__()
        self.count, self.dropout = stacked.num_layers, stacked.dropout
        for k in range(stacked.num_layers):
            self.add_module(f"layer_{k}", _single_layer(stacked, k))
            if stacked.dropout and k + 1 < stacked.num_layers:
                self.add_module(f"dropout_{k}", _Dropout(stacked.dropout).follow(stacked))

    def forward(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Run all layers; a state for each goes in and comes out."""
        found = []
        for k in range(self.count):
            x, state = self.get_submodule(f"layer_{k}")(x, states[k])
            found.append(state)
            if self.dropout and k + 1 < self.count:
                x = self.get_submodule(f"dropout_{k}")(x)
        return x, found


def _single_layer(stacked: nn.RNNBase, k: int) -> nn.RNNBase:
    kind = next((c for base, c in _KINDS.items() if isinstance(stacked, base)), None)
    ends = [
        "weight_ih",
        "weight_hh",
        *(["bias_ih", "bias_hh"] * stacked.bias),
        *(["weight_hr"] * bool(stacked.proj_size)),
    ]
    names = [n for n, _ in stacked.named_parameters() if n.endswith(f"_l{k}")]
    if kind is None or set(names) != {f"{end}_l{k}" for end in ends}:
        raise DecouplingError(
            f"a {type(stacked).__name__} with re-made weights cannot be cut between its layers; "
            "cut before or after it"
        )
    size = stacked.input_size if k == 0 else (stacked.proj_size or stacked.hidden_size)
    extra = {"nonlinearity": stacked.nonlinearity} if isinstance(stacked, nn.RNN) else {}
    if stacked.proj_size:
        extra["proj_size"] = stacked.proj_size
    layout = {"bias": stacked.bias, "batch_first": stacked.batch_first, "device": "meta"}
    layer: Any = kind(size, stacked.hidden_size, **layout, **extra)
    for name in names:
        setattr(layer, f"{name.removesuffix(f'_l{k}')}_l0", getattr(stacked, name))
    made: nn.RNNBase = layer.follow(stacked)
    return made


class _Stateful(nn.Module):
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
        # A model that takes its state as an argument is left to do so.
        self.cores = {} if takes_state and not isinstance(model, nn.RNNBase) else cores
        self.layers: dict[str, Layers] = {}
        for path, core in self.cores.items() if layered else ():
            if core.num_layers > 1:
                self.layers[path] = self._put_apart(path, Layers(core))
        self.states: States | None = None

    def _put_apart(self, path: str, layers: Layers) -> Layers:
        if not path:
            self.apart = layers
            return layers
        holder = self.apart
        *outer, last = path.split(".")
        for name in outer:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(last, layers)
        return layers

    def forward(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """One window.

        Args:
            x: a tensor, or a nesting of tensors, each ``(time, batch, ...)`` or ``(batch, time,
                ...)``.
            state: the state's tensors, by name.

        Returns:
            The model's output over the window, and the state after it.
        """
        if self.stateless:
            return self.model(x), {}
        y, after = self._run_cores(x, state) if self.cores else self._run_model(x, state)
        # Autocast makes a state of its own type; it goes on as what it was.
        return y, {
            n: t if t.dtype == state[n].dtype else t.to(state[n].dtype) for n, t in after.items()
        }

    def _run_model(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        assert self.states is not None
        assert self.states.structure is not None
        nested = self.states.structure.build(iter(state.values()))
        y, nested = self._unroll(x, nested) if self.unrolls else self.model(x, nested)
        leaves, structure = flatten(nested)
        if structure != self.states.structure:
            raise DecouplingError(
                f"{type(self.model).__name__} returned a state of another structure than it was "
                f"given: {len(leaves)} tensors, expected {len(state)}, nested the same way; what "
                "changes must be a tensor"
            )
        return y, dict(zip(state, leaves, strict=True))

    def _unroll(self, x: Any, state: Any) -> tuple[Any, Any]:
        leaves, structure = flatten(x)
        steps = zip(*(leaf.unbind(self.time_dim) for leaf in leaves), strict=True)
        outputs: list[list[Any]] = []
        shape: Structure | None = None
        for step in steps:
            y, state = self._one_step(structure.build(iter(step)), state)
            found, shape = flatten(y)
            outputs.append(found)
        assert shape is not None
        return shape.build(
            iter([torch.stack(tensors, self.time_dim) for tensors in zip(*outputs, strict=True)])
        ), state

    def _one_step(self, x: Any, state: Any) -> tuple[Any, Any]:
        if isinstance(self.model, nn.RNNCellBase):
            state = self.model(x, state)
            return (state[0] if isinstance(state, tuple) else state), state
        y, state = self.model(x, state)
        return y, state

    def _run_cores(self, x: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        y, found, _ = self._through(x, self._by_core(list(state.values())))
        leaves = [leaf for path in self.cores for leaf in flatten(found[path])[0]]
        return y, dict(zip(state, leaves, strict=True))

    def _through(
        self, x: Any, states: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Output, states after the window, and those that the model itself would have started with."""
        runs: dict[str, Callable[..., Any]] = {
            p: self.layers.get(p, core) for p, core in self.cores.items()
        }
        if "" in self.cores:
            y, state = runs[""](x, states[""])
            return y, {"": state}, {"": None}
        inside: dict[str, Any] = {
            p: _Stateful(core, runs[p], states[p]) for p, core in self.cores.items()
        }
        with _exchanged(self.model, inside):
            y = self.model(x)
        unused = [p for p, core in inside.items() if core.found is None]
        if unused:
            raise DecouplingError(
                f"the forward pass does not call {unused[0]!r}, whose state was to be carried"
            )
        return (
            y,
            {p: core.found for p, core in inside.items()},
            {p: core.given for p, core in inside.items()},
        )

    def _by_core(self, leaves: list[Tensor]) -> dict[str, Any]:
        """What each recurrent module takes: its state, or a list of its layers' states."""
        rest, found = iter(leaves), {}
        for path, core in self.cores.items():
            pair = isinstance(core, nn.LSTM)
            each = [
                (next(rest), next(rest)) if pair else next(rest) for _ in range(self._parts(path))
            ]
            found[path] = each if path in self.layers else each[0]
        return found

    def _parts(self, path: str) -> int:
        return self.cores[path].num_layers if path in self.layers else 1

    # ---- the state as users see it ---------------------------------------------------------------

    def find_states(self, x: Any, initial: InitialState | None = None) -> States:
        """Learn of the state from a first window; asked once, kept in ``states``.

        Args:
            x: a window.
            initial: the state at the start of a sequence, for a batch size; zeros by default.

        Raises:
            DecouplingError: the state cannot be told, or does not start from what the model starts
                from.
        """
        if self.stateless:
            self.states = States((), (), None, lambda batch: [])
        elif self.cores:
            self.states = self._states_of_cores(x, initial)
        else:
            self.states = self._states_of_model(x, initial)
        return self.states

    def _states_of_cores(self, x: Any, initial: InitialState | None) -> States:
        names = []
        for path, core in self.cores.items():
            for k in range(self._parts(path)):
                ends = [f"layer_{k}"] * (path in self.layers)
                starts = [path.replace(".", "_")] * (
                    path != "" and (len(self.cores) > 1 or bool(ends))
                )
                kinds = ["hidden", "cell"] if isinstance(core, nn.LSTM) else ["hidden"]
                names += ["_".join([*starts, *ends, kind]) for kind in kinds]

        def make(batch: int) -> list[Tensor]:
            if initial is not None:
                return self.unpack(initial(batch))
            return [
                t
                for path in self.cores
                for k in range(self._parts(path))
                for t in self._zeros(path, batch)
            ]

        names = [n if n not in names[:i] else f"{n}_{i}" for i, n in enumerate(names)]
        states = States(tuple(names), (1,) * len(names), None, make)
        start = make(_size(x, self.batch_dim))
        with torch.enable_grad(), restored(self.model):
            given = self._through(x, self._by_core(start))[2] if not self.layers else {}
        own = [
            p
            for p, hx in given.items()
            if any(t.requires_grad or bool((t != 0).any()) for t in flatten(hx)[0])
        ]
        if own:
            raise DecouplingError(
                f"the model starts {own[0]!r} from a state of its own, which is learnt or not "
                "zero; let the model take and return its state: forward(x, state) -> (y, state)"
            )
        if self.layers and initial is None:
            self._check_layers(x, start)
        return states

    def _check_layers(self, x: Any, start: list[Tensor]) -> None:
        """Taken apart, the model must compute what it did."""
        try:
            with torch.no_grad(), restored(self.model):
                whole = self.model(x)
            with torch.no_grad(), restored(self.model):
                apart = self._through(x, self._by_core(start))[0]
            ours, theirs = flatten(apart)[0], flatten(whole[0] if "" in self.cores else whole)[0]
            same = [t.shape for t in ours] == [t.shape for t in theirs] and all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-6)
                for a, b in zip(ours, theirs, strict=True)
            )
        except DecouplingError:
            raise
        except Exception as error:
            same, reason = False, f" ({type(error).__name__}: {error})"
        else:
            reason = ""
        if not same:
            names = ", ".join(repr(p or type(self.model).__name__) for p in self.layers)
            raise DecouplingError(
                f"taken apart into its layers, {names} does not compute what it did{reason}: it "
                "has hooks or a forward of its own, the model starts it itself, or uses the state "
                "that it returns. Leave out cuts= between its layers, or let the model take and "
                "return its state"
            )

    def _zeros(self, path: str, batch: int) -> list[Tensor]:
        core = self.cores[path]
        layers = 1 if path in self.layers else core.num_layers
        weight = next(core.parameters())
        sizes = [core.proj_size or core.hidden_size] + [core.hidden_size] * isinstance(
            core, nn.LSTM
        )
        return [
            torch.zeros(layers, batch, size, dtype=weight.dtype, device=weight.device)
            for size in sizes
        ]

    def _states_of_model(self, x: Any, initial: InitialState | None) -> States:
        batch = _size(x, self.batch_dim)
        first = _narrowed(x, self.time_dim)
        more = _repeated(first, self.batch_dim)
        if initial is None:
            one, structure = flatten(self._first_state(first))
            other = flatten(self._first_state(more))[0]
        else:
            one, structure = flatten(initial(batch))
            other = flatten(initial(batch + 1))[0]
        if not one:
            raise DecouplingError(
                f"{type(self.model).__name__} returns a state without tensors: nothing to carry"
            )
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
        if any(t.requires_grad for t in one):
            raise DecouplingError(
                "initial_state= returned a tensor that requires a gradient, but a start is not "
                "learnt: detach it"
            )
        templates = [t.detach() for t in one]

        def make(size: int) -> list[Tensor]:
            if initial is not None:
                return flatten(initial(size))[0]
            shapes = [
                [size if d == dim else n for d, n in enumerate(t.shape)]
                for t, dim in zip(templates, dims, strict=True)
            ]
            return [
                torch.zeros(s, dtype=t.dtype, device=t.device)
                for s, t in zip(shapes, templates, strict=True)
            ]

        keys = [key or "0" for key in leaf_keys(structure.build(iter(one)))]
        states = States(tuple(keys), tuple(dims), structure, make)
        if initial is None:
            self._check_zero_start(first, structure, make(batch))
        return states

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
        if self.unrolls:
            return self._unroll(x, state)
        found = self.model(x, state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise DecouplingError(
                f"{type(self.model).__name__}.forward(x, state) must return (y, state), but "
                f"returned {type(found).__name__}"
            )
        return found[0], found[1]

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
        """The state as the model takes it: that of ``nn.LSTM`` and its kind, by path where there
        are several.
        """
        assert self.states is not None
        if self.stateless:
            return None
        if self.states.structure is not None:
            return self.states.structure.build(iter(leaves))
        found = {}
        for path, state in self._by_core(list(leaves)).items():
            if path in self.layers:
                parts = list(zip(*state, strict=True)) if isinstance(state[0], tuple) else [state]
                joined = tuple(torch.cat(tuple(part)) for part in parts)
                state = joined if len(joined) > 1 else joined[0]
            found[path] = state
        return found if len(found) > 1 else next(iter(found.values()))

    def unpack(self, state: Any) -> list[Tensor]:
        """The tensors of a state as users see it.

        Raises:
            DecouplingError: its structure is not the model's.
        """
        if not self.cores:
            assert self.states is not None
            leaves, structure = flatten(state)
            if structure != self.states.structure:
                raise DecouplingError(
                    f"the state has another structure than the model's: {len(leaves)} tensors in a "
                    f"{type(state).__name__}, expected {len(self.states.names)}, nested as the "
                    "model returns them"
                )
            return leaves
        by_path = state if len(self.cores) > 1 else {next(iter(self.cores)): state}
        if not isinstance(by_path, dict) or set(by_path) != set(self.cores):
            raise DecouplingError(
                f"the state must be a dict with {', '.join(map(repr, self.cores))}, as report.state"
            )
        found: list[Tensor] = []
        for path, core in self.cores.items():
            given, wanted = by_path[path], 2 if isinstance(core, nn.LSTM) else 1
            tensors = (
                [given]
                if isinstance(given, Tensor)
                else list(given)
                if isinstance(given, tuple | list)
                else []
            )
            if len(tensors) != wanted or not all(
                isinstance(t, Tensor) and t.dim() == 3 for t in tensors
            ):
                kind = "a pair (hidden, cell)" if wanted == 2 else "one tensor"
                raise DecouplingError(
                    f"the state of a {type(core).__name__} must be {kind} of 3 dimensions (layers, "
                    f"batch, features), but is {_described(given)}"
                )
            if path in self.layers:
                found += [
                    part
                    for each in zip(*(t.split(1) for t in tensors), strict=True)
                    for part in each
                ]
            else:
                found += tensors
        return found


def _described(value: Any) -> str:
    leaves = flatten(value)[0]
    return (
        f"{type(value).__name__} of shapes {[tuple(t.shape) for t in leaves]}"
        if leaves
        else repr(value)[:60]
    )


def _positional(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(model.forward).parameters.values())


@contextlib.contextmanager
def _exchanged(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
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


def _narrowed(x: Any, dim: int) -> Any:
    leaves, structure = flatten(x)
    return structure.build(iter([leaf.narrow(dim, 0, 1) for leaf in leaves]))


def _repeated(x: Any, dim: int) -> Any:
    """One more sample, the first again."""
    leaves, structure = flatten(x)
    return structure.build(
        iter([torch.cat((leaf, leaf.narrow(dim, 0, 1)), dim) for leaf in leaves])
    )


def _size(x: Any, dim: int) -> int:
    return int(flatten(x)[0][0].shape[dim])
