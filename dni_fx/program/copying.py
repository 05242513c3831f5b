"""Definitions of this library as text for a program folder, with all that they use."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from types import ModuleType

from . import kit


def copied(names: Iterable[str]) -> list[str]:
    """The definitions of ``kit`` by these names, and what they use of this library, in order of
    use: constants first, then functions and classes.
    """
    found: dict[str, tuple[bool, str]] = {}
    for name in names:
        _collect(kit, name, found)
    constants = [text for is_constant, text in found.values() if is_constant]
    rest = [text for is_constant, text in found.values() if not is_constant]
    return [*constants, *rest]


def _collect(module: ModuleType, name: str, found: dict[str, tuple[bool, str]]) -> None:
    """A definition's text, below those that it uses."""
    if name in found:
        return
    value = vars(module)[name]
    home = sys.modules.get(getattr(value, "__module__", "") or "", module)
    source = inspect.getsource(home)
    for statement in ast.parse(source).body:
        if name in _defined(statement):
            break
    else:
        return
    lines = source.splitlines()
    first = (
        min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]) - 1
    )
    while first and lines[first - 1].startswith("#"):
        first -= 1
    text = textwrap.dedent("\n".join(lines[first : statement.end_lineno]))
    is_constant = isinstance(statement, ast.Assign)
    used = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)} - {name}
    for other in sorted(used, key=lambda word: text.find(word)):
        if other in vars(home) and _is_ours(home, other):
            _collect(home, other, found)
    found[name] = (is_constant, re.sub(r":data:`(\w+)`", r"``\1``", text))


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _is_ours(module: ModuleType, name: str) -> bool:
    value = vars(module)[name]
    home = getattr(value, "__module__", None)
    if home is None:  # a constant: of the module itself
        return not isinstance(value, ModuleType)
    return str(home).startswith("dni_fx.")
