"""What a source at each value would cost: the price of a cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import DecouplingError
from ...plan import TensorSpec
from ...sources import (
    EXACT,
    GradientSource,
    Prediction,
    SourceFactory,
    for_consumers,
    make_source,
)
from ..cut.cutting import Flow
from ..trace.settings import drawing_devices
from ..trace.values import storage_key
from .costing import ADAM_NANOSECONDS, COPIES, Cost
from .probes import Counted, timed

UNSERVED = 1 << 50
"""The cost of a source that cannot be made: more than any stage's."""

_SAMPLES = 6  # sources of one kind that are timed; the others follow by their operations
_LARGEST_SAMPLE = 1e9  # floating-point operations of one prediction

Option = str | SourceFactory
OptionOf = Callable[[fx.Node], Option]
Kind = tuple[Option, TensorSpec]  # what a source is made from


def measure_sources(
    flow: Flow,
    option_of: OptionOf,
    context: TensorSpec | None,
    only: Collection[str] | None = None,
) -> dict[str, Cost]:
    """Time and memory of the source that each value would get: one prediction, one regression, one
    update.

    A few sources of each kind are timed; the others are taken to run at the rate of the nearest
    one. Random states are left as they were. ``only`` names the values, if not all.
    """
    device = next(flow.trace.model.parameters()).device
    kinds = _kinds(flow, option_of, only)
    made = _made(kinds, context)
    groups: dict[Any, list[tuple[int, Kind]]] = {}
    for kind, source in made.items():
        group = groups.setdefault((kind[0], type(source)), [])
        group.append((_operations(source, kind[1]), kind))
    known: dict[Kind, Cost] = {}
    with torch.random.fork_rng(devices=drawing_devices()):
        for group in groups.values():
            samples: dict[Kind, tuple[int, Cost] | None] = {}
            for size, kind in _picked(group):
                samples[kind] = None
                # a source may not take its value, such as an empty one
                with contextlib.suppress(Exception):
                    samples[kind] = (size, _time_source(*kind, context, device))
            taken = [sample for sample in samples.values() if sample is not None]
            for size, kind in group:
                if taken and samples.get(kind, taken) is not None:
                    ratio, (nanoseconds, kept) = _nearest(taken, size)
                    weights = COPIES * sum(p.nbytes for p in made[kind].parameters())
                    known[kind] = (round(nanoseconds * ratio), weights + round(kept * ratio))
    return {name: known.get(kind, (UNSERVED, 0)) for name, kind in kinds.items()}


def estimate_sources(
    flow: Flow,
    option_of: OptionOf,
    context: TensorSpec | None,
    only: Collection[str] | None = None,
) -> dict[str, Cost]:
    """The same by floating-point operations and bytes; see :func:`measure_sources`."""
    kinds = _kinds(flow, option_of, only)
    known: dict[Kind, Cost] = {}
    for kind, source in _made(kinds, context).items():
        learnt, size = sum(p.numel() for p in source.parameters()), kind[1].nbytes
        weights = sum(p.nbytes for p in source.parameters())
        known[kind] = (0, 0)
        if learnt:
            counted = Counted()
            with contextlib.suppress(Exception):  # a source that needs data counts less
                counted = _count(*kind, context)
            counted.flops = max(counted.flops, 3 * _operations(source, kind[1]))
            nanoseconds = counted.nanoseconds(3 * (2 * size + weights))
            nanoseconds += round(ADAM_NANOSECONDS * learnt)
            known[kind] = (nanoseconds, COPIES * weights + 2 * size)
    return {name: known.get(kind, (UNSERVED, 0)) for name, kind in kinds.items()}


def _kinds(flow: Flow, option_of: OptionOf, only: Collection[str] | None) -> dict[str, Kind]:
    """What the source of each value that carries a gradient is made from, by node name."""
    return {
        node.name: (option_of(node), flow.specs[node.name])
        for node in flow.nodes
        if flow.is_computed(node) and flow.carries_gradient(node)
        if only is None or node.name in only
    }


def _made(kinds: Mapping[str, Kind], context: TensorSpec | None) -> dict[Kind, GradientSource]:
    """A source of every kind, where one can be made: a cut elsewhere is refused later, with the
    reason.

    Made on the meta device, where its weights take no memory and no time to initialise.
    """
    found: dict[Kind, GradientSource] = {}
    for kind in dict.fromkeys(kinds.values()):
        with contextlib.suppress(DecouplingError):
            try:
                with torch.device("meta"):
                    found[kind] = _make(*kind, context)
            except DecouplingError:
                raise
            except Exception:  # a source of the user's own that computes something of its weights
                found[kind] = _make(*kind, context)
    return found


def _make(option: Option, spec: TensorSpec, context: TensorSpec | None) -> GradientSource:
    """One with a part for a single consumer; how many there are is not known before a cut."""
    free = option in EXACT  # no search pays for it
    return make_source("zero" if free else for_consumers(option, 1), (spec,), context)


def _operations(source: GradientSource, spec: TensorSpec) -> int:
    """Of one prediction; the value's size for a source of the user's own that cannot run without
    data.
    """
    with contextlib.suppress(Exception):
        return source.flops()
    return spec.nbytes


def _picked(group: list[tuple[int, Kind]]) -> list[tuple[int, Kind]]:
    """Some that are not too large, from the smallest to the largest."""
    group.sort(key=lambda entry: entry[0])
    small = [entry for entry in group if entry[0] <= _LARGEST_SAMPLE] or group[:1]
    places = {round(k * (len(small) - 1) / (_SAMPLES - 1)) for k in range(_SAMPLES)}
    return [small[place] for place in sorted(places)]


def _nearest(taken: list[tuple[int, Cost]], size: int) -> tuple[float, Cost]:
    """The timed source of the most similar size, and how much larger this one is."""
    near, cost = min(taken, key=lambda sample: abs(math.log((sample[0] + 1) / (size + 1))))
    return (size + 1) / (near + 1), cost


def _example_message(
    source: GradientSource, prediction: Prediction, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Something of the shape of what would come back."""
    loss, logits = prediction.loss, prediction.logits
    likely = {
        "gradient": value,
        "loss": value.new_zeros(value.shape[:1]) if loss is None else torch.zeros_like(loss),
        "logits": value if logits is None else torch.zeros_like(logits),
        "error": value,
    }
    return tuple(likely[kind] for kind in source.asks.learns_from)


def _time_source(
    option: Option, spec: TensorSpec, context: TensorSpec | None, device: torch.device
) -> Cost:
    """One prediction, regression and update, the least of three; and what is kept in between."""
    source = _make(option, spec, context).to(device)
    step = _stepping(source, spec, context, device)
    own = {storage_key(p) for p in source.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_key(tensor) not in own:
            kept[storage_key(tensor)] = tensor.nbytes
        return tensor.detach()  # an output itself would hold its node

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return min(timed(step, device)[0] for _ in range(3)), sum(kept.values())


def _count(option: Option, spec: TensorSpec, context: TensorSpec | None) -> Counted:
    """The second of two steps: the first makes the optimiser's state."""
    with FakeTensorMode():
        source = _make(option, spec, context)
        step = _stepping(source, spec, context, torch.device("cpu"))
        step()
        with Counted() as counted:
            step()
    return counted


def _stepping(
    source: GradientSource, spec: TensorSpec, context: TensorSpec | None, device: torch.device
) -> Callable[[], None]:
    """A source's prediction, regression and update, to be called again and again."""
    value = torch.randn(spec.shape, device=device).to(spec.dtype)
    seen = context and torch.zeros(context.shape, dtype=context.dtype, device=device)
    parameters = [p for p in source.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters) if parameters else None

    def step() -> None:
        with torch.enable_grad():
            prediction = source((value,), seen)
            loss = source.fit(prediction, _example_message(source, prediction, value))
            if loss is not None and loss.requires_grad and optimizer is not None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return step
