"""What is kept of a batch while its gradients are under way, and the promise that a failed step
changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..passes.trace.state import preserved_rng


@dataclass
class Tape:
    """One stage's forward on one batch, with its autograd graph."""

    outputs: dict[str, Any]
    leaves: dict[str, Any]
    entries: dict[str, Any]


@dataclass
class Rerun:
    """What a stage's forward needs to be run again: its inputs, and the state of everything that it
    depends on.
    """

    values: dict[str, Any]
    rng: Callable[[], None]
    modes: list[tuple[nn.Module, bool]]
    casts: list[torch.autocast]

    @classmethod
    def of(cls, module: nn.Module, values: dict[str, Any]) -> Rerun:
        """Before the forward."""
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        casts = [
            torch.autocast(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d))
            for d in devices
        ]
        return cls(values, preserved_rng(), [(m, m.training) for m in module.modules()], casts)

    @contextlib.contextmanager
    def as_then(self, module: nn.Module) -> Iterator[None]:
        """In the modes and casts of then, with its random numbers; generators and buffers stay as
        they are now.

        Buffers are exchanged, not written to: other graphs may hold them.
        """
        tables = [m._buffers for m in module.modules() if m._buffers]
        buffers = [dict(table) for table in tables]
        copies = {
            id(b): b.detach().clone() for table in tables for b in table.values() if b is not None
        }
        for table in tables:
            table.update({n: copies[id(b)] for n, b in table.items() if b is not None})
        now, modes = preserved_rng(), [(m, m.training) for m, _ in self.modes]
        self.rng()
        for m, training in self.modes:
            m.training = training
        try:
            with contextlib.ExitStack() as stack:
                for cast in self.casts:
                    stack.enter_context(cast)
                yield
        finally:
            now()
            for m, training in modes:
                m.training = training
            for table, content in zip(tables, buffers, strict=True):
                table.update(content)


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
            self.gradients, self.sources = [], []
            return
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
            vars(module).update(attributes)
        self.rng()

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
