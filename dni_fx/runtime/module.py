"""A decoupled model in an ordinary training loop: the user's class, whose forward and backward run
stage by stage.

Every stage but the last is one ``autograd.Function``. Its forward runs the stage, asks the sources
and takes the gradients at once, so that the stage's activations are gone before the next one runs;
its backward hands these gradients over, and receives what the sources learn from. The last stage is
differentiated as usual, by the user's own loss.

What lives from a stage's forward to its backward: its parameters' gradients, and, where a source
learns from arriving gradients, the values that it serves and the gradients on their way to it. Such
a source is asked a second time when its gradient is there, so that nothing that it computed is
kept. A source that needs no message has its own gradients taken at once. Every source is stepped in
backward, so that a forward without one changes nothing but the model's buffers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..graphs.sharding import check_unsharded
from ..passes.cut.insertion import Context
from ..sources import Served, serve
from .answers import LocalAnswers
from .batch_state import BatchState, Setting
from .emitted import keep_modes
from .finite import all_finite
from .objective import Objective
from .optimizing import (
    MakeOptimizer,
    find_misfit,
    fits_later,
    load_optimizers,
    source_optimizers,
)
from .stage_batch import StageBatch
from .transforms import check_ordinary, refuse_transforms, transformed
from .visit import Visit, learnt_by


def _no_loss(*_: Any) -> Tensor:
    raise DecouplingError("the loss of a drop-in is its user's")


_OWN_LOSS = Objective(_no_loss)


class DropIn(nn.Module):
    """What :meth:`dni_fx.Decoupled.as_module` adds to the user's class; see there."""

    # In the class, one for each module: the module's own table is the model's.
    _dni_fx: ClassVar[DropInState]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decoupled in training with gradients; else the model's own."""
        return self._dni_fx.call(args, kwargs)

    @contextlib.contextmanager
    def context(self, target: Any) -> Iterator[None]:
        """Show the sources a training target in the calls inside; it goes before
        ``as_module(context=...)``.
        """
        state = self._dni_fx
        before, state.target = state.target, target
        try:
            yield
        finally:
            state.target = before

    def synthesizer_state_dict(self) -> dict[str, Any]:
        """The sources and their optimisers, to be saved beside the model's ``state_dict``."""
        state = self._dni_fx
        return {
            "optimizers": {n: o.state_dict() for n, o in state.optimizers_now().items()},
            "synthesizers": state.graphs.synthesizers.state_dict(),
        }

    def load_synthesizer_state_dict(self, saved: dict[str, Any]) -> None:
        """What :meth:`synthesizer_state_dict` returned.

        Raises:
            DecouplingError: it belongs to other sources; nothing is loaded then.
        """
        mine, synthesizers = self._dni_fx.optimizers_now(), self._dni_fx.graphs.synthesizers
        parts = ("optimizers", "synthesizers")
        if not isinstance(saved, dict) or any(part not in saved for part in parts):
            raise DecouplingError(
                "the state of a drop-in's sources is a dict with 'optimizers' and 'synthesizers', "
                "as synthesizer_state_dict() returns it"
            )
        fits_later("source optimisers", mine, saved["optimizers"])
        if misfit := find_misfit(synthesizers.state_dict(), saved["synthesizers"]):
            raise DecouplingError(
                f"this state does not fit: {misfit}; decouple with the plan and sources that the "
                "state was saved with"
            )
        synthesizers.load_state_dict(saved["synthesizers"])
        load_optimizers(mine, saved["optimizers"])

    def train(self, mode: bool = True) -> Any:
        """As ever; the sources, too."""
        super().train(mode)
        self._dni_fx.graphs.synthesizers.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``to``, ``cuda``, ``double`` and the like take the sources along; these stay in single
        precision at least.
        """
        super()._apply(fn, recurse)
        self._dni_fx.graphs.synthesizers._apply(lambda t: _widened(fn(t)))
        for optimizer in (self._dni_fx.optimizers or {}).values():
            optimizer.load_state_dict(optimizer.state_dict())  # puts it where the parameters are
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """The table of attributes is the model's; a forward put in the place of this module's is
        not for the model.
        """
        if name == "forward":
            type(self).forward = staticmethod(value)  # type: ignore[method-assign]
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward" and isinstance(vars(type(self))[name], staticmethod):
            own = _forward_like(self._dni_fx.graphs.model)
            type(self).forward = own  # type: ignore[method-assign]
        else:
            super().__delattr__(name)

    def __prepare_scriptable__(self) -> Any:
        raise transformed("torch.jit.script")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._dni_fx.copy(memo).module

    def __reduce__(self) -> Any:
        raise TypeError(
            "a drop-in module is not pickled: save its state_dict() (the model's own keys) and "
            "synthesizer_state_dict(), or the plain model itself"
        )


class DropInState:
    """What a drop-in module knows besides the model: see :meth:`dni_fx.Decoupled.as_module`;
    ``encode`` makes of a target what sources see.
    """

    def __init__(
        self,
        graphs: Graphs,
        encode: Context | None,
        make_optimizer: MakeOptimizer | None,
        target_of: Any,
        unit: float | Callable[[], float],
        module: DropIn | None = None,
    ) -> None:
        if graphs.is_traced:
            _check_sources(graphs)
        self.graphs, self.encode = graphs, encode
        self.make_optimizer, self.target_of, self.unit_of = make_optimizer, target_of, unit
        self.optimizers: dict[str, torch.optim.Optimizer] | None = None
        self.target: Any = None
        self.module = _module_like(graphs.model) if module is None else module
        type(self.module)._dni_fx = self
        # Parameters, modes, attributes: the model's.
        object.__setattr__(self.module, "__dict__", vars(graphs.model))

    def copy(self, memo: dict[int, Any]) -> DropInState:
        """Of model, sources and optimisers."""
        module = _module_like(self.graphs.model)
        memo[id(self.module)] = module  # before the model, whose attributes may refer to it
        graphs, encode = copy.deepcopy((self.graphs, self.encode), memo)
        other = DropInState(
            graphs, encode, self.make_optimizer, self.target_of, self.unit_of, module
        )
        forward = vars(type(self.module))["forward"]
        if isinstance(forward, staticmethod):
            module.forward = copy.deepcopy(forward.__func__, memo)  # type: ignore[method-assign]
        if self.optimizers is not None:
            known = {n: o.state_dict() for n, o in self.optimizers.items()}
            load_optimizers(other.optimizers_now(), known)
        return other

    def optimizers_now(self) -> dict[str, torch.optim.Optimizer]:
        """Of every source that has parameters."""
        if self.optimizers is None:
            _check_sources(self.graphs)
            self.optimizers = source_optimizers(self.graphs, self.make_optimizer)
        return self.optimizers

    def unit(self) -> float:
        """The factor that the user puts in front of the mean loss now."""
        unit = self.unit_of() if callable(self.unit_of) else self.unit_of
        if not isinstance(unit, int | float) or not math.isfinite(unit) or unit <= 0:
            raise DecouplingError(f"unit= must be, or return, a positive number, not {unit!r}")
        return float(unit)

    def call(self, args: Any, kwargs: Any) -> Any:
        """The module's forward."""
        graphs, model = self.graphs, self.graphs.model
        known_exact = graphs.is_traced and graphs.is_exact
        if not model.training or not torch.is_grad_enabled() or known_exact:
            return type(model).forward(model, *args, **kwargs)
        refuse_transforms(args, kwargs)
        values = graphs.bind(*args, **kwargs)
        self.optimizers_now()
        if graphs.is_exact:
            return type(model).forward(model, *args, **kwargs)
        check_ordinary(values)
        target = self.target
        if target is None and self.target_of is not None:
            target = self.target_of(*args, **kwargs)
        context = None if self.encode is None or target is None else self.encode(target)
        with keep_modes():
            return self._run(values, context)

    def _run(self, values: dict[str, Any], context: Tensor | None) -> Any:
        """Stage after stage, the last one with autograd's own graph; values go when nothing needs
        them any more.
        """
        served = self.graphs.served()
        setting = Setting.of(self.graphs, _OWN_LOSS, served=served, all_cuts=False)
        state = BatchState(values=values, context=context)
        answers, unit = LocalAnswers(setting, state), self.unit()
        parameters = dict(self.graphs.model.named_parameters(remove_duplicate=False))
        besides = setting.seen_besides
        used = {s.index: [*s.inputs, *besides.get(s.index, ())] for s in setting.stages}
        last_use = {n: index for index, names in used.items() for n in names}
        for stage in setting.stages[:-1]:
            done = [n for n in used[stage.index] if last_use[n] == stage.index]
            batch = StageBatch(setting, stage.index, state, answers)
            visit = Visit(batch, unit, self.learn)
            visit.run(_owned(self.graphs.model, parameters, stage.parameters), done)
        last = setting.stages[-1]
        inputs = [values.pop(n) for n in last.inputs]
        values.clear()
        return last.module(*inputs)

    def learn(self, group: Served, gradients: Sequence[Tensor | None]) -> None:
        """One step of a source; none where something is not finite, as a scaler leaves out the
        model's.
        """
        known = [g for g in gradients if g is not None]
        if known and all_finite(known):
            for parameter, gradient in zip(learnt_by(group), gradients, strict=True):
                parameter.grad = gradient
            optimizer = self.optimizers_now()[group.name]
            optimizer.step()
            optimizer.zero_grad()


def _module_like(model: nn.Module) -> DropIn:
    """An object of a new class, a subclass of the model's, without attributes yet."""
    base = type(model)
    if "forward" in vars(model):
        raise DecouplingError(
            "forward was replaced in the model object itself: override it in a subclass instead"
        )

    def new(_: type, *args: Any, **kwargs: Any) -> nn.Module:  # as nn.Sequential's slices do
        return base(*args, **kwargs)

    body = {"forward": _forward_like(model), "__new__": new, "__module__": base.__module__}
    # The name is the model's: libraries save it and go by it.
    body["__qualname__"] = f"Decoupled{base.__qualname__}"
    module: DropIn = object.__new__(type(base.__name__, (DropIn, base), body))
    return module


def _forward_like(model: nn.Module) -> Callable[..., Any]:
    """With the signature of the model's; ``__wrapped__``, too, would have libraries that unwrap
    undo the cuts.
    """

    @functools.wraps(type(model).forward)
    def forward(module: DropIn, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, fx.Proxy):
            raise transformed("torch.fx.symbolic_trace")
        return DropIn.forward(module, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def _owned(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], names: Sequence[str]
) -> list[nn.Parameter]:
    """A stage's parameters by name.

    Raises:
        DecouplingError: they are not where they were, or sharded.
    """
    owned = [parameters.get(name) for name in names]
    if any(type(p) is not nn.Parameter for p in owned):
        check_unsharded(model)
    for name, parameter in zip(names, owned, strict=True):
        if parameter is None:
            raise DecouplingError(
                f"{name!r} is no parameter of the model any more, so its stage would stand still: "
                "wrap or exchange parameters before the model is decoupled"
            )
    return [p for p in owned if p is not None]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_sources(graphs: Graphs) -> None:
    """A loop of the user's own knows no messages but gradients, and those added up."""
    for group in serve(graphs.interfaces, graphs.sources):
        source = group.source
        others = {*source.asks.hears} - {"gradient"}
        if not source.asks.exact and (source.asks.wait or others):
            raise DecouplingError(
                f"the source at {group.name!r} ({type(source).__name__}) waits, or asks for "
                f"{', '.join(sorted(others)) or 'late gradients'}, which an ordinary loop does not "
                "send: use a regression, 'local', a control, or dni_fx.Trainer"
            )
        if group.by_consumer:
            raise DecouplingError(
                f"the source at {group.name!r} has a part for each of {len(group.consumers)} "
                "consumers, whose gradients an ordinary loop adds up: use one source for their "
                "sum, or dni_fx.Trainer"
            )
    if graphs.inputs:
        raise DecouplingError(
            "synthetic inputs have no use where stages run one after the other: leave out inputs="
        )
