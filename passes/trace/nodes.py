"""fx plumbing that several passes use."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

from torch import fx

from .prefixes import call_node
from .traces import Trace


def identifier(name: str) -> str:
    """A value's name as a Python name: dots and slashes become underscores."""
    text = "".join(c if c.isalnum() else "_" for c in name)
    return f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text


def run_node(trace: Trace, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Call what a recorded node calls, on the values of the nodes that it uses."""
    return call_node(trace.attributes, node, values)
