"""Names of the tensors in nested inputs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from ...graphs.nested import flatten


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
