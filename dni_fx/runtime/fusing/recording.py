"""The kernel's step as a graph: run once under a recorder, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...graphs.nested import Structure, flatten
from ...passes.trace.operators import record_operators
from ..batch_state import Setting
from ..in_turn import Batch


@dataclass(frozen=True)
class Inputs:
    """What one step takes besides parameters and buffers: the batch.

    Attributes:
        names: of the model's inputs, as many of the leaves.
        structure: of the target, and of what sources see of it.
        leaves: the tensors of all.
    """

    names: tuple[str, ...]
    structure: Structure
    leaves: tuple[Tensor, ...]

    @classmethod
    def of(cls, values: dict[str, Any], context: Tensor | None, target: Any) -> Inputs:
        """Take a batch apart."""
        leaves, structure = flatten((context, target))
        return cls(tuple(values), structure, (*values.values(), *leaves))

    def build(self, leaves: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor | None, Any]:
        """Put it together again, of other tensors."""
        count = len(self.names)
        context, target = self.structure.build(iter(leaves[count:]))
        return dict(zip(self.names, leaves[:count], strict=True)), context, target


@dataclass(frozen=True)
class Recorded:
    """One step, without updates.

    Attributes:
        graph: of parameters, buffers and the batch's leaves, all in one row, to the loss, the
            output's leaves, the losses of the sources, and the gradients; buffers are written in
            place.
        parameters: those that have a gradient, in the order of the gradients.
        written: indices of the buffers that are written.
        output: how the model's output is built.
        regressions: how many sources have a loss.
    """

    graph: GraphModule
    parameters: tuple[nn.Parameter, ...]
    written: tuple[int, ...]
    output: Structure
    outputs: int
    regressions: int


def record(
    setting: Setting, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], batch: Inputs
) -> Recorded:
    """Run one step and write down its operators. Buffers, random states and ``.grad`` are changed
    as in any step: the caller puts them back.

    Raises:
        RuntimeError: the step reads a number back from a tensor, or does something else that no
            graph of plain operators can hold.
    """
    count, more = len(parameters), len(buffers)
    found: list[Any] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        values, context, target = batch.build(tensors[count + more :])
        for parameter in parameters:
            parameter.grad = None
        made = Batch(setting)
        made.begin(values, context, target)
        losses = [loss for _, loss in made.learn()]
        if losses:
            torch.autograd.backward(losses)
        leaves, structure = flatten(made.state.output)
        known = [p for p in parameters if p.grad is not None]
        found.extend((known, structure, len(leaves), len(losses)))
        assert made.state.loss is not None
        rest = [loss.detach() for loss in losses]
        return [made.state.loss, *leaves, *rest, *(p.grad for p in known if p.grad is not None)]

    before = [(b._version, b.clone()) for b in buffers]
    graph = record_operators(run, [*parameters, *buffers, *batch.leaves])
    known, output, outputs, regressions = found
    # Some operators do not declare what they write.
    now = [b._version == v and torch.equal(b, c) for b, (v, c) in zip(buffers, before, strict=True)]
    written = [k for k, same in enumerate(now) if not same]
    return Recorded(graph, tuple(known), tuple(written), output, outputs, regressions)
