"""Names of the tensors in nested inputs, of modules in errors, and inputs whose tensors cannot be
seen.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from ...errors import BakedInError
from ...graphs.nested import flatten
from ...graphs.pictures import content, slots_of

_DEPTH, _MOST = 6, 1000
_NO_DATA = (nn.Module, type, FunctionType, ModuleType, torch.Generator)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def input_names(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for every tensor among the inputs: the parameter's, with keys and indices where it is
    nested.
    """
    names: list[str] = []
    for name, value in argument_names(model, args, kwargs).items():
        count = len(flatten(value)[0])
        if count == 1 and isinstance(value, torch.Tensor):
            names.append(name)
        else:
            names.extend(f"{name}_{key}" for key in leaf_keys(value))
    result: list[str] = []
    for name in names:
        name = re.sub(r"\W", "_", name)
        while name in result:
            name += "_"
        result.append(name)
    return result


def argument_names(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that ``forward`` gives them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    named = {
        positional[i] if i < len(positional) else f"{rest}_{i - len(positional)}": v
        for i, v in enumerate(args)
    }
    return named | kwargs


def leaf_keys(value: Any) -> list[str]:
    """A name for every tensor of a nested value: keys and indices, joined by ``_``."""
    if isinstance(value, torch.Tensor):
        return [""]
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [str(i) for i in range(len(flatten(value)[0]))]
    return [f"{k}_{rest}".strip("_") for k, v in items for rest in leaf_keys(v)]


def where_is(model: nn.Module, path: str) -> str:
    """A submodule with its class and where its code stands."""
    module = model.get_submodule(path)
    name = repr(path) if path else "the top level"
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    line = f", {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{name} ({type(module).__name__}{line})"


def check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that hold tensors out of sight: their values would be baked in.

    Raises:
        BakedInError: names the argument, its class, and where in it a tensor is.
    """
    for name, value in argument_names(model, args, kwargs).items():
        for part in flatten(value)[1].constants():
            where = hidden_tensor(part)
            if where is not None:
                kind = type(part).__name__
                raise BakedInError(
                    f"argument {name!r} of {type(model).__name__} is or holds a {kind}, whose "
                    f"tensors cannot be seen (one is {where}): pass them as tensors, in a tuple, "
                    "a dict or a dataclass, or register the class with torch.utils._pytree"
                )


def hidden_tensor(value: Any) -> str | None:
    """Where an object holds a tensor, within a few steps of attributes and containers."""
    return next((place for place, _ in hidden_tensors(value)), None)


def hidden_tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that an object holds, within a few steps, and where.

    Modules, classes and functions are not looked into: they are no data.
    """
    pending, seen = [("", value, 0)], {id(value)}
    for place, item, depth in pending:
        if isinstance(item, torch.Tensor):
            yield place, item
            continue
        if depth == _DEPTH or len(pending) > _MOST or isinstance(item, _NO_DATA):
            continue
        for key, part in _parts(item):
            if id(part) not in seen and not isinstance(part, _SCALARS):
                seen.add(id(part))
                pending.append((place + key, part, depth + 1))


def _parts(item: Any) -> list[tuple[str, Any]]:
    """Members of a container, or attributes of an object."""
    if isinstance(item, Mapping):
        return [(f"[{k!r}]", item[k]) for k in item]
    if isinstance(item, list | tuple | set | frozenset):
        return [(f"[{i}]", v) for i, v in enumerate(item)]
    kept = {s.__name__: content(item, s, None) for s in slots_of(type(item))}
    kept.update(getattr(item, "__dict__", {}))
    return [(f".{name}", part) for name, part in kept.items()]
