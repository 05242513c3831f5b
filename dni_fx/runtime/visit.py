"""One visit of a stage within the user's own graph: one ``autograd.Function``; see ``module``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..sources import Prediction, Served
from .emitted import used_up
from .finite import all_finite
from .missing import check_arrived
from .stage_batch import StageBatch
from .transforms import transformed

Teach = Callable[[Served, Sequence[Tensor | None]], None]


@dataclass
class Lesson:
    """What a source has to learn from one call."""

    group: Served
    values: dict[str, Tensor]  # about which it is asked again when their gradients are there
    gradients: tuple[Tensor | None, ...] | None = None  # its parameters', if it needs no message


class Visit:
    """One stage in one call.

    Args:
        batch: the call in this stage.
        unit: the factor in front of the mean loss.
        teach: steps a source on the gradients of its parameters.

    Attributes:
        sent, received: names of the values that the stage sends and takes with a gradient.
        learning: names of its parameters that are trained.
        inputs: what it takes, until it has run.
    """

    def __init__(self, batch: StageBatch, unit: float, teach: Teach) -> None:
        self.batch, self.unit, self.teach = batch, unit, teach
        self.sent = batch.setting.split.sent_by(batch.index)
        self.received: list[str] = []
        self.learning: list[str] = []
        self.inputs: dict[str, Any] = {}

    def run(self, parameters: list[nn.Parameter], done: list[str]) -> None:
        """Run the stage, whose parameters these are; what it sends is known then, and the inputs
        that no later stage takes, ``done``, are gone.
        """
        batch, values = self.batch, self.batch.state.values
        if not self.sent:  # nothing in it learns
            batch.run_only()
        self.inputs = batch.receive() if self.sent else {}
        batch.sources.note_inputs()
        for name in done:
            del values[name]
        if self.sent:
            tensors = {n: v for n, v in self.inputs.items() if isinstance(v, Tensor)}
            self.received = [n for n, v in tensors.items() if v.requires_grad]
            names = batch.stage.parameters
            pairs = [(n, p) for n, p in zip(names, parameters, strict=True) if p.requires_grad]
            self.learning, own = [n for n, _ in pairs], [p for _, p in pairs]
            found = _StageFunction.apply(self, *(tensors[n] for n in self.received), *own)
            values.update(zip(self.sent, found, strict=True))

    def ask(self, group: Served, values: Mapping[str, Tensor]) -> Prediction:
        """What a source predicts, for the mean loss itself; nobody else keeps it.

        Raises:
            DecouplingError: it was made for a context, and there is none.
        """
        group.source.unit = 1.0
        if self.unit != 1:  # the scale is what makes small numbers possible in half precision
            values = {n: v.float() if v.dtype == torch.float16 else v for n, v in values.items()}
        try:
            self.batch.sources.ask(group, values)
        except DecouplingError as error:
            if self.batch.state.context is not None or group.source.context_spec is None:
                raise
            raise DecouplingError(
                f"the source at {group.name!r} was made for a context, but this call had none: "
                "call the module inside `with m.context(target):`, or pass context= to as_module"
            ) from error
        return self.batch.state.predictions.pop(group.name)

    def compute(
        self, tensors: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], list[Tensor | None], list[Lesson]]:
        """Run the stage on ``tensors`` (what it receives with a gradient, then its parameters), ask
        the sources, take the gradients.

        Returns:
            What it sends with a gradient, detached; the gradients of ``tensors``, None where nobody
            wants one; what the sources have to learn.
        """
        wanted = list(tensors)
        for place, name in enumerate(self.received):
            wanted[place] = tensors[place].detach().requires_grad_()
            self.inputs[name] = wanted[place].view_as(wanted[place])
        tape = self.batch.forward(self.inputs)
        self.inputs.clear()
        for place, name in enumerate(self.received):
            if name in tape.leaves:
                wanted[place] = tape.leaves[name].tensor
        values = {n: self.batch.state.values.pop(n) for n in self.sent}
        given, lessons = self._ask_all(values)
        roots = [(tape.outputs[n], given.get(n)) for n in self.sent]
        pairs = [(root, g) for root, g in roots if root.requires_grad and g is not None]
        complete = all(given.get(n) is not None for n in self.sent)
        if self.unit != 1:
            pairs = [(root, (gradient * self.unit).to(root.dtype)) for root, gradient in pairs]
        return list(values.values()), self._take(pairs, wanted, complete), lessons

    def _ask_all(self, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Lesson]]:
        """The gradients that the sources predict, and what they have to learn."""
        lessons: list[Lesson] = []
        given: dict[str, Tensor] = {}
        for group in self.batch.sources.groups:
            served = {n: values[n] for n in group.names}
            prediction = self.ask(group, served)
            given.update(zip(group.names, prediction.gradients or (), strict=True))
            if group.source.asks.learns_from:
                lessons.append(Lesson(group, served))
            elif gradients := _gradients(group, prediction, ()):
                lessons.append(Lesson(group, {}, gradients))
            del prediction  # with all that its source computed
        return given, lessons

    def _take(
        self, pairs: list[tuple[Tensor, Tensor]], wanted: list[Tensor], complete: bool
    ) -> list[Tensor | None]:
        """The gradients of what is wanted; None of an input whose gradient nobody hears.

        Args:
            pairs: what the stage sends, each with its gradient.
            wanted: what it receives, then its parameters.
            complete: whether all that it sends has a gradient.
        """
        setting = self.batch.setting
        hears = [s for s in setting.served if s.source.asks.learns_from]
        heard = {n for s in hears for n in s.names} | set(setting.split.model_inputs)
        asked = [n for n in self.received if n in heard]
        places = [k for k, n in enumerate(self.received) if n in heard]
        inputs = [*(wanted[k] for k in places), *wanted[len(self.received) :]]
        taken: tuple[Tensor | None, ...] = (None,) * len(inputs)
        roots, gradients = [root for root, _ in pairs], [gradient for _, gradient in pairs]
        if pairs and inputs:
            with _unhooked([t for t in wanted if isinstance(t, nn.Parameter)]):
                try:
                    taken = torch.autograd.grad(roots, inputs, gradients, allow_unused=True)
                except RuntimeError as error:
                    raise (used_up(error) or error) from error
        found = dict(zip(asked, taken, strict=False))
        learnt = dict(zip(self.learning, taken[len(asked) :], strict=True))
        if any(g is None for g in taken):
            _refuse_reentrant([root.grad_fn for root in roots])
            if complete:
                expected = setting.expected[self.batch.index]
                check_arrived(self.batch.index, expected, found, learnt)
        return [*(found.get(n) for n in self.received), *learnt.values()]

    def learn(self, lessons: list[Lesson], arrived: Mapping[str, Tensor | None]) -> None:
        """Teach the sources on the gradients of what the stage sent; what is not finite teaches
        none.
        """
        for lesson in lessons:
            gradients = lesson.gradients
            if gradients is None:
                pairs = [(v, arrived[n]) for n, v in lesson.values.items()]
                message = tuple(_message(g, v, self.unit) for v, g in pairs)
                if not all_finite(list(message)):
                    continue  # a scaler leaves out this step, too
                prediction = self.ask(lesson.group, lesson.values)
                gradients = _gradients(lesson.group, prediction, message)
            self.teach(lesson.group, gradients)


class _StageFunction(torch.autograd.Function):
    """One stage: its gradients are taken in forward and handed over in backward."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, *tensors: Tensor) -> Any:
        """Run the stage on ``tensors`` (what it receives, then its parameters)."""
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            values, ctx.found, ctx.lessons = visit.compute(tensors)
        ctx.visit, ctx.cast = visit, _cast(values[0].device.type)
        return tuple(v.view_as(v) for v in values)

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> Any:
        """What was taken; ``above`` is what the sources learn from."""
        if torch.is_grad_enabled():  # before a source learns from what is no gradient of the loss
            raise transformed(
                "differentiating twice (create_graph=True, as for a gradient penalty)"
            )
        found, lessons, ctx.found, ctx.lessons = ctx.found, ctx.lessons, None, None
        if found is None:
            raise DecouplingError(
                "a call's gradients are handed over once, for the whole loss: add up the losses "
                "before backward, or call the module again (retain_graph=True does not help)"
            )
        with torch.enable_grad(), ctx.cast():
            ctx.visit.learn(lessons, dict(zip(ctx.visit.sent, above, strict=True)))
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


def _message(gradient: Tensor | None, value: Tensor, unit: float) -> Tensor:
    """What a source hears: of the mean loss itself, in the layout that ``.grad`` has (sums depend
    on that).
    """
    if gradient is None:
        return torch.zeros_like(value)
    if gradient.stride() != torch.empty_like(value, device="meta").stride():
        gradient = torch.empty_like(value).copy_(gradient)
    if unit == 1:
        return gradient
    return (gradient.float() if gradient.dtype == torch.float16 else gradient) / unit


def learnt_by(group: Served) -> list[nn.Parameter]:
    """The parameters of a source that learn."""
    return [p for p in group.source.parameters() if p.requires_grad]


def _gradients(
    group: Served, prediction: Prediction, message: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Of what a source learns; none where it learns nothing."""
    loss, learnt = group.fit(prediction, message), learnt_by(group)
    if loss is None or not learnt:
        return ()
    return torch.autograd.grad(loss, learnt, allow_unused=True)


def _cast(device: str) -> Callable[[], torch.autocast]:
    """Makes the autocast of now again: backward is called outside of it, on threads of its own."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return functools.partial(torch.autocast, device, dtype, enabled)
