"""What a source at each value would cost: the price of a cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ...errors import DecouplingError
from ...plan import TensorSpec
from ...sources import GradientSource, Prediction, SourceFactory, make_source
from ..cut.cutting import Flow
from ..trace.values import storage_key
from .costing import COPIES, Cost
from .probes import BYTES_PER_SECOND, FLOPS_PER_SECOND, elapsed

UNSERVED = 1 << 50
"""The cost of a source that cannot be made: more than any stage's."""

_SAMPLES = 6  # sources of one kind that are timed; the others follow by their operations
_LARGEST_SAMPLE = 1e9  # floating-point operations of one prediction

OptionOf = Callable[[fx.Node], str | SourceFactory]


def measure_sources(flow: Flow, option_of: OptionOf, context: TensorSpec | None) -> dict[str, Cost]:
    """Time and memory of the source that each value would get: one prediction, one regression, one
    update.

    A few sources of each kind are timed; the others are taken to run at the rate of the nearest
    one.

    Args:
        flow: facts of a traced model.
        option_of: the source asked for at a node's value.
        context: shape of the context, or None.

    Returns:
        Cost by node name, for every value that carries a gradient. Random states are as they were.
    """
    device = next(flow.trace.model.parameters()).device
    groups: dict[Any, list[tuple[int, Any]]] = {}
    wanted = _wanted(flow, option_of, context)
    for key, source in wanted.items():
        if source is not None:
            groups.setdefault((key[0], type(source)), []).append((_operations(source, key[1]), key))
    known: dict[Any, Cost] = {}
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
    ):
        for group in groups.values():
            group.sort(key=lambda entry: entry[0])
            small = [entry for entry in group if entry[0] <= _LARGEST_SAMPLE] or group[:1]
            picked = {round(k * (len(small) - 1) / (_SAMPLES - 1)) for k in range(_SAMPLES)}
            timed: list[tuple[int, Cost]] = []
            failed = []
            for size, (option, spec) in (small[i] for i in sorted(picked)):
                try:
                    timed.append((size, _time_source(option, spec, context, device)))
                except Exception:  # a value that its source cannot take, such as an empty one
                    failed.append((option, spec))
            for size, key in group:
                if key in failed or not timed:
                    continue
                near, (nanoseconds, kept) = min(
                    timed, key=lambda entry: abs(math.log((entry[0] + 1) / (size + 1)))
                )
                source = wanted[key]
                assert source is not None
                weights = COPIES * sum(int(p.nbytes) for p in source.parameters())
                ratio = (size + 1) / (near + 1)
                known[key] = (round(nanoseconds * ratio), weights + round(kept * ratio))
    return _by_name(flow, option_of, known)


def estimate_sources(
    flow: Flow, option_of: OptionOf, context: TensorSpec | None
) -> dict[str, Cost]:
    """The same by floating-point operations and bytes; see :func:`measure_sources`."""
    known: dict[Any, Cost] = {}
    for key, source in _wanted(flow, option_of, context).items():
        if source is not None:
            weights = sum(p.nbytes for p in source.parameters())
            if not weights:
                known[key] = (0, 0)
                continue
            moved, flops = 3 * (2 * key[1].nbytes + weights), 3 * _operations(source, key[1])
            seconds = max(flops / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND)
            known[key] = (round(seconds * 1e9), COPIES * weights + 2 * key[1].nbytes)
    return _by_name(flow, option_of, known)


def _wanted(
    flow: Flow, option_of: OptionOf, context: TensorSpec | None
) -> dict[Any, GradientSource | None]:
    """A source for every kind of value; None where none can be made: a cut there is refused later,
    with the reason.
    """
    found: dict[Any, GradientSource | None] = {}
    for node in flow.nodes:
        if flow.is_computed(node) and flow.carries_gradient(node):
            option, spec = option_of(node), flow.specs[node.name]
            if (option, spec) not in found:
                found[option, spec] = None
                with contextlib.suppress(DecouplingError):
                    found[option, spec] = _without_weights(option, spec, context)
    return found


def _without_weights(
    option: str | SourceFactory, spec: TensorSpec, context: TensorSpec | None
) -> GradientSource:
    """A source on the meta device, where its weights take no memory and no time to initialise."""
    option = "zero" if option == "exact" else option
    try:
        with torch.device("meta"):
            return make_source(option, (spec,), context)
    except DecouplingError:
        raise
    except Exception:  # a source of the user's own that computes something of its weights
        return make_source(option, (spec,), context)


def _by_name(flow: Flow, option_of: OptionOf, known: Mapping[Any, Cost]) -> dict[str, Cost]:
    nodes = [n for n in flow.nodes if flow.is_computed(n) and flow.carries_gradient(n)]
    return {n.name: known.get((option_of(n), flow.specs[n.name]), (UNSERVED, 0)) for n in nodes}


def _operations(source: GradientSource, spec: TensorSpec) -> int:
    """Of one prediction; the value's size for a source of the user's own that cannot run without
    data.
    """
    with contextlib.suppress(Exception):
        return source.flops()
    return spec.nbytes


def _example_message(
    source: GradientSource, prediction: Prediction, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Something of the shape of what would come back."""
    likely = {
        "gradient": value,
        "loss": value.new_zeros(value.shape[:1])
        if prediction.loss is None
        else torch.zeros_like(prediction.loss),
        "logits": value if prediction.logits is None else torch.zeros_like(prediction.logits),
        "error": value,
    }
    return tuple(likely[kind] for kind in source.asks.learns_from)


def _time_source(
    option: str | SourceFactory, spec: TensorSpec, context: TensorSpec | None, device: torch.device
) -> Cost:
    """One prediction, regression and update, the least of three; and what is kept in between."""
    source = make_source("zero" if option == "exact" else option, (spec,), context).to(device)
    value = torch.randn(spec.shape, device=device).to(spec.dtype)
    seen = (
        None if context is None else torch.zeros(context.shape, dtype=context.dtype, device=device)
    )
    parameters = [p for p in source.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters) if parameters else None
    own = {storage_key(p) for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_key(tensor) not in own:
            kept[storage_key(tensor)] = tensor.nbytes
        return tensor

    def step() -> None:
        prediction = source((value,), seen)
        loss = source.fit(prediction, _example_message(source, prediction, value))
        if loss is not None and loss.requires_grad and optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return min(elapsed(step, device) for _ in range(3)), sum(kept.values())
