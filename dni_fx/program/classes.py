"""Modules of the model as classes, each written once however often it occurs."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.trace.nodes import Graph, Node
from ..passes.trace.traces import Trace
from .attributes import OPEN, Attributes, Made, class_lines
from .bodies import Body, BodyWriter, base_name
from .scopes import Inline, Scope, find_scopes, flatten, live_nodes, module_at, traced, value_of
from .text import docstring

# names that files of a folder have already
_RESERVED = {"Tensor", "Any", "Regression", "JointRegression", "LocalHead", "Program"}


@dataclass
class Classes:
    """All classes of a folder, by name.

    Attributes:
        lines: of each, its name left open.
        needs: the classes that each names.
        imports: what each needs besides torch.
        order: names in the order in which they were first written.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    imports: dict[str, set[str]] = field(default_factory=dict)

    def add(self, wanted: str, lines: list[str], imports: set[str]) -> str:
        """The name of a class with these lines."""
        for name, known in self.lines.items():
            if known == lines:
                return name
        name = f"{wanted}_" if wanted in _RESERVED else wanted
        count = 1
        while name in self.lines:
            count += 1
            name = f"{wanted}{count}"
        self.lines[name], self.imports[name] = lines, set(imports)
        return name

    def named(self, name: str) -> list[str]:
        """The lines of a class."""
        return [line.replace(OPEN, name) for line in self.lines[name]]


@dataclass(frozen=True)
class Faces:
    """What goes into a scope and comes out."""

    given: tuple[Node, ...]
    results: tuple[Node, ...]


class _UnlikeError(Exception):
    """Two calls of one module are not of the same text."""


class GraphWriter:
    """Writes the modules in one graph.

    Args:
        graph: of a stage, or a whole one.
        trace: what it comes from.
        model: what paths belong to.
        results: the nodes that it returns.
        classes: where classes are registered.
        whose: modules these are, in words.
    """

    def __init__(
        self,
        graph: Graph,
        trace: Trace,
        model: nn.Module,
        results: Sequence[Any],
        classes: Classes,
        whose: str = "The model's",
    ) -> None:
        self.trace, self.model, self.classes = trace, model, classes
        self.results = [r for r in results if isinstance(r, Node)]
        nodes = live_nodes(graph, self.results)
        self.inline = Inline(nodes)
        self.root = find_scopes(nodes, trace)
        self._live = set(nodes)
        self._whose = whose
        self._parts = {n: names for n in nodes if (names := self._part_names(n))}
        self.imports: set[str] = set()
        self._others = trace.attributes

    def _part_names(self, node: Node) -> list[str]:
        """What the parts of a result are called that is taken apart; none where that is unknown."""
        lengths = [
            int(count)
            for guard, count in self.trace.guards
            if guard.target is len and guard.args[0] is traced(node)
        ]
        if lengths:
            return [f"{base_name(node)}_{k}" for k in range(lengths[0])]
        whole = node.all_input_nodes[0] if node.target is operator.getitem else node
        module = self.trace.attributes.get(str(traced(whole).target))
        if whole.op != "call_module" or not isinstance(module, nn.RNNBase):
            return []
        if whole is node:
            return [base_name(node), "state" if isinstance(module, nn.LSTM) else "hidden"]
        return ["hidden", "cell"] if isinstance(module, nn.LSTM) and node.args[1] == 1 else []

    # ---- what a scope takes and gives ------------------------------------------------------------

    def faces(self, scope: Scope) -> Faces:
        """What goes into a scope and comes out, in program order."""
        inside = set(scope.nodes())
        given: dict[Node, None] = {}
        plain: dict[Node, None] = {}
        for node in scope.nodes():
            for used in node.all_input_nodes if node not in self.inline.nodes else ():
                if used in self.inline.nodes:
                    plain[used] = None
                elif used.op == "get_attr":
                    if self._path_in(scope.path, used) is None:
                        given[used] = None
                elif used not in inside:
                    given[used] = None
        for used in plain:
            if not self.inline.leaves(used) <= inside | set(given):
                given[used] = None
        results = tuple(
            n
            for n in scope.nodes()
            if n not in self.inline.nodes and self._is_used_outside(n, inside)
        )
        return Faces(tuple(given), results)

    def _is_used_outside(self, node: Node, inside: set[Node]) -> bool:
        if node in self.results:
            return True
        for user in node.users:
            if user in self.inline.nodes:
                if self._is_used_outside(user, inside):
                    return True
            elif user in self._live and user not in inside:
                return True
        return False

    def _path_in(self, scope: str, node: Node) -> str | None:
        """The path of an attribute below a module, by whatever name it has there."""
        target = str(traced(node).target)
        if not scope:
            return target
        if target.startswith(f"{scope}."):
            return target.removeprefix(f"{scope}.")
        module, wanted = module_at(self.model, scope), self.trace.attributes.get(target)
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        return next((n for n, t in tensors if t is wanted), None)

    # ---- classes ---------------------------------------------------------------------------------

    def written(self, given: Mapping[Node, str], results: Any) -> tuple[Attributes, Body]:
        """The graph's own module: what it holds, and its ``forward``."""
        while True:
            try:
                return self._module(self.root, given, results)
            except _UnlikeError as error:  # written where they stand, then
                flatten(self.root, str(error))

    def _module(
        self, scope: Scope, given: Mapping[Node, str], results: Any
    ) -> tuple[Attributes, Body]:
        own, calls = _direct(scope)
        made = self._made_calls(calls)
        scopes = {_below(scope.path, path): m for path, m in made.items()}
        used = dict.fromkeys(scopes)
        called: set[str] = set()
        for node in own:
            if node.op == "call_module":
                called.add(self._path_in(scope.path, node) or "")
            attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
            for read in [*([node] if node.op == "call_module" else []), *attributes]:
                place = self._path_in(scope.path, read)
                if place is not None:
                    used[place] = None
        for read in results if isinstance(results, tuple) else (results,):
            if isinstance(read, Node) and read.op == "get_attr":
                used[self._path_in(scope.path, read) or ""] = None
        module = module_at(self.model, scope.path)
        held = Attributes(module, scope.path, used, called, scopes, self._others, self._add)
        faces = {id(call): self.faces(call) for call in calls}
        given_of = {
            id(c): list(self._given_names(self.faces(c).given, module_at(self.model, c.path)))
            for c in calls
        }

        def attribute(node: Node) -> str:
            return held.expression(self._path_in(scope.path, node) or "")

        def call(inner: Scope) -> tuple[str, Sequence[Node], Sequence[Node]]:
            found = faces[id(inner)]
            callee = held.expression(_below(scope.path, inner.path))
            return callee, given_of[id(inner)], found.results

        writer = BodyWriter(scope, self.inline, self._parts, attribute, call, self.imports)
        return held, writer.write(given, results)

    def _add(self, wanted: str, lines: list[str]) -> str:
        return self.classes.add(wanted, lines, self.imports)

    def _made_calls(self, calls: Sequence[Scope]) -> dict[str, Made]:
        """The modules that are called, as they are written; several calls of one must be alike."""
        found: dict[str, Made] = {}
        for call in calls:
            made = self._made(call)
            known = found.setdefault(call.path, made)
            if known.expression != made.expression:
                raise _UnlikeError(call.path)
        return found

    def _made(self, scope: Scope) -> Made:
        faces, module = self.faces(scope), module_at(self.model, scope.path)
        chain = self._chain(scope, faces) if type(module) is nn.Sequential else None
        if chain is not None:
            return chain
        names = self._given_names(faces.given, module)
        results = faces.results[0] if len(faces.results) == 1 else faces.results
        held, body = self._module(scope, names, results)
        kind = type(module).__name__
        text = f"{self._whose} ``{kind}``."
        if _is_linear(held, body):
            assert isinstance(module.weight, Tensor)
            inputs, outputs = module.weight.shape[1], module.weight.shape[0]
            return Made(f"nn.Linear({inputs}, {outputs})", held.tensors)
        name = self._add(kind, class_lines(text, held, method_lines("forward", body)))
        return Made(f"{name}()", held.tensors)

    def _given_names(self, given: Sequence[Node], module: nn.Module) -> dict[Node, str]:
        """What a module's ``forward`` takes: its first argument first, as the model calls it."""
        names = {n: base_name(n) for n in given}
        tensors = [n for n in given if isinstance(value_of(n), Tensor)]
        first = next(iter(inspect.signature(module.forward).parameters), "")
        if not tensors or not first.isidentifier():
            return names
        main = next((n for n in tensors if names[n] == first), tensors[0])
        return {main: first} | {n: name for n, name in names.items() if n is not main}

    def _chain(self, scope: Scope, faces: Faces) -> Made | None:
        """A sequence of modules as such, where that is all it is."""
        items = [i for i in scope.items if isinstance(i, Scope) or i not in self.inline.nodes]
        module = module_at(self.model, scope.path)
        names = [str(k) for k in range(len(items))]
        if list(module._modules) != names or len(faces.given) != 1 or len(faces.results) != 1:
            return None
        before = faces.given[0]
        for item, name in zip(items, names, strict=True):
            path = f"{scope.path}.{name}".lstrip(".")
            if isinstance(item, Scope):
                inner = self.faces(item)
                fits = item.path == path and inner.given == (before,) and len(inner.results) == 1
                after = inner.results[0] if inner.results else before
            else:
                is_call = item.op == "call_module" and str(traced(item).target) == path
                fits, after = is_call and item.args == (before,) and not item.kwargs, item
            if not fits:
                return None
            before = after
        if before is not faces.results[0]:
            return None
        used = [_below(scope.path, str(traced(i).target)) for i in items if isinstance(i, Node)]
        calls = [i for i in items if isinstance(i, Scope)]
        scopes = {_below(scope.path, p): m for p, m in self._made_calls(calls).items()}
        order = sorted([*used, *scopes], key=int)
        held = Attributes(module, scope.path, order, used, scopes, self._others, self._add)
        parts = [line.partition(" = ")[2] for line in held.lines]
        if not all(parts):  # some weights of a child are frozen, and others are not
            return None
        renamed = {k.removeprefix("layer_"): t for k, t in held.tensors.items()}
        return Made(f"nn.Sequential({', '.join(parts)})", renamed)


def _is_linear(held: Attributes, body: Body) -> bool:
    """Whether a module does what ``nn.Linear`` does."""
    names = [name for name, _ in body.given.values()]
    plain = [t.requires_grad and t.dtype == torch.float32 for t in held.tensors.values()]
    whole = len(names) == 1 and not body.lines and set(held.tensors) == {"weight", "bias"}
    return (
        whole and all(plain) and body.returns[0] == f"F.linear({names[0]}, self.weight, self.bias)"
    )


def _below(scope: str, path: str) -> str:
    return path.removeprefix(f"{scope}.") if scope else path


def _direct(scope: Scope) -> tuple[list[Node], list[Scope]]:
    """Nodes and calls of a scope itself, those in regions of modes included."""
    nodes: list[Node] = []
    calls: list[Scope] = []
    for item in scope.items:
        if isinstance(item, Node):
            nodes.append(item)
        elif item.header:
            more, inner = _direct(item)
            nodes += more
            calls += inner
        else:
            calls.append(item)
    return nodes, calls


def method_lines(name: str, body: Body, text: str = "", first: str = "self") -> list[str]:
    """A method, indented as it stands in its class; or a function, where ``first`` is empty."""
    indent = "    " if first else ""
    given = ", ".join(part for part in (first, body.arguments) if part)
    lines = [f"{indent}def {name}({given}) -> {body.returns[1]}:"]
    lines += docstring(text, f"{indent}    ") if text else []
    lines += [f"{indent}    {line}" for line in body.lines]
    if body.returns[0] != "None":
        lines.append(f"{indent}    return {body.returns[0]}")
    elif not body.lines:
        lines.append(f"{indent}    pass")
    return lines
