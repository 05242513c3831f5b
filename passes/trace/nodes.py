"""fx plumbing that several passes use."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

import torch
from torch import fx
from torch.fx import Graph as Graph  # for who reads graphs
from torch.fx import Node as Node

from .calls import call_named


def identifier(name: str) -> str:
    """A value's name as a Python name: dots, slashes and the like become underscores."""
    text = re.sub(r"[^0-9a-zA-Z_]", "_", name)
    return text if is_plain_name(text) else f"_{text}"


def is_plain_name(text: str) -> bool:
    """Whether generated code can hold a name as it is: Python folds letters beyond ASCII."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def safe_targets(paths: Iterable[str]) -> dict[str, str]:
    """Where a graph module keeps what the model has at some paths, so that generated code can name
    it: keywords, quotes and the like in the model's names are replaced, and so are names of the
    graph module's own attributes (``code``, ``graph``, ...).

    Returns:
        A target for every path; different ones for different paths.
    """
    found: dict[str, str] = {}
    parts: dict[tuple[str, str], str] = {}  # by the target of what holds it
    taken: set[str] = set()
    for path in paths:
        target = ""
        for part in path.split("."):
            if (target, part) not in parts:
                parts[target, part] = _free_target(target, part, taken)
            target = parts[target, part]
        found[path] = target
    return found


def _free_target(holder: str, part: str, taken: set[str]) -> str:
    quoted = not part.isidentifier() and part.isprintable() and not set(part) & {'"', "\\"}
    plain = part if quoted else identifier(part)  # fx writes getattr(holder, "0")
    if not holder and hasattr(fx.GraphModule, plain):
        plain = f"model_{plain}"
    target = f"{holder}.{plain}".lstrip(".")
    while target in taken:
        target += "_"
    taken.add(target)
    return target


def with_named(call: fx.Node) -> fx.Node:
    """The call of a module where names of arguments are none in Python (``model(**batch)``)."""
    module = call.graph.get_attr(str(call.target))
    named = call.graph.call_function(call_named, (module, call.args, call.kwargs))
    call.graph.erase_node(call)
    return named


def targets_of(own: Iterable[fx.Node], needed: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Where a stage keeps the modules that it calls and the attributes that it reads."""
    called = {str(n.target) for n in own if n.op == "call_module"}
    found = {n: str(n.target) for n in needed if n.op == "call_module"}
    for node in needed:
        if node.op == "get_attr":
            found[node] = _attribute_path(str(node.target), called)
    safe = safe_targets(found.values())
    return {node: safe[path] for node, path in found.items()}


def _attribute_path(target: str, called: set[str]) -> str:
    """An attribute's own path, unless a module that the stage calls lies in the way."""
    parts = target.split(".")
    if any(".".join(parts[:i]) in called for i in range(1, len(parts))):
        return "_" + target.replace(".", "_")
    return target


def needs_gradient(node: fx.Node) -> bool:
    """Whether a value lies on a trainable path."""
    value = node.meta.get("value")
    return isinstance(value, torch.Tensor) and value.requires_grad
