"""Every node of a traced graph run by itself: how long it takes, and what it keeps for its
backward.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..cut.cutting import Flow
from ..trace.interpreting import Values, call_node, interpret
from ..trace.nodes import needs_gradient
from ..trace.settings import wait_for
from ..trace.storages import unwatched
from ..trace.values import storage_key, tensors_in

# A processor core as the analytic costs see it; a constant factor over all of them changes no plan.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 5e10, 1e10
_PER_CALL, _PER_BACKWARD = 8e-6, 2e-5  # seconds of one operator, and of calling autograd
_LONG = 200_000_000  # ns; a node that takes longer is timed once
_ATTENTION: dict[Any, Any] = {  # of the CPU, whose operators torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}

Forward = Callable[[], Any]  # runs a node, again and again
Weigh = Callable[[Forward, list[torch.Tensor]], tuple[int, int]]
"""From a node and all tensors that it computes from to nanoseconds of forward and backward."""
Wanted = Callable[[fx.Node, "Walk"], bool]
"""Whether a node is weighed, from what is known of those before it."""


class Walk:
    """Runs a graph node by node; each is weighed on inputs of its own before it runs for good.

    Args:
        flow: facts of a traced model.
        weigh: learns what a node takes.
        has_data: whether nodes that cannot be run are an error.
        wanted: which nodes are weighed; asked in their order.

    Attributes:
        forward: nanoseconds of each node's forward, by name.
        backward: of its backward.
        kept: bytes kept for it: what is made inside, and the value, where it or a user keeps it.
    """

    def __init__(
        self, flow: Flow, weigh: Weigh, *, has_data: bool = True, wanted: Wanted | None = None
    ) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self._keeps_value: set[str] = set()
        self._flow, self._weigh, self._has_data = flow, weigh, has_data
        self._wanted = wanted
        self._owners: dict[int, str] = {}  # which node made the memory that is alive

    def run(self, inputs: Iterator[torch.Tensor], nodes: Iterable[fx.Node]) -> None:
        """Weigh every node of the graph, given the example's tensors."""
        attributes = self._flow.trace.attributes
        given = lambda node: next(inputs).detach().clone()  # noqa: E731
        for node, value in interpret(nodes, attributes, given, self._weighed):
            if node.op not in ("placeholder", "get_attr"):
                self._owners.update({storage_key(t): node.name for t in tensors_in(value)})
        for name in self._keeps_value & self._flow.specs.keys():
            self.kept[name] = self.kept.get(name, 0) + self._flow.specs[name].nbytes

    def _weighed(self, node: fx.Node, values: Values) -> Any:
        """The value of a node that has been weighed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how nodes are used here
            wanted = self._wanted is None or self._wanted(node, self)
            if wanted and self._flow.is_computed(node) and not node.meta.get("glued"):
                put_back = self._keep(node)
                self._visit(node, values)
                put_back()
            return self._value(node, values)

    def _keep(self, node: fx.Node) -> Callable[[], None]:
        """Remember what a call changes, where the node could not be looked into: it is run once for
        good; the result puts it back.
        """
        trace = self._flow.trace
        is_opaque = node.op == "call_module" and str(node.target) in trace.opaque
        return trace.changes.keep() if is_opaque and self._has_data else lambda: None

    def _value(self, node: fx.Node, values: Values) -> Any:
        """The node's value, for those that use it."""
        try:
            with torch.no_grad():
                return call_node(self._flow.trace.attributes, node, values)
        except Exception:
            if self._has_data:
                raise
            # control flow on values that are not there: an opaque module, or a member of its result
            value = node.meta.get("value")
            return None if value is None else torch.empty(value.shape, dtype=value.dtype)

    def _visit(self, node: fx.Node, values: Values) -> None:
        """Weigh one node, and find out what its forward keeps."""
        inputs, trained = self._own_inputs(node, values)
        written = set(node.meta.get("mutates", ()))
        copied = [
            used
            for used, value in inputs.items()
            if isinstance(value, torch.Tensor) and used.meta.get("storage") in written
        ]

        def forward() -> Any:
            own = {**inputs, **{u: inputs[u].clone() for u in copied}}
            with torch.set_grad_enabled(not node.meta.get("no_grad")):
                return call_node(self._flow.trace.attributes, node, own)

        received = {storage_key(t): self._owners.get(storage_key(t)) for t in trained}
        made: dict[int, int] = {}  # bytes of what was made inside and kept

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            key = storage_key(tensor)
            if owner := received.get(key):
                self._keeps_value.add(owner)
            elif key not in received and not _is_weight(tensor):
                made.setdefault(key, _memory(tensor))
            # Kept, so that no other memory gets its key; an output itself would hold its own node.
            return tensor.detach()

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                output = forward()
            results = {storage_key(t) for t in tensors_in(output)}
            if results & made.keys():
                self._keeps_value.add(node.name)
            self.kept[node.name] = sum(n for key, n in made.items() if key not in results)
            del output
            times = self._weigh(forward, trained)
        except Exception:  # it runs once only, reads values, or takes no hooks: a bold guess
            spec = self._flow.specs.get(node.name)
            moved = sum(t.nbytes for t in trained if t.layout is torch.strided)
            moved += spec.nbytes if spec else 0
            times = Counted().nanoseconds(moved), Counted().nanoseconds(2 * moved)
        self.forward[node.name], self.backward[node.name] = times

    def _own_inputs(
        self, node: fx.Node, values: Values
    ) -> tuple[dict[fx.Node, Any], list[torch.Tensor]]:
        """A node's inputs as leaves of a graph of its own, and every tensor that it computes
        from.
        """
        trained: list[torch.Tensor] = []
        inputs: dict[fx.Node, Any] = {}
        for used in node.all_input_nodes:
            value = values[used]
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                needed = needs_gradient(used) and not node.meta.get("no_grad")
                value = value.detach().requires_grad_(needed)
            inputs[used] = value
            trained += tensors_in(value)
        if node.op == "call_module":
            trained += list(self._flow.trace.attributes[str(node.target)].parameters())
        return inputs, trained


def _memory(tensor: torch.Tensor) -> int:
    """Bytes that live as long as a tensor, which may be a view of more."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else tensor.nbytes


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter, or one that is only seen otherwise; without data it has memory of
    its own.
    """
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def measure(forward: Forward, trained: list[torch.Tensor], device: torch.device) -> tuple[int, int]:
    """The least of three times; one time where it takes long."""
    ahead, back = [], []
    for k in range(3):
        # what writes to the model's memory is seen the first time
        with unwatched() if k else contextlib.nullcontext():
            nanoseconds, output = timed(forward, device)
            ahead.append(nanoseconds)
            if call := _pull_back(output, trained):
                try:
                    back.append(timed(call, device)[0])
                except RuntimeError:
                    # reentrant checkpoints want a whole backward: forward again, and twice that
                    back.append(3 * ahead[-1])
        if ahead[-1] + sum(back[-1:]) > _LONG:
            break
    return min(ahead), min(back, default=0)


def estimate(forward: Forward, trained: list[torch.Tensor]) -> tuple[int, int]:
    """By counted operations and bytes, on tensors without data."""
    with Counted() as ahead:
        output = forward()
    moved = sum(t.nbytes for t in (*trained, *tensors_in(output)))
    call = _pull_back(output, trained)
    if call is None:
        return ahead.nanoseconds(moved), 0
    back = Counted()
    with contextlib.suppress(RuntimeError), back:
        call()
    if not back.calls:  # reentrant checkpoints want a whole backward
        back.calls, back.flops = 3 * ahead.calls, 3 * ahead.flops
    return ahead.nanoseconds(moved), back.nanoseconds(2 * moved) + round(_PER_BACKWARD * 1e9)


class Counted(TorchDispatchMode):
    """Counts operators and what they compute.

    Attributes:
        calls: of operators that are no views.
        flops: floating-point operations, once closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.flops = 0
        self._counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)

    def __enter__(self) -> Counted:
        self._counter.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._counter.__exit__(*raised)
        self.flops = self._counter.get_total_flops()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count one operator and run it."""
        self.calls += operator.namespace == "aten" and not operator.is_view
        return operator(*args, **(kwargs or {}))

    def nanoseconds(self, moved: int) -> int:
        """The longer of computing and of moving so many bytes, and the time of every call."""
        longer = max(self.flops / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND)
        return round((longer + _PER_CALL * self.calls) * 1e9)


def _pull_back(output: Any, trained: list[torch.Tensor]) -> Forward | None:
    """The node's backward as a call, or None where nothing needs a gradient."""
    roots = [t for t in tensors_in(output) if t.requires_grad]
    leaves = [t for t in trained if t.requires_grad]
    if not roots or not leaves:
        return None
    ones = [torch.ones_like(r) for r in roots]
    return lambda: torch.autograd.grad(roots, leaves, ones, allow_unused=True)


def timed(call: Forward, device: torch.device) -> tuple[int, Any]:
    """Nanoseconds, waiting for the device, and what the call returned."""
    wait_for(device)
    start = time.perf_counter_ns()
    result = call()
    wait_for(device)
    return time.perf_counter_ns() - start, result
