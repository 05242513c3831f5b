"""What every node of a traced graph costs in time and memory, and what a source at its value would
cost.

Times are whole nanoseconds, so that a search over their sums is exact and the same everywhere. They
are measured on the example batch, estimated from floating-point operations and bytes on tensors
without data, or given by the user. Only their ratios matter to a search.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...errors import DecouplingError, did_you_mean
from ...graphs.nested import map_tensors
from ..cut.cutting import Flow
from ..trace.caches import Fakes, forget
from ..trace.state import restored
from .probes import BYTES_PER_SECOND, Clock, Counter, Probe, elapsed, walk

COPIES = 4  # a parameter, its gradient and Adam's two moments
_ADAM_BYTES = 32  # read and written per float32 element

Seconds = float | tuple[float, float]
Cost = tuple[int, int]  # nanoseconds and bytes


@dataclass(frozen=True)
class Costs:
    """Costs by node name, in nanoseconds and bytes for the example batch.

    Attributes:
        kind: ``"measured"``, ``"analytic"`` or ``"given"``.
        forward: time of the forward.
        backward: time of the backward, gradients of parameters included.
        update: time of the optimiser for the parameters that are first used here.
        parameter_bytes: those parameters with gradients and Adam's moments.
        activation_bytes: what is kept for the backward: the value, where it or a user keeps it, and
            what is made inside.
        sources: time and memory of the source that would serve the value, one prediction and one
            regression.
    """

    kind: str
    forward: Mapping[str, int]
    backward: Mapping[str, int]
    update: Mapping[str, int]
    parameter_bytes: Mapping[str, int]
    activation_bytes: Mapping[str, int]
    sources: Mapping[str, Cost]

    def seconds(self, name: str) -> float:
        """Forward and backward of one node."""
        return (self.forward.get(name, 0) + self.backward.get(name, 0)) / 1e9


def measure_costs(
    flow: Flow,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: Mapping[str, Cost],
    *,
    repeats: int = 3,
    watch: Callable[[Iterable[fx.Node]], Iterable[fx.Node]] = iter,
) -> Costs:
    """Run every node by itself, forward and backward, and keep the least of a few times.

    Args:
        flow: facts of a traced model.
        args: example positional inputs.
        kwargs: example keyword inputs.
        sources: what :func:`dni_fx.passes.search.source_costs.measure_sources` found.
        repeats: how often each node runs; once where it takes long.
        watch: wraps the nodes, for a progress bar.

    Returns:
        Measured costs. The model, its buffers and random states are as they were.
    """
    clock = Clock(repeats, flow.trace.model)
    with restored(flow.trace.model, args, kwargs):
        walk(flow, args, kwargs, clock, watch)
    element = _time_adam(next(flow.trace.model.parameters()))
    return _costs("measured", flow, clock, sources, element)


def estimate_costs(
    flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], sources: Mapping[str, Cost]
) -> Costs:
    """The roofline: the longer of operations over a rate and bytes over another; nothing is run on
    data.

    Args:
        flow: facts of a traced model.
        args: example positional inputs.
        kwargs: example keyword inputs.
        sources: what :func:`dni_fx.passes.search.source_costs.estimate_sources` found.

    Returns:
        Analytic costs, equal in every process and on every machine.
    """
    fake, counter = Fakes(), Counter()
    with restored(flow.trace.model, args, kwargs), fake:
        faked = functools.partial(map_tensors, fake.from_tensor)
        walk(flow, faked(args), faked(kwargs), counter, iter)
    forget(fake)
    return _costs("analytic", flow, counter, sources, _ADAM_BYTES / BYTES_PER_SECOND * 1e9)


def given_costs(flow: Flow, seconds: Mapping[str, Seconds], sources: Mapping[str, Cost]) -> Costs:
    """Costs that the user knows.

    Args:
        flow: facts of a traced model.
        seconds: by node name or module path: seconds of forward and backward together (a third is
            taken for forward), or a pair. A module's are spread evenly over its nodes; nodes that
            are not named cost nothing.
        sources: what :func:`dni_fx.passes.search.source_costs.estimate_sources` found.

    Returns:
        The costs; memory is what parameters and values take.

    Raises:
        DecouplingError: a name that the graph does not have, or a number that is negative or not
            finite.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in flow.nodes:
        if flow.is_computed(node):
            own = [str(node.target)] if node.op == "call_module" else []
            names = (node.name, *flow.names[node], *node.meta.get("modules", ()), *own)
            for name in dict.fromkeys(names):
                members.setdefault(name, []).append(node)
    found = Probe()
    for name, value in seconds.items():
        if name not in members:
            raise DecouplingError(
                f"costs= names {name!r}, which is no node or module{did_you_mean(name, members)}"
            )
        pair = value if isinstance(value, tuple) else (value / 3, value * 2 / 3)
        if not all(isinstance(s, int | float) and 0 <= s < float("inf") for s in pair):
            raise DecouplingError(
                f"costs={{{name!r}: {value!r}}}: expected seconds, or a pair of them, not negative"
            )
        for times, taken in zip((found.forward, found.backward), pair, strict=True):
            share = round(taken * 1e9 / len(members[name]))
            for node in members[name]:
                times[node.name] = times.get(node.name, 0) + share
    for node in flow.nodes:
        if flow.is_computed(node) and node.name in flow.specs:
            found.kept[node.name] = flow.specs[node.name].nbytes
    return _costs("given", flow, found, sources, 0.0)


def _costs(
    kind: str, flow: Flow, probe: Probe, sources: Mapping[str, Cost], element: float
) -> Costs:
    update: dict[str, int] = {}
    memory: dict[str, int] = {}
    activations: dict[str, int] = {}
    left = dict(flow.trace.model.named_parameters())  # not used so far
    for node in filter(flow.is_computed, flow.nodes):
        fetched = [i for i in node.all_input_nodes if i.op == "get_attr"]
        direct = {name for i in fetched for name in i.meta["parameters"]}
        names = dict.fromkeys((*node.meta.get("parameters", ()), *sorted(direct)))
        used = [left.pop(name) for name in names if name in left]
        trained = [p for p in used if p.requires_grad]
        update[node.name] = round(element * sum(p.numel() for p in trained))
        memory[node.name] = sum(p.nbytes * (COPIES if p.requires_grad else 1) for p in used)
        activations[node.name] = probe.kept.get(node.name, 0)
        if node.name in probe.keeps_value and node.name in flow.specs:
            activations[node.name] += flow.specs[node.name].nbytes
    return Costs(kind, probe.forward, probe.backward, update, memory, activations, sources)


def _time_adam(like: torch.Tensor) -> float:
    """Nanoseconds that Adam takes for one element, told by a quarter of a million."""
    parameter = nn.Parameter(torch.zeros(1 << 18, device=like.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    return min(elapsed(optimizer.step, like.device) for _ in range(3)) / parameter.numel()
