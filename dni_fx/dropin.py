"""A decoupled model in an ordinary training loop: the user's class, whose forward and backward run stage by stage.

Every stage but the last is one ``autograd.Function``. Its forward runs the stage, asks the sources and takes the
gradients at once, so that the stage's activations are gone before the next one runs; its backward hands these gradients
over, and receives what the sources learn from. The last stage is differentiated as usual, by the user's own loss.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .decoupled import Decoupled
from .errors import DecouplingError, NonFiniteError
from .sources import Prediction, Served, awaited_kinds, message_kinds
from .stepping import detached, kept_weights

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
_HIDDEN = "_dni_fx"


class DropIn(nn.Module):
    """What :meth:`Decoupled.as_module` adds to the user's class; see there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decoupled in training with gradients; else the model's own."""
        state: _State = self.__dict__[_HIDDEN]
        return state.call(self, args, kwargs)

    @contextlib.contextmanager
    def context(self, target: Any) -> Iterator[None]:
        """Show the sources a training target in the calls inside."""
        state: _State = self.__dict__[_HIDDEN]
        before, state.target = state.target, target
        try:
            yield
        finally:
            state.target = before

    def synthesizer_state_dict(self) -> dict[str, Any]:
        """The sources and their optimisers, to be saved beside the model's ``state_dict``."""
        state: _State = self.__dict__[_HIDDEN]
        return {
            "synthesizers": state.decoupled.synthesizers.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in state.optimizers_now().items()},
        }

    def load_synthesizer_state_dict(self, saved: dict[str, Any]) -> None:
        """What :meth:`synthesizer_state_dict` returned.

        Raises:
            DecouplingError: it belongs to other sources; nothing is loaded then.
        """
        state: _State = self.__dict__[_HIDDEN]
        mine = state.optimizers_now()
        if set(saved["optimizers"]) != set(mine):
            raise DecouplingError(
                f"the saved sources are those of {sorted(saved['optimizers'])}, but here are {sorted(mine)}: decouple "
                "with the same plan"
            )
        state.decoupled.synthesizers.load_state_dict(saved["synthesizers"])
        for name, optimizer in mine.items():
            optimizer.load_state_dict(saved["optimizers"][name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        state: _State = self.__dict__[_HIDDEN]
        return state.copy(memo).module

    def __reduce__(self) -> Any:
        raise TypeError(
            "a drop-in module is not pickled: save its state_dict() (the model's own keys) and "
            "synthesizer_state_dict(), or the plain model itself"
        )


class _State:
    """What a drop-in module knows besides the model."""

    def __init__(
        self, decoupled: Decoupled, make_optimizer: MakeOptimizer, target_of: Any, unit: float | Callable[[], float]
    ) -> None:
        self.decoupled, self.make_optimizer, self.target_of, self.unit_of = decoupled, make_optimizer, target_of, unit
        self.optimizers: dict[str, torch.optim.Optimizer] | None = None
        self.target: Any = None
        self.calls = 0
        self.module = self._wrap()

    def _wrap(self) -> nn.Module:
        model = self.decoupled.model
        base = type(model)
        forward = functools.wraps(base.forward)(lambda module, *args, **kwargs: DropIn.forward(module, *args, **kwargs))
        kind = type(f"Decoupled{base.__name__}", (DropIn, base), {"forward": forward, "__module__": base.__module__})
        module: nn.Module = object.__new__(kind)
        module.__dict__.update(model.__dict__)  # the same tables: parameters, buffers and submodules are the model's
        module.__dict__[_HIDDEN] = self
        return module

    def copy(self, memo: dict[int, Any]) -> _State:
        """Of model, sources and optimisers."""
        other = _State(copy.deepcopy(self.decoupled, memo), self.make_optimizer, self.target_of, self.unit_of)
        if self.optimizers is not None:
            for name, optimizer in other.optimizers_now().items():
                optimizer.load_state_dict(copy.deepcopy(self.optimizers[name].state_dict()))
        other.module.training = self.module.training
        return other

    def optimizers_now(self) -> dict[str, torch.optim.Optimizer]:
        """Of every source that has parameters."""
        if self.optimizers is None:
            _check_sources(self.decoupled)
            pairs = [(n, list(s.named_parameters())) for n, s in self.decoupled.named_learners()]
            self.optimizers = {n: self.make_optimizer(named) for n, named in pairs if named}
        return self.optimizers

    def unit(self) -> float:
        """The factor that the user puts in front of the mean loss now."""
        unit = self.unit_of() if callable(self.unit_of) else self.unit_of
        if not isinstance(unit, int | float) or not math.isfinite(unit) or unit <= 0:
            raise DecouplingError(f"unit= must be, or return, a positive number, not {unit!r}")
        return float(unit)

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The module's forward."""
        model, decoupled = self.decoupled.model, self.decoupled
        model.training = module.training
        decoupled.training = module.training
        if not module.training or not torch.is_grad_enabled():
            return type(model).forward(model, *args, **kwargs)
        values = decoupled.bind(*args, **kwargs)
        self.optimizers_now()
        if decoupled.is_exact:
            return decoupled._passes.run(decoupled._variant.split, values)
        target = self.target if self.target_of is None else self.target_of(*args, **kwargs)
        context = None if decoupled.context is None or target is None else decoupled.context(target)
        self.calls += 1
        return _Call(self, values, context).run()


class _Call:
    """One forward through the stages."""

    def __init__(self, state: _State, values: dict[str, Any], context: Tensor | None) -> None:
        self.state, self.values, self.context = state, values, context
        self.unit = state.unit()
        decoupled = state.decoupled
        self.split = decoupled._variant.split
        self.parameters = dict(decoupled.model.named_parameters())
        self.served = decoupled.served()
        self.carried = {i.name for i in self.split.interfaces}
        self.output: Any = None

    def run(self) -> Any:
        """Stage after stage; the last one with autograd's own graph."""
        for stage in self.split.stages[:-1]:
            named = [(n, p) for n in stage.parameters if (p := self.parameters[n]).requires_grad]
            received = [n for n in stage.inputs if n in self.carried]
            inputs = [self.values[n] for n in received]
            sent: list[str] = [n for n in stage.outputs if n in self.carried]
            found = _StageFunction.apply(self, stage, received, sent, *inputs, *(p for _, p in named))
            self.values.update(zip(sent, found, strict=True))
        last = self.split.stages[-1]
        self.output = last.module(*(self.values[n] for n in last.inputs))
        return self.output


class _StageFunction(torch.autograd.Function):
    """One stage: its gradients are taken in forward and handed over in backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, stage: Any, received: list[str], sent: list[str], *tensors: Tensor) -> Any:
        """Run the stage on ``tensors`` (what it receives, then its parameters)."""
        parameters = tensors[len(received) :]
        with torch.enable_grad():
            leaves = {n: t.detach().requires_grad_() for n, t in zip(received, tensors, strict=False)}
            inputs = [leaves[n].view_as(leaves[n]) if n in leaves else call.values[n] for n in stage.inputs]
            results = dict(zip(stage.outputs, stage.module(*inputs), strict=True))
            call.values.update({n: detached(v) for n, v in results.items() if n not in sent})
            values = {n: results[n].detach() for n in sent}
            groups = [s for s in call.served if s.producer == stage.index]
            predictions = {s.name: _ask(s, values, call) for s in groups}
            given: dict[str, Tensor] = {}
            for group in groups:
                gradients = predictions[group.name].gradients
                assert gradients is not None
                given.update(zip(group.names, gradients, strict=True))
            pairs = [(results[n], given[n]) for n in sent if results[n].requires_grad]
            wanted = [*leaves.values(), *parameters]
            found: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if pairs and wanted:
                found = torch.autograd.grad(
                    [root for root, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
                )
        ctx.call, ctx.groups, ctx.predictions = call, groups, predictions
        ctx.sent, ctx.values = sent, values
        ctx.found = found if call.unit == 1 else tuple(None if g is None else g * call.unit for g in found)
        return tuple(v.view_as(v) for v in values.values())

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> Any:
        """What was taken; ``above`` is what the sources learn from."""
        found, ctx.found = ctx.found, None
        if found is None:
            raise DecouplingError("a drop-in module's gradients are handed over once: call it again before backward")
        arrived = dict(zip(ctx.sent, above, strict=True))
        with torch.enable_grad():
            for group in ctx.groups:
                message = [
                    torch.zeros_like(ctx.values[n]) if (g := arrived[n]) is None else g.detach() / ctx.call.unit
                    for n in group.names
                ]
                _teach(group, ctx.predictions[group.name], tuple(message), ctx.call.state)
        ctx.predictions = ctx.values = None
        return (None, None, None, None, *found)


def _ask(group: Served, values: dict[str, Tensor], call: _Call) -> Prediction:
    with kept_weights(group.source):
        prediction: Prediction = group.source(tuple(values[n] for n in group.names), call.context)
    return prediction


def _teach(group: Served, prediction: Prediction, message: tuple[Tensor, ...], state: _State) -> None:
    """One step of a source, on what has come back."""
    optimizer = state.optimizers_now().get(group.name)
    heard = message if message_kinds(group.source) == ("gradient",) else ()
    if optimizer is None:
        group.source.fit(prediction, heard)
        return
    if not all(bool(t.isfinite().all()) for t in message):
        return  # a scaler skips this update, too
    loss = group.source.fit(prediction, heard)
    if loss is None:
        return
    learnt = [p for p in group.source.parameters() if p.requires_grad]
    if not bool(loss.isfinite()):
        raise NonFiniteError(f"the regression of the source at interface {group.name!r} is not finite")
    for parameter, gradient in zip(learnt, torch.autograd.grad(loss, learnt, allow_unused=True), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _check_sources(decoupled: Decoupled) -> None:
    """A loop of the user's own knows no messages but gradients."""
    for name, source in decoupled.sources.items():
        kinds = (*message_kinds(source), *awaited_kinds(source))
        if source.exact:
            continue
        if source.lag is not None or set(kinds) - {"gradient"}:
            raise DecouplingError(
                f"the source at {name!r} ({type(source).__name__}) waits, or asks for "
                f"{', '.join(sorted(set(kinds) - {'gradient'})) or 'late gradients'}, which an ordinary loop does not "
                "send: use a regression, 'local', a control, or dni_fx.Trainer"
            )
    if decoupled.inputs:
        raise DecouplingError("synthetic inputs have no use where stages run one after the other: leave out inputs=")


def make_module(
    decoupled: Decoupled, make_optimizer: MakeOptimizer, target_of: Any, unit: float | Callable[[], float]
) -> nn.Module:
    """See :meth:`Decoupled.as_module`."""
    if decoupled.is_traced:
        _check_sources(decoupled)
    return _State(decoupled, make_optimizer, target_of, unit).module
