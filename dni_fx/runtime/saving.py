"""What is put back: after a step that failed, and from what was saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.state import preserved_rng, rng_state, set_rng_state
from .optimizing import StageOptimizers, find_misfit

PARTS = ("decoupled", "optimizers", "synthesizer_optimizers", "gradients", "steps", "rng")


class AllOrNothing:
    """Sets gradients aside for a step, and puts back everything if the step fails.

    Attributes:
        variant: the graph whose parameters a step may write to.
        parameters: these, and the sources'.
        put_back: puts everything back to where it was before the last step, but for what optimisers
            have changed.
    """

    put_back: Callable[[], None]

    def __init__(self, decoupled: Decoupled) -> None:
        synthesizers, self.variant = decoupled.synthesizers, decoupled.graphs.variant
        self.parameters = [*self.variant.parameters, *synthesizers.parameters()]
        self._tables = [m._buffers for m in decoupled.modules() if m._buffers]
        every = synthesizers.modules()
        self._modules = [m for m in every if not type(m).__module__.startswith("torch.nn.")]
        buffers = [b for table in self._tables for b in table.values() if b is not None]
        self._changes = self.variant.trace.changes.without(buffers)
        self._buffers: list[Tensor] = []
        self._contents: list[Tensor] = []

    @contextlib.contextmanager
    def step(self, keep: bool) -> Iterator[Callable[[], None]]:
        """For one step. With ``keep`` the gradients of earlier steps of the same update are held;
        the result adds these to the step's own, as autograd would.
        """
        gradients = [p.grad if keep else None for p in self.parameters]
        pairs = list(zip(self.parameters, gradients, strict=True))
        tables = self._keep_buffers()
        put_back_rng, put_back_changes = preserved_rng(), self._changes.keep()
        sources = [dict(vars(m)) for m in self._modules]
        held = [(p, g.clone()) for p, g in pairs if g is not None]
        for parameter in self.parameters:
            parameter.grad = None

        def add_held() -> None:
            for parameter, gradient in held:
                own = parameter.grad
                parameter.grad = gradient if own is None else gradient.add_(own)

        def put_back() -> None:
            put_back_changes()
            for parameter, gradient in pairs:
                parameter.grad = gradient
            self._put_back_buffers(tables)
            for module, attributes in zip(self._modules, sources, strict=True):
                for name in vars(module).keys() - attributes.keys():  # born in the step
                    del vars(module)[name]
                vars(module).update(attributes)
            put_back_rng()

        self.put_back = put_back
        try:
            yield add_held
        except BaseException:
            put_back()
            raise

    def _keep_buffers(self) -> list[dict[str, Tensor | None]]:
        """Copy the buffers' contents, into the same memory in every step; also what tables hold."""
        tables = [dict(table) for table in self._tables]
        buffers = [b for table in tables for b in table.values() if b is not None]
        known = zip(buffers, self._buffers, self._contents, strict=False)
        same = all(a is b and a.shape == c.shape for a, b, c in known)
        if len(buffers) != len(self._buffers) or not same:
            self._contents = [b.detach().clone() for b in buffers]
            self._buffers = buffers
        elif buffers:
            torch._foreach_copy_(self._contents, [b.detach() for b in buffers])
        return tables

    @torch.no_grad()
    def _put_back_buffers(self, tables: list[dict[str, Tensor | None]]) -> None:
        for table, names in zip(self._tables, tables, strict=True):
            table.update(names)
        for buffer, content in zip(self._buffers, self._contents, strict=True):
            if not torch.equal(buffer, content):  # else graphs that hold it must find it untouched
                buffer.copy_(content)


def trained_state(
    decoupled: Decoupled, optimizers: StageOptimizers, steps: int, accumulate: int
) -> dict[str, Any]:
    """Model, sources, optimisers, unfinished gradients, random states and the number of steps."""
    named = decoupled.named_parameters()
    gradients = {n: p.grad for n, p in named if p.grad is not None and steps % accumulate}
    return {
        "decoupled": decoupled.state_dict(),
        **optimizers.state_dict(),
        "gradients": gradients,
        "steps": steps,
        "rng": rng_state(),
    }


def load_trained(
    state: dict[str, Any],
    decoupled: Decoupled,
    optimizers: StageOptimizers,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Put back what :func:`trained_state` returned; the caller takes the number of steps.

    Args:
        state, decoupled, optimizers: it, the model, and what trains that.
        begin: called once the state is known to fit, before anything is loaded.

    Raises:
        DecouplingError: the state belongs to other stages or sources; nothing is changed then.
    """
    stages = decoupled.stages
    if not isinstance(state, dict) or any(part not in state for part in PARTS):
        raise DecouplingError(
            f"a trainer's state is a dict with {', '.join(PARTS)}, as state_dict() returns it"
        )
    if not optimizers.stages:
        optimizers.prepare(decoupled.graphs, stages)
    adopts = optimizers.check_state(state, stages)
    if misfit := find_misfit(decoupled.state_dict(), state["decoupled"]):
        raise DecouplingError(
            f"this state does not fit: {misfit}; decouple with the plan and sources that the state "
            "was saved with"
        )
    begin()
    if adopts:
        optimizers.adopt(stages)
    decoupled.load_state_dict(state["decoupled"])
    optimizers.load_state_dict(state)
    for name, parameter in decoupled.named_parameters():
        gradient = state["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.clone()
    set_rng_state(state["rng"])
