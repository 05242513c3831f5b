"""One batch through all stages, and the promise that a failed step changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .decoupled import Decoupled, Stage
from .errors import DecouplingError
from .passes._state import preserved_rng
from .reports import InterfaceReport, compare
from .stepping import StepResult, detached, evaluate, pull_back, regress


class Run:
    """What happens to one batch: values sent, gradients, predictions."""

    def __init__(self, decoupled: Decoupled, loss: Callable[[Any, Any], torch.Tensor]) -> None:
        self.stages: tuple[Stage, ...] = decoupled.stages
        self.functions = decoupled.functions()
        self.sources = decoupled.sources_by_name()
        self.loss_function = loss
        self.split = decoupled._variant.split
        self.sent: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor | None] = {}
        self.predictions: dict[str, Any] = {}
        self.loss: torch.Tensor
        self.output: Any = None

    def decoupled(self, values: dict[str, Any], context: Any, target: Any) -> None:
        """Every stage trains on its sources' predictions, in program order."""
        parts: dict[nn.Parameter, list[Callable[[torch.Tensor | None], torch.Tensor | None]]] = {}
        carried = [i.name for i in self.split.interfaces]
        for stage in self.stages:
            several = [self.split.shared_in(stage.index)[n] for k, n in self.split.reused if k == stage.index]
            reused = [p for p in several if p.requires_grad]
            if reused:
                result, again = self._step_twice(stage, values, context)
            else:
                result, again = self._step(stage, values, context, target), None
            values.update(result.outputs)
            for name, gradient in result.input_gradients.items():
                arrived = self.gradients.get(name)
                if gradient is not None:
                    self.gradients[name] = gradient if arrived is None else arrived + gradient
            self.predictions.update(result.predictions)
            for parameter in self.split.shared_in(stage.index).values():
                gradient, parameter.grad = parameter.grad, None
                if again is not None and any(parameter is p for p in reused):
                    parts.setdefault(parameter, []).append(functools.partial(again, parameter))
                elif gradient is not None:
                    parts.setdefault(parameter, []).append(functools.partial(_add, gradient))
        for parameter, steps in parts.items():  # last stage first, as autograd would
            total = None
            for add in reversed(steps):
                total = add(total)
            parameter.grad = total
        assert result.loss is not None
        self.loss, self.output = result.loss, result.outputs["output"]
        self.sent = {n: values[n] for n in carried}

    def _step(self, stage: Stage, values: dict[str, Any], context: Any, target: Any) -> StepResult:
        try:
            return self.functions[stage.index].step(values, context, self.loss_function, target)
        except DecouplingError as error:
            places = ", ".join(repr(n) for n in stage.outputs)
            raise type(error)(f"{stage.name}, which sends {places}: {error}") from error

    def _step_twice(self, stage: Stage, values: dict[str, Any], context: Any) -> tuple[StepResult, Callable[..., Any]]:
        """The stage's step from its halves, keeping the graph for parameters that the stage and later ones share.

        Autograd adds the partial gradients of every use in one chain, last use first. A stage with several uses can
        only continue that chain once the later stages' sum is known, so for these parameters its pull-back is repeated.
        """
        outputs, leaves, _entries = self.functions[stage.index].forward(values)
        sent = {n: o.detach() if isinstance(o, torch.Tensor) else o for n, o in outputs.items()}
        predictions = {n: source((sent[n],), context) for n, source in self.sources.items() if n in sent}
        roots = [outputs[n] for n in predictions]
        gradients: list[torch.Tensor | None] = [p.gradients[0] for p in predictions.values()]
        pull_back(roots, gradients, retain_graph=True)

        def again(parameter: nn.Parameter, later: torch.Tensor | None) -> torch.Tensor | None:
            parameter.grad = None
            pull_back([*roots, parameter], [*gradients, later], retain_graph=True, inputs=[parameter])
            total, parameter.grad = parameter.grad, None
            return total

        return StepResult(sent, {n: leaf.gradient() for n, leaf in leaves.items()}, predictions), again

    def exactly(self, values: dict[str, Any], target: Any) -> None:
        """All stages forward, then all backward with the true gradients: equal to backpropagation bit for bit."""
        tapes = []
        for stage in self.stages:
            outputs, leaves, entries = self.functions[stage.index].forward(values)
            tapes.append((outputs, leaves, entries))
            values.update(
                {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in outputs.items() if n != "output"}
            )
        output = outputs["output"]
        loss = evaluate(self.loss_function, output, target)
        tapes[-1][0]["loss"] = loss
        self.gradients["loss"] = torch.ones_like(loss)
        for stage in reversed(self.stages):
            outputs, leaves, entries = tapes.pop()
            partials: dict[str, Any] = dict(self.gradients)
            for name, parameter in self.split.shared_in(stage.index).items():
                partials[name], parameter.grad = parameter.grad, None
            found = self.functions[stage.index].backward(outputs, leaves, entries, self.gradients, partials)
            self.gradients.update(found)
        del self.gradients["loss"]
        self.loss, self.output = loss.detach(), detached(output)
        self.sent = {i.name: values[i.name] for i in self.split.interfaces}

    def targets(self) -> dict[str, torch.Tensor]:
        """What each source is regressed to; zero where nothing came back."""
        return {n: g if (g := self.gradients.get(n)) is not None else torch.zeros_like(v) for n, v in self.sent.items()}

    def fit_sources(self) -> dict[str, torch.Tensor]:
        """Regress the sources; the losses by interface name."""
        losses = regress(self.sources, self.predictions, self.targets()) if self.predictions else {}
        if losses:
            torch.autograd.backward(list(losses.values()))
        return {name: loss.detach() for name, loss in losses.items()}

    def compare(self, step: int) -> dict[str, InterfaceReport]:
        """How near each prediction is to its target."""
        last = len(self.stages) - 1
        references = {i.name: "true" if set(i.consumers) == {last} else "bootstrapped" for i in self.split.interfaces}
        targets = self.targets()
        return {n: compare(p.gradients[0], targets[n], references[n], step) for n, p in self.predictions.items()}

    def places(self) -> list[tuple[str, torch.Tensor]]:
        """What must be finite besides values, with its name; the first in program order comes first."""
        places: list[tuple[str, torch.Tensor]] = []
        for name in self.sent:
            if name in self.predictions:
                places.append((f"the predicted gradient of interface {name!r}", self.predictions[name].gradients[0]))
        places.append(("the loss", self.loss))
        for name, gradient in reversed(list(self.gradients.items())):
            if gradient is not None:
                places.append((f"the gradient of interface {name!r}", gradient))
        return places


class AllOrNothing:
    """Sets gradients aside for a step, and puts back everything if the step fails."""

    def __init__(self, decoupled: Decoupled) -> None:
        self.parameters = [*decoupled._variant.parameters, *decoupled.synthesizers.parameters()]
        self.tables = [m._buffers for m in decoupled.modules() if m._buffers]
        self.modules = [m for m in decoupled.synthesizers.modules() if not type(m).__module__.startswith("torch.nn.")]
        self.keep = False
        self.held: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.buffers: list[torch.Tensor] = []
        self.contents: list[torch.Tensor] = []

    def step(self, keep_gradients: bool) -> AllOrNothing:
        """For one step; with ``keep_gradients``, those of earlier steps are held to be added later."""
        self.keep = keep_gradients
        return self

    def __enter__(self) -> AllOrNothing:
        self.gradients = [p.grad if self.keep else None for p in self.parameters]
        self._keep_buffers()
        self.rng = preserved_rng()
        self.sources = [(m, dict(vars(m))) for m in self.modules]
        for parameter in self.parameters:
            parameter.grad = None
        if self.keep:
            pairs = zip(self.parameters, self.gradients, strict=True)
            self.held = [(p, g.clone()) for p, g in pairs if g is not None]
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.held = []
        if kind is None:
            return
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for table, names in zip(self.tables, self.names, strict=True):
                table.update(names)
            for buffer, content in zip(self.buffers, self.contents, strict=True):
                buffer.copy_(content)
        for module, attributes in self.sources:
            vars(module).update(attributes)
        self.rng()

    def _keep_buffers(self) -> None:
        """Copy the buffers' contents, into the same memory in every step."""
        self.names = [dict(table) for table in self.tables]
        buffers = [b for names in self.names for b in names.values() if b is not None]
        known = zip(buffers, self.buffers, self.contents, strict=False)
        if len(buffers) != len(self.buffers) or not all(a is b and a.shape == c.shape for a, b, c in known):
            self.contents = [b.detach().clone() for b in buffers]
            self.buffers = buffers
        elif buffers:
            torch._foreach_copy_(self.contents, [b.detach() for b in buffers])


def _add(part: torch.Tensor, later: torch.Tensor | None) -> torch.Tensor:
    return part if later is None else later + part
