"""A whole step as one compiled call: the recorded kernel, the finite check and the updates.

Nothing is written unless everything is finite: weights, states and buffers take their new values
by a choice within the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.trace.operators import named_inputs, record_operators
from ...passes.trace.settings import kept_settings
from ..joint import is_plain
from ..optimizing import StageOptimizers
from ..whole import held_signals
from .recording import Inputs, Recorded
from .updates import Update, settings_of

_HALF = (torch.float16, torch.bfloat16)


class Program:
    """One step for batches of one kind.

    Args:
        recorded: the step without updates.
        updates: of its parameters.
        optimizing: all optimisers that there are, and what bounds gradients.
        parameters, buffers: all tensors of the model and the sources, as they were recorded.
        names: of these, for the printed program.
        batch: a batch of the kind.
        options: of TorchInductor, which compiles it.

    Attributes:
        graph: the program.
    """

    def __init__(
        self,
        recorded: Recorded,
        updates: Sequence[Update],
        optimizing: StageOptimizers,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[Tensor],
        names: Sequence[str],
        batch: Inputs,
        options: dict[str, Any],
    ) -> None:
        self._recorded, self._updates = recorded, list(updates)
        self._parameters, self._buffers = list(parameters), list(buffers)
        self._optimizing, self._clips = optimizing, optimizing.clip_norm is not None
        self._settings = {o: settings_of(o) for o in optimizing.every()}
        self._trained = [p.requires_grad for p in parameters]
        self._groups = list(dict.fromkeys((u.optimizer, u.group) for u in updates))
        self._states = [s for u in updates for s in u.states]
        self._fine = torch.ones((), dtype=torch.bool, device=self._parameters[0].device)
        tensors = self._tensors(batch.leaves, self._fine)
        whole = record_operators(self._run, tensors, fake=True)
        self.graph = named_inputs(whole, self._labels(names, batch))
        from torch import _inductor as inductor  # here: it takes as long as all of torch

        put_back = kept_settings()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code
                # Not torch.compile: guards of ours hold for the call, and its own cost as much as
                # a small step.
                self._call: Callable[..., Any] = inductor.compile(self.graph, [*tensors], options)
        finally:
            put_back()

    def holds(self) -> bool:
        """Whether optimisers would still do what the program does, to what is trained as then."""
        known = self._settings
        return (
            [*known] == self._optimizing.every()
            and self._clips == (self._optimizing.clip_norm is not None)
            and all(is_plain(o) and settings_of(o) == then for o, then in known.items())
            and all(update.holds() for update in self._updates)
            and [p.requires_grad for p in self._parameters] == self._trained
            and not any(map(is_watched, self._parameters))
        )

    def __call__(self, batch: Inputs, before: Tensor | None = None) -> tuple[Tensor, Any, Tensor]:
        """Make the step.

        Args:
            batch: of the kind that the program is for.
            before: a bool without dimensions, whether the step is to be made at all.

        Returns:
            The loss, and the model's output, detached; and whether the step was made. Where
            something is not finite nothing was changed.
        """
        tensors = self._tensors(batch.leaves, self._fine if before is None else before)
        with torch.no_grad(), held_signals():
            finite, loss, *leaves = self._call(*tensors)
        for parameter in self._parameters:
            parameter.grad = None
        for optimizer in self._settings:
            if "step" in vars(optimizer):  # a scheduler asks whether it was called
                optimizer._opt_called = True  # type: ignore[attr-defined]
        return loss, self._recorded.output.build(iter(leaves)), finite

    def _tensors(self, leaves: Sequence[Tensor], before: Tensor) -> list[Tensor]:
        rates = [
            torch.tensor(float(o.param_groups[k]["lr"]), dtype=torch.float64)
            for o, k in self._groups
        ]
        if self._clips:  # an input, as rates are
            rates.append(torch.tensor(self._optimizing.clip_norm, dtype=torch.float64))
        owned = [p.detach() for p in self._parameters]
        return [*owned, *self._buffers, *self._states, *rates, before, *leaves]

    def _run(self, *tensors: Tensor) -> list[Tensor]:
        """The program: what is recorded as the graph."""
        recorded, place = self._recorded, 0

        def take(count: int) -> list[Tensor]:
            nonlocal place
            place += count
            return list(tensors[place - count : place])

        weights, buffers = take(len(self._parameters)), take(len(self._buffers))
        states, rates = take(len(self._states)), take(len(self._groups))
        norms = take(int(self._clips))
        (before,) = take(1)
        own = list(buffers)
        for k in recorded.written:
            own[k] = buffers[k].clone()
        found = recorded.graph(*weights, *own, *tensors[place:])
        outputs, regressions = recorded.outputs, recorded.regressions
        losses = [found[0], *found[1 + outputs : 1 + outputs + regressions]]
        gradients = list(found[1 + outputs + regressions :])
        finite = before & _all_finite([*losses, *gradients])
        given = dict(zip(recorded.parameters, gradients, strict=True))
        for norm in norms:
            given = self._clipped(given, norm)
        changes = self._updated(weights, given, states, rates)
        changes += [(buffers[k], own[k]) for k in recorded.written]
        for old, new in changes:
            old.copy_(torch.where(finite, new, old))
        return [finite, *found[: 1 + outputs]]

    def _clipped(
        self, given: Mapping[nn.Parameter, Tensor], norm: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        """Gradients, those of each stage bounded as ``torch.nn.utils.clip_grad_norm_`` does it."""
        found = dict(given)
        for stage in self._optimizing.stages:
            mine = [p for p in self._optimizing.parameters_of(stage) if p in given]
            if mine:
                sizes = [torch.linalg.vector_norm(given[p]) for p in mine]
                total = torch.linalg.vector_norm(torch.stack(sizes))
                # A number over a tensor is this product in torch: the same last bit.
                factor = ((total + 1e-6).reciprocal() * norm.to(total.dtype)).clamp(max=1)
                found |= {p: given[p] * factor.to(given[p].dtype) for p in mine}
        return found

    def _updated(
        self,
        weights: Sequence[Tensor],
        given: Mapping[nn.Parameter, Tensor],
        states: Sequence[Tensor],
        rates: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Old and new values of all weights and states."""
        index = {p: k for k, p in enumerate(self._parameters)}
        found: list[tuple[Tensor, Tensor]] = []
        place = 0
        for update in self._updates:
            mine = tuple(states[place : place + len(update.states)])
            place += len(mine)
            weight = weights[index[update.parameter]]
            rate = rates[self._groups.index((update.optimizer, update.group))]
            new, later = update(weight, given[update.parameter], mine, rate)
            found += [(weight, new), *zip(mine, later, strict=True)]
        return found

    def _labels(self, names: Sequence[str], batch: Inputs) -> list[str]:
        label = dict(zip(map(id, self._parameters), names, strict=False))
        states = [
            f"{label[id(u.parameter)]}_state{k}"
            for u in self._updates
            for k in range(len(u.states))
        ]
        rates = [f"rate{k}" for k in range(len(self._groups))] + ["clip_norm"] * self._clips
        rest = [f"given{k}" for k in range(len(batch.leaves) - len(batch.names))]
        return [*names, *states, *rates, "before", *batch.names, *rest]


def is_watched(parameter: nn.Parameter) -> bool:
    """Whether somebody's hooks hear of its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """As ``runtime.finite.all_finite``, as a tensor: sums are not finite where an element is not,
    or where they overflow.
    """
    wide = [t.float() if t.dtype in _HALF else t for t in tensors]
    return torch.stack([t.sum().double().isfinite() for t in wide]).all()
