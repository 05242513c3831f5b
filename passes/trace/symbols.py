"""Integers that remember where they came from, so that sizes stay dynamic in a traced graph.

A ``TracedInt`` is what ``x.shape[0]`` returns while a model is traced. Arithmetic on it gives
another one; handing it to a torch function makes it an argument of the recorded node. Wherever
Python needs its plain value (``if``, ``range``, ``math.sqrt``, a dictionary key) the value is
handed out and a guard is recorded: the graph then holds for that value only. It is a
``torch.SymInt``, because torch's argument parsers and ``torch.Size`` accept those in place of
integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class _PlainValue:
    """What C++ sees of a traced integer: its value, with a guard."""

    def __init__(self, owner: TracedInt) -> None:
        self.owner = owner

    def guard_int(self, file: str = "", line: int = 0) -> int:
        return int(self.owner)

    maybe_as_int = int_ = guard_int

    def is_int(self) -> bool:
        return True

    def is_symbolic(self) -> bool:
        return True

    def has_hint(self) -> bool:
        return True

    def _no(self, *_: Any) -> bool:
        return False

    is_float = is_bool = is_constant = is_nested_int = _no

    def str(self) -> str:
        return repr(self.owner)

    _graph_repr = str


class TracedInt(torch.SymInt):
    """An integer with its example value and, made when first needed, the node that computes it."""

    def __init__(
        self, value: int, make: Callable[[], fx.Node], guard: Callable[[fx.Node, int], None]
    ) -> None:
        super().__init__(_PlainValue(self))
        self.value = int(value)
        self._make = make
        self._guard = guard
        self._node: fx.Node | None = None

    def as_node(self) -> fx.Node:
        """The node that computes this integer."""
        if self._node is None:
            self._node = self._make()
        return self._node

    def _plain(self, *_: Any) -> int:
        self._guard(self.as_node(), self.value)
        return self.value

    __int__ = __index__ = __trunc__ = __floor__ = __ceil__ = _plain

    def __bool__(self) -> bool:
        return bool(self._plain())

    def __float__(self) -> float:
        return float(self._plain())

    def __hash__(self) -> int:
        return hash(self._plain())

    def __round__(self, digits: int | None = None) -> int:
        return round(self._plain(), digits) if digits else self._plain()

    def __repr__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __pos__(self) -> TracedInt:
        return self


def plain(value: Any) -> Any:
    """The example value of a traced integer, without a guard; anything else as it is."""
    return value.value if isinstance(value, TracedInt) else value


def _traced(op: Callable[..., int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def derive(left: Any, right: Any, origin: TracedInt) -> Any:
        if isinstance(left, float) or isinstance(right, float):
            return op(*(v._plain() if isinstance(v, TracedInt) else v for v in (left, right)))
        if not isinstance(left, int | TracedInt) or not isinstance(right, int | TracedInt):
            return NotImplemented

        def make() -> fx.Node:
            arguments = tuple(a.as_node() if isinstance(a, TracedInt) else a for a in (left, right))
            graph = origin.as_node().graph
            return graph.call_function(op, arguments)

        return TracedInt(op(plain(left), plain(right)), make, origin._guard)

    return (lambda self, other: derive(self, other, self)), (
        lambda self, other: derive(other, self, self)
    )


def _guarded(op: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def left(self: TracedInt, other: Any) -> Any:
        return op(self._plain(), int(other) if isinstance(other, TracedInt) else other)

    def right(self: TracedInt, other: Any) -> Any:
        return op(other, self._plain())

    return left, right


def _guarded_alone(op: Callable[[int], int]) -> Callable[[TracedInt], int]:
    return lambda self: op(self._plain())


def _compared(op: Callable[[Any, Any], bool]) -> Callable[[TracedInt, Any], Any]:
    def compare(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int | float | TracedInt):
            return NotImplemented
        answer = bool(op(self.value, plain(other)))
        arguments = (self.as_node(), other.as_node() if isinstance(other, TracedInt) else other)
        self._guard(self.as_node().graph.call_function(op, arguments), answer)
        return answer

    return compare


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _left, _right = _traced(getattr(operator, _name))
    setattr(TracedInt, f"__{_name}__", _left)
    setattr(TracedInt, f"__r{_name}__", _right)
for _name in ("truediv", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    _left, _right = _guarded(getattr(operator, _name))
    setattr(TracedInt, f"__{_name.rstrip('_')}__", _left)
    setattr(TracedInt, f"__r{_name.rstrip('_')}__", _right)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _compared(getattr(operator, _name)))
for _name in ("neg", "abs", "invert"):
    setattr(TracedInt, f"__{_name}__", _guarded_alone(getattr(operator, _name)))
