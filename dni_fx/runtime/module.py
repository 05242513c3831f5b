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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..passes.cut.insertion import Context
from ..passes.cut.splitting import StageGraph
from ..sources import Each, Prediction, Served, awaited_kinds, message_kinds, serve
from .emitted import detached, keep_modes
from .finite import all_finite
from .optimizing import MakeOptimizer, made_optimizer


class DropIn(nn.Module):
    """What :meth:`dni_fx.Decoupled.as_module` adds to the user's class; see there."""

    # In the class, one for each module: the module's own table is the model's.
    _dni_fx: ClassVar[_State]

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
        if set(saved["optimizers"]) != set(mine):
            raise DecouplingError(
                f"the saved sources are those of {sorted(saved['optimizers'])}, but here are "
                f"{sorted(mine)}: decouple with the same plan"
            )
        have, given = (
            {k: getattr(v, "shape", None) for k, v in d.items() if not k.endswith("_extra_state")}
            for d in (synthesizers.state_dict(), saved["synthesizers"])
        )
        if have != given:
            wrong = next(k for k in {**have, **given} if have.get(k, "") != given.get(k, ""))
            raise DecouplingError(
                f"the saved sources are others, see {wrong!r}: decouple with the same plan"
            )
        synthesizers.load_state_dict(saved["synthesizers"])
        for name, optimizer in mine.items():
            optimizer.load_state_dict(saved["optimizers"][name])

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._dni_fx.copy(memo).module

    def __reduce__(self) -> Any:
        raise TypeError(
            "a drop-in module is not pickled: save its state_dict() (the model's own keys) and "
            "synthesizer_state_dict(), or the plain model itself"
        )


class _State:
    """What a drop-in module knows besides the model."""

    def __init__(
        self,
        graphs: Graphs,
        encode: Context | None,
        make_optimizer: MakeOptimizer,
        target_of: Any,
        unit: float | Callable[[], float],
        module: DropIn | None = None,
    ) -> None:
        self.graphs, self.encode = graphs, encode
        self.make_optimizer, self.target_of, self.unit_of = make_optimizer, target_of, unit
        self.optimizers: dict[str, torch.optim.Optimizer] | None = None
        self.target: Any = None
        self.module = _module_like(graphs.model) if module is None else module
        type(self.module)._dni_fx = self
        # Parameters, modes, attributes: the model's.
        object.__setattr__(self.module, "__dict__", vars(graphs.model))

    def copy(self, memo: dict[int, Any]) -> _State:
        """Of model, sources and optimisers."""
        module = _module_like(self.graphs.model)
        memo[id(self.module)] = module  # before the model, whose attributes may refer to it
        graphs, encode = copy.deepcopy((self.graphs, self.encode), memo)
        other = _State(graphs, encode, self.make_optimizer, self.target_of, self.unit_of, module)
        forward = vars(type(self.module))["forward"]
        if isinstance(forward, staticmethod):
            module.forward = copy.deepcopy(forward.__func__, memo)  # type: ignore[method-assign]
        if self.optimizers is not None:
            for name, optimizer in other.optimizers_now().items():
                optimizer.load_state_dict(copy.deepcopy(self.optimizers[name].state_dict()))
        return other

    def optimizers_now(self) -> dict[str, torch.optim.Optimizer]:
        """Of every source that has parameters."""
        if self.optimizers is None:
            _check_sources(self.graphs)
            pairs = [(n, list(s.named_parameters())) for n, s in self.graphs.named_learners()]
            made = {
                n: made_optimizer(self.make_optimizer(named), "synthesizer_optimizer")
                for n, named in pairs
                if named
            }
            self.optimizers = made
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
        if not model.training or not torch.is_grad_enabled():
            return type(model).forward(model, *args, **kwargs)
        values = graphs.bind(*args, **kwargs)
        self.optimizers_now()
        if graphs.is_exact:
            return type(model).forward(model, *args, **kwargs)
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
        split, served, unit = self.graphs.variant.split, self.graphs.served(), self.unit()
        parameters = dict(self.graphs.model.named_parameters(remove_duplicate=False))
        heard = {n for s in served if message_kinds(s.source) for n in s.names} | set(
            split.model_inputs
        )
        last_use = {n: s.index for s in split.stages for n in s.inputs}
        for stage in split.stages[:-1]:
            inputs = [
                values.pop(n) if last_use[n] == stage.index else values[n] for n in stage.inputs
            ]
            groups = [s for s in served if s.producer == stage.index]
            turn = _Turn(
                self, stage, inputs, split.sent_by(stage.index), groups, heard, context, unit
            )
            del inputs
            values.update(turn.run([parameters[n] for n in stage.parameters]))
        last = split.stages[-1]
        inputs = [values.pop(n) for n in last.inputs]
        values.clear()
        return last.module(*inputs)

    def learn(self, group: Served, gradients: Sequence[Tensor | None]) -> None:
        """One step of a source; none where something is not finite, as a scaler leaves out the
        model's.
        """
        if any(g is not None for g in gradients) and all_finite(
            [g for g in gradients if g is not None]
        ):
            for parameter, gradient in zip(_learnt(group), gradients, strict=True):
                parameter.grad = gradient
            self.optimizers_now()[group.name].step()
            self.optimizers_now()[group.name].zero_grad()


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
        return DropIn.forward(module, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


@dataclass
class _Turn:
    """One stage in one call.

    Attributes:
        inputs: what the stage receives.
        sent: names of the values that it sends with a gradient.
        groups: the sources of these.
        heard: names of all values whose gradient somebody wants.
        unit: the factor in front of the mean loss.
        plain: what it sends without a gradient.
    """

    state: _State
    stage: StageGraph
    inputs: list[Any]
    sent: list[str]
    groups: list[Served]
    heard: set[str]
    context: Tensor | None
    unit: float
    plain: dict[str, Any] = field(default_factory=dict)

    def run(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """Everything that the stage sends, by name."""
        if not self.sent:  # nothing in it learns
            with torch.no_grad():
                return dict(
                    zip(
                        self.stage.outputs,
                        map(detached, self.stage.module(*self.inputs)),
                        strict=True,
                    )
                )
        self.received = [
            i for i, v in enumerate(self.inputs) if isinstance(v, Tensor) and v.requires_grad
        ]
        own = [p for p in parameters if p.requires_grad]
        found = _StageFunction.apply(self, *(self.inputs[i] for i in self.received), *own)
        plain, self.plain = self.plain, {}
        return plain | dict(zip(self.sent, found, strict=True))

    def ask(self, group: Served, values: tuple[Tensor, ...]) -> Prediction:
        """What a source predicts, for the mean loss itself."""
        group.source.unit = 1.0
        if self.unit != 1:  # the scale is what makes small numbers possible in half precision
            values = tuple(v.float() if v.dtype == torch.float16 else v for v in values)
        try:
            prediction: Prediction = group.source(values, self.context)
        except DecouplingError as error:
            if self.context is not None or group.source.context_spec is None:
                raise
            raise DecouplingError(
                f"the source at {group.name!r} was made for a context, but this call had none: "
                "call the module inside `with m.context(target):`, or pass context= to as_module"
            ) from error
        return prediction

    def compute(
        self, tensors: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], list[Tensor | None], list[_Lesson]]:
        """Run the stage, ask the sources, take the gradients.

        Args:
            tensors: what the stage receives with a gradient, then its parameters.

        Returns:
            What it sends with a gradient, detached; the gradients of ``tensors``, None where nobody
            wants one; what the sources have to learn.
        """
        wanted = list(tensors)
        for place, i in enumerate(self.received):
            wanted[place] = tensors[place].detach().requires_grad_()
            self.inputs[i] = wanted[place].view_as(wanted[place])
        results = dict(zip(self.stage.outputs, self.stage.module(*self.inputs), strict=True))
        self.inputs.clear()
        roots = {n: results.pop(n) for n in self.sent}
        self.plain = {n: detached(v) for n, v in results.items()}
        values = {n: v.detach() for n, v in roots.items()}
        lessons: list[_Lesson] = []
        given: dict[str, Tensor] = {}
        for group in self.groups:
            served = tuple(values[n] for n in group.names)
            prediction = self.ask(group, served)
            given.update(zip(group.names, prediction.gradients or (), strict=True))
            if message_kinds(group.source):
                lessons.append(_Lesson(group, served))
            elif gradients := _gradients(group, prediction, ()):
                lessons.append(_Lesson(group, (), gradients))
            del prediction  # with all that its source computed
        pairs = [(root, given.pop(n)) for n, root in roots.items() if root.requires_grad]
        if self.unit != 1:
            pairs = [(root, (gradient * self.unit).to(root.dtype)) for root, gradient in pairs]
        unheard = {p for p, i in enumerate(self.received) if self.stage.inputs[i] not in self.heard}
        places = [i for i in range(len(wanted)) if i not in unheard]
        found: list[Tensor | None] = [None] * len(wanted)
        if pairs and places:
            with _unhooked([t for t in wanted if isinstance(t, nn.Parameter)]):
                taken = torch.autograd.grad(
                    [r for r, _ in pairs],
                    [wanted[i] for i in places],
                    [g for _, g in pairs],
                    allow_unused=True,
                )
            if any(g is None for g in taken):
                _refuse_reentrant([r.grad_fn for r, _ in pairs])
            for i, gradient in zip(places, taken, strict=True):
                found[i] = gradient
        return list(values.values()), found, lessons


@dataclass
class _Lesson:
    """What a source has to learn from one call.

    Attributes:
        values: what it was asked about; it is asked again when the gradients of these are there.
        gradients: of its parameters, where it needs no message.
    """

    group: Served
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] | None = None


class _StageFunction(torch.autograd.Function):
    """One stage: its gradients are taken in forward and handed over in backward."""

    @staticmethod
    def forward(ctx: Any, turn: _Turn, *tensors: Tensor) -> Any:
        """Run the stage on ``tensors`` (what it receives, then its parameters)."""
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            values, ctx.found, ctx.lessons = turn.compute(tensors)
        ctx.turn, ctx.cast = turn, _cast(values[0].device.type)
        return tuple(v.view_as(v) for v in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor | None) -> Any:
        """What was taken; ``above`` is what the sources learn from."""
        turn, found, lessons, ctx.found, ctx.lessons = ctx.turn, ctx.found, ctx.lessons, None, None
        if found is None:
            raise DecouplingError(
                "a call's gradients are handed over once, for the whole loss: add up the losses "
                "before backward, or call the module again (retain_graph=True does not help)"
            )
        arrived = dict(zip(turn.sent, above, strict=True))
        with torch.enable_grad(), ctx.cast():
            for lesson in lessons:
                gradients = lesson.gradients
                if gradients is None:
                    message = tuple(
                        torch.zeros_like(v)
                        if (g := arrived[n]) is None
                        else _message(g, v, turn.unit)
                        for n, v in zip(lesson.group.names, lesson.values, strict=True)
                    )
                    if not all_finite(list(message)):
                        continue  # a scaler leaves out this step, too
                    gradients = _gradients(
                        lesson.group, turn.ask(lesson.group, lesson.values), message
                    )
                turn.state.learn(lesson.group, gradients)
        return (None, *found)


def _refuse_reentrant(nodes: list[Any]) -> None:
    """Gradients of parameters in a reentrant checkpoint are not to be asked for; they would
    silently be missing.
    """
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise DecouplingError(
                "a stage uses torch.utils.checkpoint with use_reentrant=True: set it to False"
            )
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        nodes += new


@contextlib.contextmanager
def _unhooked(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The user's hooks are called once, when the gradients are handed over."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own


def _message(gradient: Tensor, value: Tensor, unit: float) -> Tensor:
    """What a source hears: of the mean loss itself, in the layout that ``.grad`` has (sums depend
    on that).
    """
    if gradient.stride() != torch.empty_like(value, device="meta").stride():
        gradient = torch.empty_like(value).copy_(gradient)
    if unit == 1:
        return gradient
    return (gradient.float() if gradient.dtype == torch.float16 else gradient) / unit


def _learnt(group: Served) -> list[nn.Parameter]:
    return [p for p in group.source.parameters() if p.requires_grad]


def _gradients(
    group: Served, prediction: Prediction, message: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Of what a source learns; none where it learns nothing."""
    loss, learnt = group.source.fit(prediction, message), _learnt(group)
    return (
        () if loss is None or not learnt else torch.autograd.grad(loss, learnt, allow_unused=True)
    )


def _cast(device: str) -> Callable[[], torch.autocast]:
    """Makes the autocast of now again: backward is called outside of it, on threads of its own."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return functools.partial(torch.autocast, device, dtype, enabled)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_sources(graphs: Graphs) -> None:
    """A loop of the user's own knows no messages but gradients, and those added up."""
    for group in serve(graphs.interfaces, graphs.sources):
        source = group.source
        others = {*message_kinds(source), *awaited_kinds(source)} - {"gradient"}
        if not source.exact and (source.lag is not None or others):
            raise DecouplingError(
                f"the source at {group.name!r} ({type(source).__name__}) waits, or asks for "
                f"{', '.join(sorted(others)) or 'late gradients'}, which an ordinary loop does not "
                "send: use a regression, 'local', a control, or dni_fx.Trainer"
            )
        if isinstance(source, Each) and len(group.consumers) > 1:
            raise DecouplingError(
                f"the source at {group.name!r} has a part for each of {len(group.consumers)} "
                "consumers, whose gradients an ordinary loop adds up: use one source for their "
                "sum, or dni_fx.Trainer"
            )
    if graphs.inputs:
        raise DecouplingError(
            "synthetic inputs have no use where stages run one after the other: leave out inputs="
        )


def make_module(
    graphs: Graphs,
    encode: Context | None,
    make_optimizer: MakeOptimizer,
    target_of: Any,
    unit: float | Callable[[], float],
) -> DropIn:
    """See :meth:`dni_fx.Decoupled.as_module`; ``encode`` makes of a target what sources see."""
    if graphs.is_traced:
        _check_sources(graphs)
    return _State(graphs, encode, make_optimizer, target_of, unit).module
