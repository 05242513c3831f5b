"""Every node of a traced graph run by itself: how long it takes, and what it keeps for its
backward.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ...graphs.nested import flatten
from ..cut.cutting import Flow, needs_gradient
from ..trace.nodes import run_node
from ..trace.storages import unwatched
from ..trace.values import storage_key, tensors_in

# A processor core as the analytic costs see it; a constant factor over all of them changes no plan.
FLOPS_PER_SECOND, BYTES_PER_SECOND, SECONDS_PER_NODE = 5e10, 1e10, 2e-6
_LONG = 200_000_000  # ns; a node that takes longer is timed once

Watch = Callable[[Iterable[fx.Node]], Iterable[fx.Node]]  # wraps nodes, for a progress bar


class Probe:
    """What a walk over the nodes finds out.

    Attributes:
        needs_data: whether nodes that cannot be run are an error.
        forward: nanoseconds of each node's forward, by name.
        backward: of its backward.
        kept: bytes made inside a node and kept for its backward.
        keeps_value: nodes whose value is kept by themselves or a user.
    """

    needs_data = True

    def __init__(self) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.keeps_value: set[str] = set()

    def visit(self, node: fx.Node, forward: Callable[[], Any], trained: list[torch.Tensor]) -> None:
        """Find out about one node; ``forward`` can be called again and again."""
        raise NotImplementedError

    def fails(self, flow: Flow, node: fx.Node, trained: list[torch.Tensor]) -> None:
        """While an error of a node is handled: what is said of its costs, if anything."""
        if self.needs_data:
            raise
        moved = sum(t.nbytes for t in trained)
        moved += flow.specs[node.name].nbytes if node.name in flow.specs else 0
        self.forward[node.name] = _roofline(0, moved)
        self.backward[node.name] = _roofline(0, 2 * moved)

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


class Clock(Probe):
    """Measures: the least of a few times."""

    def __init__(self, repeats: int, model: nn.Module) -> None:
        super().__init__()
        self.repeats, self.device = repeats, next(model.parameters()).device

    def visit(self, node: fx.Node, forward: Callable[[], Any], trained: list[torch.Tensor]) -> None:
        ahead, back = [], []
        for k in range(self.repeats):
            # what writes to the model's memory is seen the first time
            with unwatched() if k else contextlib.nullcontext():
                nanoseconds, output = _timed(forward, self.device)
                ahead.append(nanoseconds)
                if call := self.pull_back(output, trained):
                    try:
                        back.append(elapsed(call, self.device))
                    except RuntimeError:
                        # reentrant checkpoints want a whole backward: forward again, and twice that
                        back.append(3 * ahead[-1])
            if ahead[-1] + sum(back[-1:]) > _LONG:
                break
        self.forward[node.name], self.backward[node.name] = min(ahead), min(back, default=0)


class Counter(Probe):
    """Estimates: counts operations and bytes, on tensors without data."""

    needs_data = False

    def run(self, flow: Flow, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        try:
            return super().run(flow, node, values)
        except Exception:
            # control flow on values that are not there: an opaque module, or a member of its result
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


def walk(
    flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], probe: Probe, watch: Watch
) -> None:
    """Run the graph node by node; a probe sees each node on inputs of its own before the node runs
    for good.

    Args:
        flow: facts of a traced model.
        args: example positional inputs.
        kwargs: example keyword inputs.
        probe: learns what there is to know.
        watch: wraps the nodes, for a progress bar.
    """
    with warnings.catch_warnings():  # about how nodes are used here, not about the user's model
        warnings.simplefilter("ignore")
        _walk(flow, iter(flatten((args, kwargs))[0]), probe, watch)


def _walk(flow: Flow, inputs: Iterator[Any], probe: Probe, watch: Watch) -> None:
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
    flow: Flow, node: fx.Node, values: dict[fx.Node, Any], probe: Probe, owners: dict[int, str]
) -> None:
    """Show a probe one node; find out what its forward keeps."""
    sources, trained = _own_inputs(flow, node, values)
    written = set(node.meta.get("mutates", ()))
    tensors = [u for u in sources if isinstance(sources[u], torch.Tensor)]
    copied = [u for u in tensors if u.meta.get("storage") in written]

    def forward() -> Any:
        own = {**sources, **{u: sources[u].clone() for u in copied}}
        with torch.set_grad_enabled(not node.meta.get("no_grad")):
            return run_node(flow.trace, node, own)

    received = {storage_key(t): owners.get(storage_key(t)) for t in trained}
    made: dict[int, int] = {}  # bytes of what was made inside and kept

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key in received:
            if (owner := received[key]) is not None:
                probe.keeps_value.add(owner)
        elif key not in made and not isinstance(tensor, nn.Parameter):
            made[key] = tensor.nbytes
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = forward()
    except Exception:
        probe.fails(flow, node, trained)
        return
    results = {storage_key(t) for t in tensors_in(output)}
    if results & made.keys():
        probe.keeps_value.add(node.name)
    probe.kept[node.name] = sum(size for key, size in made.items() if key not in results)
    del output
    try:
        probe.visit(node, forward, trained)
    except Exception:  # it runs once only: it has exchanged its memory, say
        probe.fails(flow, node, trained)


def _own_inputs(
    flow: Flow, node: fx.Node, values: dict[fx.Node, Any]
) -> tuple[dict[fx.Node, Any], list[torch.Tensor]]:
    """A node's inputs as leaves of a graph of its own, and every tensor that it computes from."""
    trained: list[torch.Tensor] = []
    sources: dict[fx.Node, Any] = {}
    for used in node.all_input_nodes:
        value = values[used]
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            needed = needs_gradient(used) and not node.meta.get("no_grad")
            value = value.detach().requires_grad_(needed)
        sources[used] = value
        trained += tensors_in(value)
    if node.op == "call_module":
        trained += list(flow.trace.attributes[str(node.target)].parameters())
    return sources, trained


@contextlib.contextmanager
def regions(node: fx.Node) -> Iterator[None]:
    """The autocast regions that the node was recorded in."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            stack.enter_context(region)
        yield


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
