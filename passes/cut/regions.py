"""Stretches of a stage that run without gradients or under autocast, as they were recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class Regions:
    """Puts no_grad and autocast regions around the nodes that were recorded inside them.

    Args:
        graph: the stage's graph, to which nodes are then added in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.outside: fx.Node | None = None
        self.autocasts: list[tuple[tuple[Any, ...], fx.Node]] = []

    def enter(self, node: fx.Node) -> None:
        """Open and close regions so that a recorded node can be added next."""
        wanted = tuple(node.meta.get("autocast", ()))
        open_ = tuple(state for state, _ in self.autocasts)
        shared = 0
        while shared < min(len(wanted), len(open_)) and wanted[shared] == open_[shared]:
            shared += 1
        self._leave_autocasts(shared)
        for state in wanted[shared:]:
            entered = self.graph.call_function(torch.amp.autocast_mode._enter_autocast, state)
            self.autocasts.append((state, entered))
        if bool(node.meta.get("no_grad")) != (self.outside is not None):
            self._switch_gradients()

    def leave(self) -> None:
        """Close whatever is open."""
        self._leave_autocasts(0)
        if self.outside is not None:
            self._switch_gradients()

    def _switch_gradients(self) -> None:
        if self.outside is None:
            self.outside = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(torch._C._set_grad_enabled, (False,))
        else:  # whatever it was outside: evaluation may itself run without gradients
            self.graph.call_function(torch._C._set_grad_enabled, (self.outside,))
            self.outside = None

    def _leave_autocasts(self, keep: int) -> None:
        while len(self.autocasts) > keep:
            _, entered = self.autocasts.pop()
            self.graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
