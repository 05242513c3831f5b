"""The ``forward`` of a module, written from the nodes that ran in it."""

from __future__ import annotations

import collections
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..graphs.nested import Structure
from ..passes.cut.splitting import Rebuild
from ..passes.trace.calls import FunctionCall, after, call_named, setitem
from ..passes.trace.nodes import Node
from .functions import INFIX, PREFIX, function_name, importing, sign_of, told
from .scopes import Inline, Scope, unpacked, value_of
from .text import free_name, index, literal

_WORDS = {"truediv": "div", "floordiv": "div", "getitem": "part", "sum": "total"}
Parts = Mapping[Node, Sequence[str]]


@dataclass
class Body:
    """A function's text.

    Attributes:
        given: the nodes that it takes, and the names and types of these.
        lines: its statements, without indentation.
        returns: what it returns, and the type of that.
    """

    given: dict[Node, tuple[str, str]]
    lines: list[str] = field(default_factory=list)
    returns: tuple[str, str] = ("None", "None")

    @property
    def arguments(self) -> str:
        """What stands between the brackets of its ``def``."""
        return ", ".join(f"{name}: {kind}" for name, kind in self.given.values())


class BodyWriter:
    """Writes one function.

    Args:
        scope: what ran in it.
        inline: what is written within other statements.
        parts: names for the parts of results that are taken apart.
        attribute: gives the expression of an attribute or module of the model, by its node.
        call: gives the expression that calls a scope, without arguments, and what that returns,
            and what it takes.
        imports: import lines that are needed; more are added.
    """

    def __init__(
        self,
        scope: Scope,
        inline: Inline,
        parts: Parts,
        attribute: Callable[[Node], str],
        call: Callable[[Scope], tuple[str, Sequence[Node], Sequence[Node]]],
        imports: set[str],
    ) -> None:
        self._scope, self._inline, self._parts = scope, inline, parts
        self._attribute, self._call, self._imports = attribute, call, imports
        self._near = set(scope.nodes())
        self._names: dict[Node, str] = {}
        self._taken: set[str] = set()
        self._lines: list[str] = []
        self._indent = ""

    def write(self, given: Mapping[Node, str], results: Any) -> Body:
        """The function.

        Args:
            given: what it takes, and the names that are wanted for that.
            results: nodes that it returns: one, a tuple of several, or none.
        """
        body = Body({})
        for node, wanted in given.items():
            name = self._bind(node, wanted)
            body.given[node] = (name, type_of(node))
        self._write(self._scope)
        body.lines = self._lines
        nodes = results if isinstance(results, tuple) else (results,)
        if len(nodes) == 1:
            body.returns = (self._value(nodes[0]), type_of(nodes[0]))
            last = self._lines[-1] if self._lines else ""
            if last.startswith(f"{body.returns[0]} = "):  # the last statement makes it
                body.returns = (last.partition(" = ")[2], body.returns[1])
                self._lines.pop()
        elif nodes:
            kinds = ", ".join(map(type_of, nodes))
            body.returns = (", ".join(map(self._value, nodes)), f"tuple[{kinds}]")
        return body

    def expression(self, node: Node, names: Mapping[Node, str]) -> str:
        """An inline node by itself, of values that have names."""
        self._names = dict(names)
        return self._expression(node)

    # ---- statements ------------------------------------------------------------------------------

    def _write(self, scope: Scope) -> None:
        for item in scope.items:
            if isinstance(item, Node):
                self._node(item)
            elif item.header:
                self._lines.append(f"{self._indent}{item.header}")
                self._indent += "    "
                self._write(item)
                self._indent = self._indent[4:]
            else:
                self._scope_call(item)

    def _scope_call(self, scope: Scope) -> None:
        callee, given, results = self._call(scope)
        text = f"{callee}({', '.join(map(self._value, given))})"
        wanted = word_of(scope.path)
        if len(results) == 1:
            self._assign(results[0], wanted, text)
            return
        names = [self._bind(node, base_name(node)) for node in results]
        self._say(f"{', '.join(names)} = {text}" if names else text)

    def _node(self, node: Node) -> None:
        if node in self._inline.nodes:
            return
        if node in self._names:
            self._take_apart(node, self._names[node])
            return
        if node.target is after:
            self._names[node] = self._value(node.args[0])
            return
        if node.target is setitem:
            tensor, place, value = node.args
            self._say(f"{self._value(tensor)}[{index(place, self._value)}] = {self._value(value)}")
            self._names[node] = self._value(tensor)
            return
        if is_same_tensor(node):
            self._names[node] = self._value(node.args[0])
            return
        text = self._expression(node)
        if _is_in_place(node):
            self._say(text)
            self._names[node] = self._value(node.args[0])
            return
        if self._take_apart(node, text):
            return
        if node.users:
            self._assign(node, base_name(node), text)
        else:
            self._say(text)

    def _take_apart(self, node: Node, text: str) -> bool:
        """Name all parts of a result at once, where they are known."""
        wanted = self._parts.get(node, ())
        parts = unpacked(node, len(wanted), self._near)
        if parts is not None and not any(p in self._names for p in parts):
            names = [self._bind(p, w) for p, w in zip(parts, wanted, strict=True)]
            self._say(f"{', '.join(names)} = {text}")
        return parts is not None

    def _assign(self, node: Node, wanted: str, text: str) -> None:
        self._say(f"{self._bind(node, wanted)} = {text}")

    def _say(self, text: str) -> None:
        self._lines.append(f"{self._indent}{text}")

    def _bind(self, node: Node, wanted: str) -> str:
        name = free_name(wanted, self._taken)
        self._taken.add(name)
        self._names[node] = name
        return name

    # ---- expressions -----------------------------------------------------------------------------

    def _value(self, value: Any) -> str:
        return literal(value, self._named)

    def _named(self, node: Node) -> str:
        if node in self._names:
            return self._names[node]
        if node.op == "get_attr":
            return self._attribute(node)
        assert node in self._inline.nodes, node
        text = self._expression(node)
        return f"({text})" if " " in text.split("(")[0] else text

    def _expression(self, node: Node) -> str:
        target: Any = node.target
        args: list[Any] = [*node.args]
        if node.op == "call_module":
            return f"{self._attribute(node)}({self._arguments(args, node.kwargs)})"
        if node.op == "call_method":
            return self._method(str(target), args, dict(node.kwargs))
        if target in INFIX and len(args) == 2:
            return infix(self._value(args[0]), INFIX[target], self._value(args[1]))
        if target in PREFIX:
            return f"{PREFIX[target]}{self._value(args[0])}"
        if target is operator.getitem:
            return f"{self._value(args[0])}[{index(args[1], self._value)}]"
        if target is getattr:
            return f"{self._value(args[0])}.{args[1]}"
        if isinstance(target, Rebuild):
            return self._built(target.structure, iter(args))
        if isinstance(target, FunctionCall):
            name = target.function.__name__
            self._imports.add(importing(target.function, name))
            return f"{name}.apply({self._arguments(args, {})})"
        if target is call_named:
            module, given, named = args
            return f"{self._value(module)}({self._arguments(list(given), {})}, **{named})"
        return self._function(target, args, dict(node.kwargs))

    def _function(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> str:
        name, needed = function_name(target)
        if needed:
            self._imports.add(needed)
        return f"{name}({self._arguments(args, told(target, kwargs))})"

    def _method(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> str:
        sign = sign_of(name)
        if sign is not None and len(args) == 2:
            left, right = reversed(args) if sign[1] else args
            return infix(self._value(left), sign[0], self._value(right))
        if name == "__invert__":
            return f"~{self._value(args[0])}"
        if name == "neg" and len(args) == 1:
            return f"-{self._value(args[0])}"
        return f"{self._value(args[0])}.{name}({self._arguments(args[1:], kwargs)})"

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        named = [f"{n}={self._value(v)}" for n, v in kwargs.items()]
        return ", ".join([*map(self._value, args), *named])

    def _built(self, structure: Structure, leaves: Any) -> str:
        """A nested output as it is put together again; what is of a library's own class becomes a
        namespace of the same attributes.
        """
        if structure.kind == "leaf":
            return self._value(next(leaves))
        if structure.kind == "constant":
            return literal(structure.payload)
        children = [self._built(c, leaves) for c in structure.children]
        payload: Any = structure.payload
        kind: Any
        kind, context = payload if structure.kind == "node" else (type(payload), None)
        kind = context if kind is collections.namedtuple else kind
        if kind is tuple:
            return f"({', '.join(children)}{',' * (len(children) == 1)})"
        if kind is list:
            return f"[{', '.join(children)}]"
        keys = _keys(structure, context) if not hasattr(kind, "_fields") else []
        if structure.kind == "dataclass":
            self._imports.add(importing(kind, kind.__name__))
            pairs = zip(structure.fields, children, strict=True)
            return f"{kind.__name__}({', '.join(f'{k}={c}' for k, c in pairs)})"
        if fields := getattr(kind, "_fields", None):
            self._imports.add(importing(kind, kind.__name__))
            pairs = zip(fields, children, strict=True)
            return f"{kind.__name__}({', '.join(f'{k}={c}' for k, c in pairs)})"
        if len(keys) != len(children):
            raise DecouplingError(
                f"the model returns a {kind.__name__}, which cannot be written as Python: let it "
                "return tensors, or a tuple, list or dict of them"
            )
        if kind is dict:
            pairs = zip(keys, children, strict=True)
            return "{" + ", ".join(f"{literal(k)}: {c}" for k, c in pairs) + "}"
        self._imports.add("from types import SimpleNamespace")
        pairs = zip(keys, children, strict=True)
        return f"SimpleNamespace({', '.join(f'{k}={c}' for k, c in pairs)})"


def infix(left: str, sign: str, right: str) -> str:
    """An operation as ruff writes it."""
    simple = all(re.fullmatch(r"-?[\w.]+", part) for part in (left, right))
    return f"{left}**{right}" if sign == "**" and simple else f"{left} {sign} {right}"


def _keys(structure: Structure, context: Any) -> list[Any]:
    """Of a mapping or a dataclass."""
    if structure.fields:
        return list(structure.fields)
    while isinstance(context, tuple | list) and context and isinstance(context[0], tuple | list):
        context = context[0]
    return list(context) if isinstance(context, tuple | list) else []


def type_of(node: Any) -> str:
    """The annotation of a value."""
    if not isinstance(node, Node):
        return type(node).__name__ if isinstance(node, bool | int | float | str) else "Any"
    if isinstance(value_of(node), Tensor):
        return "Tensor"
    number = node.op == "call_method" and node.target in ("size", "numel", "dim")
    if number or node.target in (operator.floordiv, operator.mod):
        return "int"
    whole = node.target in (operator.add, operator.sub, operator.mul)
    return "int" if whole and all(type_of(a) == "int" for a in node.args) else "Any"


def base_name(node: Node) -> str:
    """What a value is called, where that is free."""
    if is_same_tensor(node):
        return base_name(node.all_input_nodes[0])
    if node.op == "call_module":
        return word_of(str(node.target))
    if node.op == "placeholder":
        return str(node.target)
    target = node.target
    word = target if isinstance(target, str) else getattr(target, "__name__", "value")
    word = str(word).split(".")[0].strip("_")
    return _WORDS.get(word, word).lower() if not isinstance(target, Rebuild) else "output"


def word_of(path: str) -> str:
    """A module's own name; its number with the name of what holds it."""
    parts = path.split(".")
    return "_".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def is_same_tensor(node: Node) -> bool:
    """Whether a cast gives back what it is given."""
    if node.op != "call_method" or node.target != "to" or len(node.args) != 2 or node.kwargs:
        return False
    before, now = value_of(node.all_input_nodes[0]), value_of(node)
    is_kind = isinstance(node.args[1], torch.dtype | torch.device)
    both = isinstance(before, Tensor) and isinstance(now, Tensor)
    return is_kind and both and (before.dtype, before.device) == (now.dtype, now.device)


def _is_in_place(node: Node) -> bool:
    name = str(node.target)
    ends = name.endswith("_") and not name.endswith("__")
    return node.op == "call_method" and ends and name not in ("requires_grad_",)
