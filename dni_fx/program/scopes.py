"""The modules in a graph: which nodes ran in which call of which module, as a tree."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..passes.trace.nodes import Graph, Node
from ..passes.trace.traces import Trace
from .functions import INFIX, PREFIX

_QUERIES = ("size", "numel", "dim")
_REGIONS = (
    torch.is_grad_enabled,
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)
_RESHAPES = ("resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "set_")


@dataclass
class Scope:
    """One call of a module, as far as a graph has it.

    Attributes:
        path: of the module; empty for the graph itself.
        items: nodes and what was called, in program order.
        header: of a region of modes (``with torch.no_grad():``), which is no call; else empty.
    """

    path: str
    items: list[Node | Scope] = field(default_factory=list)
    header: str = ""

    def nodes(self) -> Iterator[Node]:
        """All nodes in it, in order."""
        for item in self.items:
            if isinstance(item, Scope):
                yield from item.nodes()
            else:
                yield item


def traced(node: Node) -> Node:
    """The node that a stage's node is a copy of; a node of a whole graph itself."""
    found: Node = node.meta.get("traced", node)
    return found


def value_of(node: Node) -> Any:
    """The example of a node's value; None where it is no tensor, or not known."""
    return traced(node).meta.get("value")


def find_scopes(nodes: Sequence[Node], trace: Trace) -> Scope:
    """The tree of calls that some nodes of a graph ran in.

    Args:
        nodes: of a stage or of a whole graph, without inputs, attributes and output.
        trace: what they come from; it knows where calls end.
    """
    ends: dict[Node, set[str]] = {}
    for path, _, last in trace.calls:
        ends.setdefault(last, set()).add(path)
    root = Scope("")
    stacks = _stacks(nodes, ends)
    before: tuple[str, ...] = ()
    opened: list[Scope] = [root]
    for node, stack in zip(nodes, stacks, strict=True):
        shared = 0
        while shared < min(len(stack), len(before)) and stack[shared] == before[shared]:
            shared += 1
        del opened[shared + 1 :]
        for path in stack[shared:]:
            opened.append(Scope(path))
            opened[-2].items.append(opened[-1])
        opened[-1].items.append(node)
        ended = ends.get(traced(node), set())
        before = stack
        for depth, path in enumerate(stack):
            if path in ended:  # the next call is another one
                before = stack[:depth]
                break
    _enclose(root)
    _inline(root)
    return root


def _stacks(nodes: Sequence[Node], ends: Mapping[Node, set[str]]) -> list[tuple[str, ...]]:
    """The modules that each node ran in; what has none lies where its neighbours both are, and a
    region around whole calls outside of these.
    """
    known: list[tuple[str, ...] | None] = []
    for node in nodes:
        modules = traced(node).meta.get("modules")
        known.append(None if modules is None else tuple(p for p in modules if p))
    regions = _regions(nodes)
    for start, end in regions.items():
        first = start + 1 + (nodes[start].target is torch.is_grad_enabled)
        inside = [s for s in known[first:end] if s is not None]
        found = inside[0] if inside else ()
        for stack in inside:
            found = _common(found, stack)
        over = {p for n in nodes[first:end] for p in ends.get(traced(n), ())}
        depth = next((i for i, path in enumerate(found) if path in over), len(found))
        found = found[:depth]
        for place in (*range(start, first), end):
            known[place] = found
    filled: list[tuple[str, ...]] = []
    for place, own in enumerate(known):
        if own is None:
            after = next((s for s in known[place:] if s is not None), ())
            own = _common(filled[-1] if filled else (), after)
        filled.append(own)
    return filled


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return a[:count]


def _opens(node: Node) -> bool:
    return node.target in (torch.is_grad_enabled, torch.amp.autocast_mode._enter_autocast)


def _regions(nodes: Sequence[Node]) -> dict[int, int]:
    """Where each region of modes begins and ends."""
    opened: dict[Node, int] = {}
    found = {}
    for place, node in enumerate(nodes):
        if _opens(node):
            opened[node] = place
        elif node.args and node.args[0] in opened and node.op == "call_function":
            found[opened[node.args[0]]] = place  # type: ignore[index]
    return found


def _enclose(scope: Scope) -> None:
    """What stands between the two ends of a region of modes becomes one item."""
    stack: list[tuple[Scope, Node]] = []
    items, scope.items = scope.items, []
    skipped = 0
    for place, item in enumerate(items):
        current = stack[-1][0].items if stack else scope.items
        if skipped:
            skipped -= 1
        elif isinstance(item, Scope):
            _enclose(item)
            current.append(item)
        elif _opens(item):
            header, skipped = _header(item, items[place + 1])
            stack.append((Scope(scope.path, [], header), item))
        elif stack and item.args[:1] == (stack[-1][1],):
            region, _ = stack.pop()
            (stack[-1][0].items if stack else scope.items).append(region)
        else:
            current.append(item)


def _header(node: Node, following: Node | Scope) -> tuple[str, int]:
    """How a region begins, and how many more nodes say so."""
    if node.target is torch.is_grad_enabled:
        assert isinstance(following, Node)
        return ("with torch.enable_grad():" if following.args[0] else "with torch.no_grad():"), 1
    device, dtype, enabled, cached = node.args
    told = f'"{device}", dtype={dtype}, enabled={enabled}'
    return f"with torch.autocast({told}{'' if cached else ', cache_enabled=False'}):", 0


def _inline(scope: Scope) -> None:
    """Calls that use nothing of their module are written where they stand."""
    items: list[Node | Scope] = []
    for item in scope.items:
        if isinstance(item, Scope):
            _inline(item)
            if not item.header and not any(map(needs_module, item.nodes())):
                items += item.items
                continue
        items.append(item)
    scope.items = items


def flatten(scope: Scope, path: str) -> None:
    """Write the calls of one module where they stand."""
    items: list[Node | Scope] = []
    for item in scope.items:
        if isinstance(item, Scope):
            flatten(item, path)
            if item.path == path and not item.header:
                items += item.items
                continue
        items.append(item)
    scope.items = items


def needs_module(node: Node) -> bool:
    """Whether a node reads something of the model."""
    return node.op == "call_module" or any(n.op == "get_attr" for n in node.all_input_nodes)


def live_nodes(graph: Graph, results: Iterable[Node]) -> list[Node]:
    """Nodes that the results depend on, or that do something else; no inputs and attributes."""
    nodes = [n for n in graph.nodes if n.op.startswith("call_")]
    needed = {n for n in nodes if _does_something(n)} | set(results)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [n for n in nodes if n in needed]


def _does_something(node: Node) -> bool:
    meta, region = traced(node).meta, node.target in _REGIONS
    return node.op == "call_module" or bool(meta.get("mutates") or meta.get("random") or region)


class Inline:
    """Which nodes are written within the statements that use them: sizes, and what is computed of
    them.

    Args:
        nodes: of the graph that is written.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        still = not any(n.op == "call_method" and n.target in _RESHAPES for n in nodes)
        self.nodes: set[Node] = set()
        for node in nodes if still else ():
            if self._is_plain(node):
                self.nodes.add(node)

    def _is_plain(self, node: Node) -> bool:
        if value_of(node) is not None:
            return False
        used = node.all_input_nodes
        if node.op == "call_method":
            return node.target in _QUERIES and isinstance(value_of(used[0]), torch.Tensor)
        if node.target is getattr:
            return isinstance(value_of(used[0]), torch.Tensor)
        known = node.target in INFIX or node.target in PREFIX
        return node.op == "call_function" and known and all(n in self.nodes for n in used)

    def leaves(self, node: Node) -> set[Node]:
        """The values that an inline expression is computed of."""
        if node not in self.nodes:
            return {node}
        return {leaf for used in node.all_input_nodes for leaf in self.leaves(used)}


def unpacked(node: Node, count: int, near: set[Node]) -> list[Node] | None:
    """The nodes that take a result's parts, where the statement can name them all at once.

    Args:
        node: the result.
        count: how many parts it has; 0 where that is not known.
        near: the nodes of the function that it is written in.
    """
    users = [u for u in node.users if u.target is not len]
    if isinstance(value_of(node), torch.Tensor) or not all(_takes_part(u, node) for u in users):
        return None
    parts = {u.args[1]: u for u in users}
    whole = len(parts) == len(users) and set(parts) == set(range(count)) and set(users) <= near
    return [parts[k] for k in range(len(users))] if whole and len(users) > 1 else None


def _takes_part(user: Node, node: Node) -> bool:
    is_item = user.target is operator.getitem and user.args[0] is node
    return is_item and isinstance(user.args[1], int)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """A module of the model by its path."""
    return model.get_submodule(path) if path else model
