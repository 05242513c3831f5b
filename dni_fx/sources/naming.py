"""Names of sources, with options or without, as text that a plan's JSON and a shell can hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import DecouplingError, did_you_mean

JOINT = "joint:"
EACH = "each:"


def base_name(text: str) -> str:
    """The name alone: ``"linear"`` of ``"each:linear(rank=16)"``."""
    return text.removeprefix(JOINT).removeprefix(EACH).partition("(")[0]


def with_options(name: str, **options: Any) -> str:
    """A name as text: ``linear(rank=16)``."""
    inner = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inner})" if inner else name


def named_factory(text: str, known: Mapping[str, Any], what: str) -> Any:
    """What is known by a name, with the options that are written after it.

    Args:
        text: such as ``"linear"`` or ``"linear(rank=16)"``; the values are Python's numbers, texts,
            True, False and None.
        known: classes by name.
        what: what errors call it.

    Raises:
        DecouplingError: an unknown name or option; text that is no name with options.
    """
    name, bracket, _ = text.partition("(")
    if name not in known:
        raise DecouplingError(
            f"unknown {what} {text!r}{did_you_mean(name, known) or '.'} Known: "
            f"{', '.join(map(repr, known))}, or a factory"
        )
    if not bracket:
        return known[name]
    options = _options(text, what)
    parameters = inspect.signature(known[name]).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in options:
        if key not in accepted and not takes_any:
            has = ", ".join(accepted) or "none"
            raise DecouplingError(
                f"{what} {text!r}: {name!r} has no option {key!r}"
                f"{did_you_mean(key, accepted) or '.'} It has: {has}"
            )
    return partial(known[name], **options)


def _options(text: str, what: str) -> dict[str, Any]:
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            pairs = [(k.arg, ast.literal_eval(k.value)) for k in call.keywords]
            options = {key: value for key, value in pairs if key is not None}
            if len(options) == len(pairs):
                return options
    except (SyntaxError, ValueError):
        pass
    raise DecouplingError(
        f"{what} {text!r}: options are written as in Python, such as 'linear(rank=16)'; pass "
        "functools.partial of the class for others"
    )
