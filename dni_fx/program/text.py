"""Values as Python text, and text as lines that ruff would leave as they are."""

from __future__ import annotations

import builtins
import keyword
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import DecouplingError
from ..passes.trace.nodes import Node

WIDTH = 100
_CONSTANTS = torch.dtype | torch.layout | torch.memory_format
_TAKEN = {*keyword.kwlist, *dir(builtins), "self", "torch", "nn", "F", "Tensor", "math", "Any"}
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def literal(value: Any, name: Callable[[Node], str] | None = None) -> str:
    """A value as an expression.

    Args:
        value: what a node of a graph may have as an argument.
        name: what a node in it is called.

    Raises:
        DecouplingError: a value that has no text.
    """
    if isinstance(value, Node):
        assert name is not None
        return name(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if value is Ellipsis:
        return "..."
    if isinstance(value, _CONSTANTS):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({quoted(str(value))})"
    if isinstance(value, slice):
        return (
            f"slice({', '.join(literal(v, name) for v in (value.start, value.stop, value.step))})"
        )
    if isinstance(value, range):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(literal(v, name) for v in value)}]"
    if isinstance(value, dict):
        pairs = (f"{literal(k)}: {literal(v, name)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if type(value) in (tuple, torch.Size):
        inside = ", ".join(literal(v, name) for v in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    raise DecouplingError(
        f"the program has a {type(value).__name__} in it, which cannot be written as Python: keep "
        "what is no tensor, number, text or plain container out of the calls of torch's functions"
    )


def index(value: Any, name: Callable[[Node], str]) -> str:
    """What stands between the brackets of ``tensor[...]``."""
    if isinstance(value, slice):
        start, stop, step = ("" if v is None else literal(v, name) for v in _ends(value))
        if all(re.fullmatch(r"-?\w*", part) for part in (start, stop, step)):
            return f"{start}:{stop}" + (f":{step}" if step else "")
        return f"{start} : {stop}".strip() + (f" : {step}" if step else "")
    if isinstance(value, tuple) and value:
        return ", ".join(index(v, name) for v in value) + ("," if len(value) == 1 else "")
    return literal(value, name)


def _ends(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def quoted(text: str) -> str:
    """A string as ruff writes it."""
    found = repr(text)
    return f'"{found[1:-1]}"' if found[0] == "'" and '"' not in text else found


def free_name(wanted: str, taken: Iterable[str]) -> str:
    """A name that is none of Python's own and none that is taken, as near as can be."""
    word = re.sub(r"\W", "_", wanted).strip("_") or "value"
    word = f"_{word}" if word[0].isdigit() else word
    known = {*taken} | _TAKEN
    if word in _TAKEN:
        word = f"{word}_"
    found, count = word, 1
    while found in known:
        found, count = f"{word.rstrip('_')}_{count}", count + 1
    return found


def docstring(text: str, indent: str = "    ") -> list[str]:
    """Lines of a docstring: one sentence, wrapped where it is long."""
    whole = f'{indent}"""{text}"""'
    if len(whole) <= WIDTH:
        return [whole]
    lines = textwrap.wrap(text, WIDTH - len(indent) - 6, break_long_words=False)
    return [f'{indent}"""{lines[0]}', *(indent + line for line in lines[1:]), f'{indent}"""']


def wrapped(lines: Iterable[str]) -> str:
    """Statements, one a line, each broken where it is too long."""
    return "\n".join(part for line in lines for part in _broken(line)) + "\n"


def _broken(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    first = line.lstrip().startswith("def ")
    pair = _brackets(line, first)
    if pair is None:
        head, _, rest = line.lstrip().partition(" ")
        if head != "return" or "," not in rest:
            return [line]
        parts = [f"{indent}    {part}," for part in _parts(rest)]
        return [f"{indent}return (", *parts, f"{indent})"]
    start, end = pair
    head, body, tail = line[: start + 1], line[start + 1 : end], indent + line[end:]
    inside = f"{indent}    {body}"
    if len(inside) <= WIDTH and not body.endswith(","):
        return [head, inside, tail]
    parts = _parts(body)
    if len(parts) == 1 and not body.rstrip().endswith(","):
        return [head, *_broken(inside), tail]
    return [head, *(p for part in parts for p in _broken(f"{indent}    {part},")), tail]


def _brackets(line: str, first: bool) -> tuple[int, int] | None:
    """The outermost brackets of a statement that its lines are broken in: the last, or the first
    ones.
    """
    found: list[tuple[int, int]] = []
    opened: list[int] = []
    for place, char in _outside_strings(line):
        if char in _PAIRS:
            opened.append(place)
        elif char in _PAIRS.values():
            start = opened.pop()
            if not opened and place > start + 1:
                found.append((start, place))
    if not found:
        return None
    return found[0] if first else found[-1]


def _parts(body: str) -> list[str]:
    """What stands between commas, none of which is within brackets."""
    parts, depth, last = [], 0, 0
    for place, char in _outside_strings(body):
        depth += (char in _PAIRS) - (char in _PAIRS.values())
        if char == "," and depth == 0:
            parts.append(body[last:place].strip())
            last = place + 1
    return [p for p in [*parts, body[last:].strip()] if p]


def _outside_strings(text: str) -> Iterable[tuple[int, str]]:
    quote = ""
    for place, char in enumerate(text):
        if quote:
            escaped = text[place - 1] == "\\" and text[place - 2] != "\\"
            quote = "" if char == quote and not escaped else quote
        elif char in "\"'":
            quote = char
        else:
            yield place, char
