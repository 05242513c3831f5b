"""Integers that remember where they came from, so that sizes stay dynamic in a traced graph.

A ``TracedInt`` is what ``x.shape[0]`` returns while a model is traced. Arithmetic on it gives
another one; handing it to a torch function makes it an argument of the recorded node. Wherever
Python needs its plain value (``if``, ``range``, ``math.sqrt``) the value is handed out and a guard
is recorded: the graph then holds for that value only. It is a ``torch.SymInt``, because torch's
argument parsers and ``torch.Size`` accept those in place of integers.

What could become a key of a cache is different: ``hash(n)``, ``int(n)``, ``str(n)``, ``f"{n}"``. A
cache that took a traced integer, or kept what was computed from it under a key made of it, would
hand it to the user's own next call. So these refuse, as those of torch's own ``SymInt`` do: code
that knows symbolic sizes takes its uncached path (einops does), and for all other code the trace
begins again with that size as a plain integer, and a guard, from its birth on.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...errors import DataDependentError
from .prefixes import is_by_value, obstacle

_MOST_PLAIN = 16

Size = tuple[int | str, int]  # a dimension, or "numel", and how large it is in the example


class SizeWanted(TypeError):
    """A traced integer was to become a key or a string, which needs a plain one.

    Attributes:
        sizes: those that it was computed from.
    """

    def __init__(self, sizes: frozenset[Size]) -> None:
        super().__init__("unhashable type: a size of a tensor while its model is traced")
        self.sizes = sizes


def sizes_wanted(error: BaseException | None) -> frozenset[Size]:
    """The sizes that an error, or one that it was raised from or beside, asks for."""
    while error is not None:
        if isinstance(error, SizeWanted):
            return error.sizes
        error = error.__cause__ or error.__context__
    return frozenset()


class Looks:
    """What the code of a model has looked at in one recording.

    Args:
        plain: sizes to hand out as plain integers from the start.

    Attributes:
        guards: nodes with the value that they must have for the graph to hold.
        over: whether the recording has ended; nothing is noted then.
    """

    def __init__(self, plain: frozenset[Size]) -> None:
        self._plain = plain
        self.guards: dict[fx.Node, Any] = {}
        self.over = False

    def wants_plain(self, size: Size) -> bool:
        """Whether this size is to be a plain integer; all are once too many were asked for."""
        return size in self._plain or len(self._plain) > _MOST_PLAIN

    def guard(self, node: fx.Node, value: Any) -> None:
        """The graph holds only where the node has this value.

        Raises:
            DataDependentError: which only a run of the model could tell.
        """
        if self.over or node in self.guards:
            return
        if is_by_value(node) and (why := obstacle(node)) is not None:
            raise DataDependentError(
                f"the model's control flow depends on a value that is computed ('{why.name}'), "
                "not only on its inputs"
            )
        self.guards[node] = value


class _PlainValue:
    """What C++ sees of a traced integer: its value, with a guard."""

    def __init__(self, owner: TracedInt) -> None:
        self.owner = owner

    def guard_int(self, file: str = "", line: int = 0) -> int:
        return self.owner.look()

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
    """An integer with its example value and, made when first needed, the node that computes it.

    Args:
        value: in the example.
        make: adds the node to the graph.
        looks: of the recording.
        sizes: that it is computed from.
    """

    def __init__(
        self, value: int, make: Callable[[], fx.Node], looks: Looks, sizes: frozenset[Size]
    ) -> None:
        super().__init__(_PlainValue(self))
        self.value = int(value)
        self.looks = looks
        self.sizes = sizes
        self._make = make
        self._node: fx.Node | None = None

    def as_node(self) -> fx.Node:
        """The node that computes this integer."""
        if self._node is None:
            self._node = self._make()
        return self._node

    def look(self, *_: Any) -> int:
        """The plain value, with a guard."""
        if not self.looks.over:
            self.looks.guard(self.as_node(), self.value)
        return self.value

    __index__ = __trunc__ = __floor__ = __ceil__ = look

    def __bool__(self) -> bool:
        return bool(self.look())

    def __float__(self) -> float:
        return float(self.look())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For functions of NumPy."""
        return sys.modules["numpy"].asarray(self.look(), dtype)

    def __round__(self, digits: int | None = None) -> int:
        return round(self.look(), digits) if digits else self.look()

    def __hash__(self) -> int:
        raise SizeWanted(self.sizes)

    def __int__(self) -> int:
        if self.looks.over:
            return self.value
        raise SizeWanted(self.sizes)

    def __repr__(self) -> str:
        return str(int(self))

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

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
            return op(*(v.look() if isinstance(v, TracedInt) else v for v in (left, right)))
        if not isinstance(left, int | TracedInt) or not isinstance(right, int | TracedInt):
            return NotImplemented

        def make() -> fx.Node:
            arguments = tuple(a.as_node() if isinstance(a, TracedInt) else a for a in (left, right))
            graph = origin.as_node().graph
            return graph.call_function(op, arguments)

        sizes = [v.sizes for v in (left, right) if isinstance(v, TracedInt)]
        value = op(plain(left), plain(right))
        return TracedInt(value, make, origin.looks, frozenset().union(*sizes))

    return (lambda self, other: derive(self, other, self)), (
        lambda self, other: derive(other, self, self)
    )


def _guarded(op: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def left(self: TracedInt, other: Any) -> Any:
        return op(self.look(), other.look() if isinstance(other, TracedInt) else other)

    def right(self: TracedInt, other: Any) -> Any:
        return op(other, self.look())

    return left, right


def _guarded_alone(op: Callable[[int], int]) -> Callable[[TracedInt], int]:
    return lambda self: op(self.look())


def _compared(op: Callable[[Any, Any], bool]) -> Callable[[TracedInt, Any], Any]:
    def compare(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int | float | TracedInt):
            return NotImplemented
        answer = bool(op(self.value, plain(other)))
        if not self.looks.over:
            arguments = (self.as_node(), other.as_node() if isinstance(other, TracedInt) else other)
            self.looks.guard(self.as_node().graph.call_function(op, arguments), answer)
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
