"""What recorded nodes call besides torch itself, and the watch on the operators below a node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import PlanMismatchError, TracingError
from .contents import Contents
from .places import Step
from .values import OperatorMode

# what they do to gradients is in no node's backward
GRADIENT_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "grad_fn"}
# these give back what was saved: the numbers are the same without them
_FAITHFUL = ("torch.utils.checkpoint", "torch.autograd.graph")


class FunctionCall:
    """A custom ``autograd.Function`` as one node, so that its own backward is kept."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"{function.__name__}_apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)


def setitem(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``tensor[index] = value``; returns the tensor, so that later uses depend on the write."""
    tensor[index] = value
    return tensor


class _Attribute:
    """Something done with one attribute of one module, or with a part of it, some steps away."""

    verb = ""

    def __init__(self, module: nn.Module, name: str, *steps: Step) -> None:
        self.module, self.name = module, name
        *self._within, self._step = Step("attribute", name), *steps
        keys = (name, *(step.key for step in steps))
        words = [key for key in keys if isinstance(key, str) and key.isidentifier()]
        self.__name__ = self.__qualname__ = "_".join([self.verb, *words])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Attribute) or type(self) is not type(other):
            return False
        same = self._within == other._within and self._step == other._step
        return same and self.module is other.module

    def __hash__(self) -> int:
        return hash((self.verb, id(self.module), self.name))

    @property
    def _holder(self) -> Any:
        holder: Any = self.module
        for step in self._within:
            holder = step.of(holder)
        return holder

    def is_of(self, module: nn.Module, name: str) -> bool:
        """Whether it is this attribute."""
        return self.module is module and self.name == name


class ReadAttribute(_Attribute):
    """A tensor that a module keeps as a plain attribute, as it is in the call at hand."""

    verb = "read"

    def __call__(self) -> torch.Tensor:
        tensor: torch.Tensor = self._step.of(self._holder)
        return tensor


class StoreAttribute(_Attribute):
    """``self.name = value`` in the model's ``forward``."""

    verb = "store"

    def __call__(self, value: Any) -> None:
        self._step.write(self._holder, value)


class DropAttribute(_Attribute):
    """``del self.name`` in the model's ``forward``."""

    verb = "drop"

    def __call__(self) -> None:
        self._step.drop(self._holder)


class Fill:
    """What the model's ``forward`` leaves in a place outside of its modules that held nothing."""

    def __init__(self, kept: Contents, place: Any, value: Any) -> None:
        self._kept, self._place, self._value = kept, place, value
        self.__name__ = self.__qualname__ = "fill"

    def __call__(self) -> None:
        self._kept.put(self._place, self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fill):
            return False
        same = self._kept.owner is other._kept.owner and self._place == other._place
        return same and self._value is other._value

    def __hash__(self) -> int:
        return hash(id(self._kept.owner))


def after(tensor: torch.Tensor, write: Any) -> torch.Tensor:
    """The tensor, once a write through another view of its memory has happened."""
    return tensor


_INDEXING = frozenset(
    {torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor}
)  # their results are as large as the indices, but for masks


def _has_mask(indices: Any) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


def call_named(function: Any, args: Any, kwargs: Any) -> Any:
    """A call whose named arguments generated code could not write down."""
    return function(*args, **kwargs)


def check_saving() -> None:
    """Refuse hooks of the model's own on what is saved for the backward: no node has them.

    Raises:
        TracingError: there are some.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith(_FAITHFUL):
        raise TracingError("the model saves tensors through hooks of its own (saved_tensors_hooks)")


def counted(container: Any, count: int, callee: str) -> None:
    """The code around a callee has used what it returned one by one, and so often.

    Raises:
        PlanMismatchError: it now returns more or fewer.
    """
    if len(container) != count:
        raise PlanMismatchError(
            f"{callee} returns {len(container)} values here, but {count} in the example, and the "
            "code around it uses them one by one: move that code into the module that makes them, "
            "or set is_graph_leaf = True on the smallest module around both, which then stays one "
            "node"
        )


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions check their arguments' values by default; nothing else of them needs values."""
    kind = torch.distributions.Distribution
    checks = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(checks)


class Observer(OperatorMode):
    """Notes what the operators below one node do.

    Attributes:
        random: whether one drew random numbers.
        by_value: whether the shape of a result depends on the values of the operands.
        parameters: identities of the parameters that were read.
        tensors: what was read, by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random = self.by_value = False
        self.parameters: dict[int, None] = {}
        self.tensors: dict[int, torch.Tensor] = {}

    def reset(self) -> None:
        """Before another node."""
        self.random = self.by_value = False
        self.parameters, self.tensors = {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            self.random = True
        if torch.Tag.dynamic_output_shape in func.tags:
            self.by_value |= func not in _INDEXING or _has_mask(args[1])
        if func is torch.ops.aten._local_scalar_dense.default:
            self.by_value = True
        for arg in args:
            if isinstance(arg, torch.Tensor):
                self.tensors[id(arg)] = arg
                if isinstance(arg, nn.Parameter):
                    self.parameters[id(arg)] = None
        return func(*args, **(kwargs or {}))
