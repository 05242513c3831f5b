"""What every node of a traced graph costs in time and memory.

Times are whole nanoseconds, so that a search over their sums is exact and the same everywhere. They
are measured on the example batch, estimated from floating-point operations and bytes on tensors
without data, or given by the user. Only their ratios matter to a search.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from ...errors import DecouplingError, did_you_mean
from ...graphs.nested import flatten
from ..cut.cutting import Flow
from ..cut.specs import modules_of, parameters_of
from ..trace.caches import Fakes, fakes
from ..trace.state import restored
from .probes import BYTES_PER_SECOND, Walk, Wanted, estimate, measure, timed

COPIES = 4  # a parameter, its gradient and Adam's two moments
ADAM_NANOSECONDS = 32 / BYTES_PER_SECOND * 1e9  # per float32: bytes read and written

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
        frozen_bytes: of the parameters' bytes those without gradients.
    """

    kind: str
    forward: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]
    parameter_bytes: dict[str, int]
    activation_bytes: dict[str, int]
    sources: Mapping[str, Cost]
    frozen_bytes: Mapping[str, int] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Forward and backward of one node."""
        return (self.forward.get(name, 0) + self.backward.get(name, 0)) / 1e9


def measure_costs(
    flow: Flow,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: Mapping[str, Cost],
    *,
    progress: bool = False,
) -> Costs:
    """Run every node by itself on the example, forward and backward, and keep the least of a few
    times. The model, its buffers and random states are left as they were.
    """
    device = next(flow.trace.model.parameters()).device
    walk = Walk(flow, functools.partial(measure, device=device))
    with restored(flow.trace.model, args, kwargs):
        walk.run(iter(flatten((args, kwargs))[0]), _watched(flow, progress))
    return _costs(
        "measured", flow, sources, _time_adam(device), walk.forward, walk.backward, walk.kept
    )


def estimate_costs(
    flow: Flow,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: Mapping[str, Cost],
    *,
    progress: bool = False,
    wanted: Wanted | None = None,
) -> Costs:
    """The roofline: the longer of operations over a rate and bytes over another; nothing is run on
    data. Equal in every process and on every machine. Nodes that are not ``wanted`` cost nothing.
    """
    with fakes() as fake:
        found = _walked(flow, fake, args, kwargs, progress, wanted)
    return _costs("analytic", flow, sources, ADAM_NANOSECONDS, *found)


def _walked(
    flow: Flow,
    fake: Fakes,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    progress: bool,
    wanted: Wanted | None,
) -> tuple[Any, Any, Any]:
    """Forward, backward and what is kept, by node; no fake tensor outlives it."""
    walk = Walk(flow, estimate, has_data=False, wanted=wanted)
    with restored(flow.trace.model, args, kwargs), fake:
        walk.run(map(fake.from_tensor, flatten((args, kwargs))[0]), _watched(flow, progress))
    return walk.forward, walk.backward, walk.kept


def _watched(flow: Flow, progress: bool) -> Iterable[fx.Node]:
    return tqdm(flow.nodes, desc="weighing", leave=False, disable=not progress)


def given_costs(flow: Flow, seconds: Mapping[str, Seconds], sources: Mapping[str, Cost]) -> Costs:
    """Costs that the user knows.

    Args:
        flow: facts of a traced model.
        seconds: by node name or module path: seconds of forward and backward together (a third is
            taken for forward), or a pair. A module's are spread evenly over its nodes; nodes that
            are not named cost nothing. Memory is what parameters and values take.
        sources: costs of the sources, estimated.

    Raises:
        DecouplingError: a name that the graph does not have, or a number that is negative or not
            finite.
    """
    members: dict[str, list[fx.Node]] = {}
    computed = [n for n in flow.nodes if flow.is_computed(n)]
    for node in computed:
        for name in dict.fromkeys((node.name, *flow.names[node], *modules_of(node))):
            members.setdefault(name, []).append(node)
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
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
        for times, taken in zip((forward, backward), pair, strict=True):
            share = round(taken * 1e9 / len(members[name]))
            for node in members[name]:
                times[node.name] = times.get(node.name, 0) + share
    kept = {n.name: flow.specs[n.name].nbytes for n in computed if n.name in flow.specs}
    return _costs("given", flow, sources, 0.0, forward, backward, kept)


def _costs(
    kind: str,
    flow: Flow,
    sources: Mapping[str, Cost],
    element: float,
    forward: dict[str, int],
    backward: dict[str, int],
    kept: dict[str, int],
) -> Costs:
    update: dict[str, int] = {}
    memory: dict[str, int] = {}
    frozen: dict[str, int] = {}
    left = dict(flow.trace.model.named_parameters())  # not used so far
    for node in filter(flow.is_computed, flow.nodes):
        used = [left.pop(name) for name in parameters_of(node) if name in left]
        update[node.name] = round(element * sum(p.numel() for p in used if p.requires_grad))
        memory[node.name] = sum(p.nbytes * (COPIES if p.requires_grad else 1) for p in used)
        frozen[node.name] = sum(p.nbytes for p in used if not p.requires_grad)
    return Costs(kind, forward, backward, update, memory, kept, sources, frozen)


def _time_adam(device: torch.device) -> float:
    """Nanoseconds that Adam takes for one element, told by a quarter of a million."""
    parameter = nn.Parameter(torch.zeros(1 << 18, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    return min(timed(optimizer.step, device)[0] for _ in range(3)) / parameter.numel()
