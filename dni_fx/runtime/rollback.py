"""The promise that a failed step changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..passes.trace.state import preserved_rng


class AllOrNothing:
    """Sets gradients aside for a step, and puts back everything if the step fails."""

    def __init__(self, decoupled: Decoupled) -> None:
        self.parameters = [
            *decoupled.graphs.variant.parameters,
            *decoupled.synthesizers.parameters(),
        ]
        self.tables = [m._buffers for m in decoupled.modules() if m._buffers]
        self.modules = [
            m
            for m in decoupled.synthesizers.modules()
            if not type(m).__module__.startswith("torch.nn.")
        ]
        self.keep = False
        self.gradients: list[torch.Tensor | None] = []
        self.sources: list[tuple[nn.Module, dict[str, Any]]] = []
        self.names: list[dict[str, torch.Tensor | None]] = []
        buffers = [b for table in self.tables for b in table.values() if b is not None]
        self.changes = decoupled.graphs.variant.trace.changes.without(buffers)
        self.rng: Callable[[], None] = lambda: None
        self.changed: Callable[[], None] = lambda: None
        self.held: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.buffers: list[torch.Tensor] = []
        self.contents: list[torch.Tensor] = []

    def step(self, keep_gradients: bool) -> AllOrNothing:
        """For one step; with ``keep_gradients``, those of earlier ones are held for later."""
        self.keep = keep_gradients
        return self

    def __enter__(self) -> AllOrNothing:
        self.gradients = [p.grad if self.keep else None for p in self.parameters]
        self._keep_buffers()
        self.rng, self.changed = preserved_rng(), self.changes.keep()
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
            self.gradients, self.sources = [], []
            return
        self.changed()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for table, names in zip(self.tables, self.names, strict=True):
                table.update(names)
            for buffer, content in zip(self.buffers, self.contents, strict=True):
                if not torch.equal(
                    buffer, content
                ):  # else graphs that hold it must find it untouched
                    buffer.copy_(content)
        for module, attributes in self.sources:
            for name in vars(module).keys() - attributes.keys():  # born in the step
                del vars(module)[name]
            vars(module).update(attributes)
        self.rng()

    def add_held(self) -> None:
        """Add the earlier steps' part of the same update, as autograd would."""
        for parameter, held in self.held:
            grad = parameter.grad
            parameter.grad = held if grad is None else held.add_(grad)

    def _keep_buffers(self) -> None:
        """Copy the buffers' contents, into the same memory in every step."""
        self.names = [dict(table) for table in self.tables]
        buffers = [b for names in self.names for b in names.values() if b is not None]
        known = zip(buffers, self.buffers, self.contents, strict=False)
        if len(buffers) != len(self.buffers) or not all(
            a is b and a.shape == c.shape for a, b, c in known
        ):
            self.contents = [b.detach().clone() for b in buffers]
            self.buffers = buffers
        elif buffers:
            torch._foreach_copy_(self.contents, [b.detach() for b in buffers])
