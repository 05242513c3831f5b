"""What the nodes of a graph call, by the names that Python code has for it."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import DecouplingError
from ..passes.trace.calls import Fill, ReadAttribute, StoreAttribute

_SPACES = {
    "F": F, "torch": torch, "torch.linalg": torch.linalg, "torch.special": torch.special,
    "torch.fft": torch.fft, "torch.Tensor": torch.Tensor, "math": math,
}  # fmt: skip
INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.matmul: "@",
    operator.and_: "&", operator.or_: "|", operator.xor: "^", operator.eq: "==",
    operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.lshift: "<<", operator.rshift: ">>", operator.is_: "is", operator.is_not: "is not",
}  # fmt: skip
PREFIX = {operator.neg: "-", operator.invert: "~", operator.pos: "+", operator.not_: "not "}
_DUNDER = {
    "__and__": "&", "__or__": "|", "__xor__": "^", "__eq__": "==", "__ne__": "!=", "__lt__": "<",
    "__le__": "<=", "__gt__": ">", "__ge__": ">=", "__matmul__": "@", "__floordiv__": "//",
    "__mod__": "%", "__pow__": "**", "__add__": "+", "__sub__": "-", "__mul__": "*",
    "__truediv__": "/",
}  # fmt: skip
_REFLECTED = {f"__r{name[2:]}": sign for name, sign in _DUNDER.items()}


def sign_of(method: str) -> tuple[str, bool] | None:
    """The operator that a method is, and whether its arguments change places."""
    if method in _DUNDER:
        return _DUNDER[method], False
    return (_REFLECTED[method], True) if method in _REFLECTED else None


def function_name(function: Callable[..., Any]) -> tuple[str, str]:
    """What a function is called in code, and the import that it needs besides those of torch.

    Raises:
        DecouplingError: a function that cannot be imported by name, or is one of this library.
    """
    if isinstance(function, ReadAttribute | StoreAttribute | Fill):
        raise DecouplingError(
            "the model keeps a tensor from call to call "
            f"({function.__name__.replace('_', ' ', 1)}), which no file does: make it a buffer"
        )
    name = getattr(function, "__name__", "")
    for space, holder in _SPACES.items():
        if name and getattr(holder, name, None) is function:
            return f"{space}.{name}", ""
    if getattr(builtins, name, None) is function:
        return name, ""
    if isinstance(function, torch._ops.OpOverload):
        return f"torch.ops.{function}", ""
    if getattr(operator, name, None) is function:
        return f"operator.{name}", "import operator"
    return name, importing(function, name)


def importing(thing: Any, name: str) -> str:
    """The import of a function or class of the user's.

    Raises:
        DecouplingError: it cannot be imported by that name.
    """
    module = str(getattr(thing, "__module__", None))
    known = getattr(sys.modules.get(module), name, None) is thing
    if not known or module.split(".")[0] in ("dni_fx", "__main__"):
        raise DecouplingError(
            f"the program calls {name or thing!r} of {module!r}, which a folder of files cannot "
            "import: define it at the top of a module that can be imported, other than the script "
            "itself"
        )
    return f"from {module} import {name}"


def told(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The named arguments that are not what the function takes anyway."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(kwargs)
    return {n: v for n, v in kwargs.items() if n not in known or not _is_same(known[n].default, v)}


def _is_same(default: Any, value: Any) -> bool:
    return default is value or (type(default) is type(value) and default == value)
