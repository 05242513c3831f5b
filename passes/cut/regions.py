"""Stretches of a stage that run with or without gradients, or under autocast, as recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_NO_GRAD, _GRAD = ("no_grad",), ("grad",)

Opened = tuple[tuple[Any, ...], fx.Node]  # a region's state, and what closes it


def enter_regions(graph: fx.Graph, opened: list[Opened], node: fx.Node | None) -> None:
    """Close and open regions so that a recorded node can be added to a stage's graph next.

    Args:
        graph: the stage's graph.
        opened: what is open, outermost first; is changed.
        node: as it was recorded; None closes all.
    """
    meta = {} if node is None else node.meta
    modes = [_NO_GRAD] if meta.get("no_grad") else [_GRAD] if meta.get("grad") else []
    wanted = [*meta.get("autocast", ()), *modes]
    shared = 0
    while shared < min(len(wanted), len(opened)) and wanted[shared] == opened[shared][0]:
        shared += 1
    while len(opened) > shared:
        state, entered = opened.pop()
        if state in (_NO_GRAD, _GRAD):  # whatever it was outside: evaluation may itself run without
            graph.call_function(torch._C._set_grad_enabled, (entered,))
        else:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    for state in wanted[shared:]:
        if state in (_NO_GRAD, _GRAD):
            entered = graph.call_function(torch.is_grad_enabled)
            graph.call_function(torch._C._set_grad_enabled, (state == _GRAD,))
        else:
            entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, state)
        opened.append((state, entered))
