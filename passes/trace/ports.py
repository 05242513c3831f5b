"""Opens a window's graph: its state comes in and leaves, and names are the user's model's again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx, nn

from ...errors import DecouplingError
from ...graphs.nested import Structure
from .nodes import needs_gradient
from .traces import Port, Trace

ANOTHER = "another network"  # what a message feeds
STATE = "state_"  # before the name of each tensor of the state, as the window's argument has it


def open_ports(
    trace: Trace,
    model: nn.Module,
    prefixes: Sequence[str],
    batch_dims: Mapping[str, int | None],
    messages: Sequence[str] = (),
    input_gradients: bool = False,
) -> Trace:
    """Turn the state in a window's output into values that leave for the next window, and messages
    for other networks.

    Args:
        trace: of a window, whose output is ``(y, state by name)`` and whose last inputs are the
            state's tensors; it is changed and must not be used any more.
        model: the user's model, which the graph then belongs to.
        prefixes: paths in the window below which names are the model's own; they are taken away.
        batch_dims: of each state tensor by name, in the state's order.
        messages: keys of ``y``, a dict, whose tensors leave for another network.
        input_gradients: whether gradients leave for what the window takes besides the state.

    Returns:
        The trace of the model: the output is ``y``, the state leaves through ports.

    Raises:
        DecouplingError: a state that is not computed as tensors, or messages that are not in the
            output.
    """
    _rename(trace, prefixes)
    output, state = trace.outputs.children
    leaves: list[object] = list(next(reversed(trace.graph.nodes)).args[0])
    first = output.leaf_count
    if len(leaves) != first + len(batch_dims) or state.leaf_count != len(batch_dims):
        raise DecouplingError(
            f"the state after a window has {len(leaves) - first} tensors, expected "
            f"{len(batch_dims)}"
        )
    places = {n.name: n for n in trace.graph.nodes if n.op == "placeholder"}
    ports = _state_ports(places, leaves[first:], first, batch_dims)
    arriving = [places[port.feeds] for port in ports]
    if input_gradients:
        arriving += [n for name, n in places.items() if not name.startswith(STATE)]
    ports += _message_ports(output, leaves, messages)
    return dataclasses.replace(
        trace,
        model=model,
        outputs=output,
        ports=tuple(ports),
        incoming=tuple(n.name for n in arriving if n.meta["value"].is_floating_point()),
    )


def _state_ports(
    places: Mapping[str, fx.Node],
    state: list[object],
    first: int,
    batch_dims: Mapping[str, int | None],
) -> list[Port]:
    """From each tensor of the state after a window to where it enters the next."""
    ports = []
    for i, ((name, dim), leaf) in enumerate(zip(batch_dims.items(), state, strict=True)):
        place = places[STATE + name]
        if not isinstance(leaf, fx.Node):
            raise DecouplingError(f"tensor {name!r} of the state is not computed by the model")
        before, after = place.meta["value"], leaf.meta["value"]
        if before.shape != after.shape or before.dtype != after.dtype:
            raise DecouplingError(
                f"tensor {name!r} of the state changes in a window from {tuple(before.shape)}, "
                f"{before.dtype} to {tuple(after.shape)}, {after.dtype}"
            )
        ports.append(Port(f"next_{name}", first + i, place.name, dim or 0))
    return ports


def _message_ports(output: Structure, leaves: list[object], messages: Sequence[str]) -> list[Port]:
    """From each tensor of the output that another network is to get."""
    content = output.build(iter(range(output.leaf_count)))
    ports = []
    for name in messages:
        index = content.get(name) if isinstance(content, dict) else None
        leaf = leaves[index] if isinstance(index, int) else None
        if not isinstance(leaf, fx.Node) or not needs_gradient(leaf):
            raise DecouplingError(
                f"message {name!r}: the model's output must be a dict with that key, a float "
                "tensor (batch, ...) that depends on trainable parameters"
            )
        ports.append(Port(name, index, ANOTHER))  # type: ignore[arg-type]
    return ports


def _rename(trace: Trace, prefixes: Sequence[str]) -> None:
    def own(path: str) -> str:
        for prefix in prefixes:
            if path.startswith(prefix):
                return path.removeprefix(prefix)
        return path

    roots = {prefix.rstrip(".") for prefix in prefixes}
    for node in trace.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = own(str(node.target))
            node._rename(node.target.replace(".", "_"))
        node.meta["parameters"] = tuple(own(n) for n in node.meta.get("parameters", ()))
        node.meta["modules"] = tuple(
            "" if p in roots else own(p) for p in node.meta.get("modules", ())
        )
    trace.attributes = {own(n): a for n, a in trace.attributes.items()}
    trace.opaque = {own(p): why for p, why in trace.opaque.items()}
    trace.calls = tuple(
        (own(p), node, last) for p, node, last in trace.calls if p and p not in roots
    )
