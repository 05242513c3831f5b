"""What every node of a traced graph costs in time and memory, and what a source at its value would
cost.

Times are whole nanoseconds, so that a search over their sums is exact and the same everywhere. They
are measured on the example batch, estimated from floating-point operations and bytes on tensors
without data, or given by the user. Only their ratios matter to a search.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ...errors import DecouplingError, did_you_mean
from ...graphs.nested import flatten, map_tensors
from ..cut.cutting import Flow, needs_gradient
from ..trace.nodes import run_node
from ..trace.state import restored
from ..trace.values import storage_key, tensors_in

# A processor core as the analytic costs see it; a constant factor over all of them changes no plan.
FLOPS_PER_SECOND, BYTES_PER_SECOND, SECONDS_PER_NODE = 5e10, 1e10, 2e-6
COPIES = 4  # a parameter, its gradient and Adam's two moments
_LONG = 200_000_000  # ns; a node that takes longer is timed once
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
    clock = _Clock(repeats, flow.trace.model)
    with restored(flow.trace.model):
        _walk(flow, args, kwargs, clock, watch)
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
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = _Counter()
    with restored(flow.trace.model), fake:
        args, kwargs = map_tensors(fake.from_tensor, (args, kwargs))
        _walk(flow, args, kwargs, counter, iter)
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
            for name in dict.fromkeys(
                (node.name, *flow.names[node], *node.meta.get("modules", ()), *own)
            ):
                members.setdefault(name, []).append(node)
    walk = _Probe()
    for name, value in seconds.items():
        if name not in members:
            raise DecouplingError(
                f"costs= names {name!r}, which is no node or module{did_you_mean(name, members)}"
            )
        forward, backward = value if isinstance(value, tuple) else (value / 3, value * 2 / 3)
        if not all(
            isinstance(s, int | float) and 0 <= s < float("inf") for s in (forward, backward)
        ):
            raise DecouplingError(
                f"costs={{{name!r}: {value!r}}}: expected seconds, or a pair of them, not negative"
            )
        for node in members[name]:
            walk.forward[node.name] = walk.forward.get(node.name, 0) + round(
                forward * 1e9 / len(members[name])
            )
            walk.backward[node.name] = walk.backward.get(node.name, 0) + round(
                backward * 1e9 / len(members[name])
            )
    for node in flow.nodes:
        if flow.is_computed(node) and node.name in flow.specs:
            walk.kept[node.name] = flow.specs[node.name].nbytes
    return _costs("given", flow, walk, sources, 0.0)


# ---- nodes ---------------------------------------------------------------------------------------


class _Probe:
    """What a walk over the nodes finds out."""

    needs_data = True

    def __init__(self) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        self.kept: dict[str, int] = {}  # bytes made inside a node and kept for its backward
        self.keeps_value: set[str] = set()  # nodes whose value is kept by themselves or a user

    def visit(self, node: fx.Node, forward: Callable[[], Any], trained: list[torch.Tensor]) -> None:
        """Find out about one node; ``forward`` can be called again and again."""
        raise NotImplementedError

    def run(self, flow: Flow, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The node's value, for those that use it."""
        with torch.no_grad():
            return run_node(flow.trace, node, values)

    def pull_back(self, output: Any, trained: list[torch.Tensor]) -> Callable[[], Any] | None:
        """The node's backward as a call, or None where nothing needs a gradient."""
        roots = [t for t in tensors_in(output) if t.requires_grad]
        leaves = [t for t in trained if t.requires_grad]
        if not roots or not leaves:
            return None
        ones = [torch.ones_like(r) for r in roots]
        return lambda: torch.autograd.grad(roots, leaves, ones, allow_unused=True)


class _Clock(_Probe):
    def __init__(self, repeats: int, model: nn.Module) -> None:
        super().__init__()
        self.repeats, self.device = repeats, next(model.parameters()).device

    def visit(self, node: fx.Node, forward: Callable[[], Any], trained: list[torch.Tensor]) -> None:
        ahead, back = [], []
        for _ in range(self.repeats):
            nanoseconds, output = _timed(forward, self.device)
            ahead.append(nanoseconds)
            if call := self.pull_back(output, trained):
                try:
                    back.append(elapsed(call, self.device))
                except (
                    RuntimeError
                ):  # reentrant checkpoints want a whole backward: forward again, and twice that
                    back.append(3 * ahead[-1])
            if ahead[-1] + sum(back[-1:]) > _LONG:
                break
        self.forward[node.name], self.backward[node.name] = min(ahead), min(back, default=0)


class _Counter(_Probe):
    needs_data = False

    def run(self, flow: Flow, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        try:
            return super().run(flow, node, values)
        except (
            Exception
        ):  # control flow on values that are not there: an opaque module, or a member of its result
            value = node.meta.get("value")
            return None if value is None else torch.empty(value.shape, dtype=value.dtype)

    def visit(self, node: fx.Node, forward: Callable[[], Any], trained: list[torch.Tensor]) -> None:
        aten = torch.ops.aten
        attention: dict[Any, Any] = {  # of the CPU, whose operators the counter does not know
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        }
        counter = FlopCounterMode(display=False, custom_mapping=attention)
        moved = sum(t.nbytes for t in trained)
        with counter:
            output = forward()
        first = counter.get_total_flops()
        moved += sum(t.nbytes for t in tensors_in(output))
        self.forward[node.name] = _roofline(first, moved)
        self.backward[node.name] = 0
        if call := self.pull_back(output, trained):
            backward = FlopCounterMode(display=False, custom_mapping=attention)
            try:
                with backward:
                    call()
                flops = backward.get_total_flops()
            except RuntimeError:
                flops = 3 * first
            self.backward[node.name] = _roofline(flops, 2 * moved)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


def _roofline(flops: int, nbytes: int) -> int:
    return round(max(flops / FLOPS_PER_SECOND, nbytes / BYTES_PER_SECOND, SECONDS_PER_NODE) * 1e9)


def _walk(
    flow: Flow,
    args: Any,
    kwargs: Any,
    probe: _Probe,
    watch: Callable[[Iterable[fx.Node]], Iterable[fx.Node]],
) -> None:
    """Run the graph node by node; a probe sees each node on inputs of its own before the node runs
    for good.
    """
    with warnings.catch_warnings():  # about how nodes are used here, not about the user's model
        warnings.simplefilter("ignore")
        _walk_quietly(flow, iter(flatten((args, kwargs))[0]), probe, watch)


def _walk_quietly(
    flow: Flow,
    inputs: Iterator[Any],
    probe: _Probe,
    watch: Callable[[Iterable[fx.Node]], Iterable[fx.Node]],
) -> None:
    values: dict[fx.Node, Any] = {}
    pending = {n: len(n.users) for n in flow.nodes}
    owners: dict[int, str] = {}  # which node made the memory that is alive
    for node in watch(flow.nodes):
        if node.op == "placeholder":
            values[node] = next(inputs).detach().clone()
        elif node.op == "get_attr":
            values[node] = flow.trace.attributes[str(node.target)]
        elif node.op != "output":
            with regions(node):
                if flow.is_computed(node) and not node.meta.get("glued"):
                    _visit(flow, node, values, probe, owners)
                values[node] = probe.run(flow, node, values)
            for tensor in tensors_in(values[node]):
                owners[storage_key(tensor)] = node.name
        for used in node.all_input_nodes:
            pending[used] -= 1
            if not pending[used] and used.op != "get_attr":
                del values[used]


def _visit(
    flow: Flow, node: fx.Node, values: dict[fx.Node, Any], probe: _Probe, owners: dict[int, str]
) -> None:
    trained: list[torch.Tensor] = []
    sources: dict[fx.Node, Any] = {}
    written = set(node.meta.get("mutates", ()))
    for used in node.all_input_nodes:
        value = values[used]
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            value = value.detach().requires_grad_(
                needs_gradient(used) and not node.meta.get("no_grad")
            )
        sources[used] = value
        trained += tensors_in(value)
    copied = [
        u
        for u in sources
        if isinstance(sources[u], torch.Tensor) and u.meta.get("storage") in written
    ]
    if node.op == "call_module":
        trained += list(flow.trace.attributes[str(node.target)].parameters())

    def forward() -> Any:
        own = {**sources, **{u: sources[u].clone() for u in copied}}
        with torch.set_grad_enabled(not node.meta.get("no_grad")):
            return run_node(flow.trace, node, own)

    received = {storage_key(t): owners.get(storage_key(t)) for t in trained}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key in received:
            if (owner := received[key]) is not None:
                probe.keeps_value.add(owner)
        elif key not in seen and not isinstance(tensor, nn.Parameter):
            seen[key] = tensor.nbytes
        return tensor

    seen: dict[int, int] = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = forward()
    except Exception:
        if probe.needs_data:
            raise
        moved = sum(t.nbytes for t in trained) + (
            flow.specs[node.name].nbytes if node.name in flow.specs else 0
        )
        probe.forward[node.name], probe.backward[node.name] = (
            _roofline(0, moved),
            _roofline(0, 2 * moved),
        )
        return
    results = {storage_key(t) for t in tensors_in(output)}
    if results & seen.keys():
        probe.keeps_value.add(node.name)
    probe.kept[node.name] = sum(b for k, b in seen.items() if k not in results)
    del output
    probe.visit(node, forward, trained)


@contextlib.contextmanager
def regions(node: fx.Node) -> Iterator[None]:
    """The autocast regions that the node was recorded in."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            stack.enter_context(
                torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            )
        yield


def _costs(
    kind: str, flow: Flow, probe: _Probe, sources: Mapping[str, Cost], element: float
) -> Costs:
    sizes = {n: p for n, p in flow.trace.model.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in flow.trace.model.named_parameters() if not p.requires_grad}
    update: dict[str, int] = {}
    memory: dict[str, int] = {}
    taken: set[str] = set()
    for node in flow.nodes:
        if not flow.is_computed(node):
            continue
        direct = {
            p for i in node.all_input_nodes if i.op == "get_attr" for p in i.meta["parameters"]
        }
        names = [
            n
            for n in dict.fromkeys((*node.meta.get("parameters", ()), *sorted(direct)))
            if n not in taken
        ]
        taken.update(names)
        trained = [sizes[n] for n in names if n in sizes]
        update[node.name] = round(element * sum(p.numel() for p in trained))
        memory[node.name] = COPIES * sum(p.nbytes for p in trained)
        memory[node.name] += sum(frozen[n].nbytes for n in names if n in frozen)
    activations = {
        n.name: probe.kept.get(n.name, 0)
        + (flow.specs[n.name].nbytes if n.name in probe.keeps_value and n.name in flow.specs else 0)
        for n in flow.nodes
        if flow.is_computed(n)
    }
    return Costs(kind, probe.forward, probe.backward, update, memory, activations, sources)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Nanoseconds, and what the call returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - start, result


def elapsed(call: Callable[[], Any], device: torch.device) -> int:
    """Nanoseconds of a call, waiting for the device."""
    return _timed(call, device)[0]


def _time_adam(like: torch.Tensor) -> float:
    """Nanoseconds that Adam takes for one element, told by a quarter of a million."""
    parameter = nn.Parameter(torch.zeros(1 << 18, device=like.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    return min(elapsed(optimizer.step, like.device) for _ in range(3)) / parameter.numel()
