"""Which modules a recording is in and has been through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ...errors import BakedInError, TracingError
from .provenance import Provenance
from .state import MODULE_INTERNALS, python_draws

# nn modules that are only sequences of others: looked into, so that cuts can fall between their
# layers
_TRANSPARENT = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_MISSING = object()


class Visits:
    """The modules of one recording.

    Args:
        known: the graph, and the nodes of tensors.
        opaque: paths of modules to keep as single nodes.

    Attributes:
        stack: paths of the modules that the recording is in, outermost first.
        visited: modules whose ``training`` flag is baked into the graph, by path.
        calls: module path, output node and last node made in it, in order of return.
        failed_at: path of the innermost module that failed.
        failed_leaf: whether that one was called as a whole.
        notes: remarks for the plan.
    """

    def __init__(self, known: Provenance, opaque: frozenset[str]) -> None:
        self.opaque = opaque
        self.stack: list[str] = []
        self.visited: dict[str, nn.Module] = {}
        self.calls: list[tuple[str, fx.Node | None, fx.Node]] = []
        self.failed_at: str | None = None
        self.failed_leaf = False
        self.notes: list[str] = []
        self._known = known
        self._draws = python_draws()

    def is_leaf(self, module: nn.Module, path: str) -> bool:
        """Whether a module is called as a whole. Hooks on one that is looked into would run at
        trace time only.
        """
        if not path:
            return False
        hooked = (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        if path in self.opaque or hooked or getattr(module, "is_graph_leaf", False):
            return True
        from_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return from_torch and not isinstance(module, _TRANSPARENT)

    @contextlib.contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        """While a module is looked into.

        Raises:
            BakedInError: it changes its own attributes, or draws numbers that no graph can draw.
        """
        self.visited[path] = module
        self.stack.append(path)
        before = _state_of(module)
        try:
            yield
            self._check_draws()
            self._check_changes(module, path, before)
        except Exception:
            self._fails(path, leaf=False)
            raise
        finally:
            self.stack.pop()

    @contextlib.contextmanager
    def whole(self, path: str) -> Iterator[None]:
        """While a module is called as one node; it may draw what it likes, anew in every call."""
        self._check_draws()
        try:
            yield
        except Exception:
            self._fails(path, leaf=True)
            raise
        self._draws = python_draws()

    def returned(self, path: str, output: Any) -> None:
        """Note what a module returned: a tensor, or the first one of a tuple that stands for it."""
        first = isinstance(self._known.attributes.get(path), nn.RNNBase | nn.MultiheadAttention)
        if isinstance(output, tuple | list) and (len(output) == 1 or first):
            output = output[0]
        node = self._known.nodes.get(id(output)) if isinstance(output, torch.Tensor) else None
        self.calls.append((path, node, next(iter(reversed(self._known.graph.nodes)))))

    def check_count(self, target: Any, output: Any) -> None:
        """What contains a module that could not be looked into and returns a list is kept whole
        with it: its length may depend on values. At the top level the stages watch the length.

        Raises:
            TracingError: there is such a module around it.
        """
        if target in self.opaque and isinstance(output, list) and any(self.stack):
            raise TracingError(f"{target!r} returns a list, whose length may depend on values")

    def _fails(self, path: str, leaf: bool) -> None:
        if self.failed_at is None:
            self.failed_at, self.failed_leaf = path, leaf

    def _check_draws(self) -> None:
        if python_draws() != self._draws:
            raise BakedInError("the model draws from Python's or NumPy's random numbers")

    def _check_changes(self, module: nn.Module, path: str, before: dict[str, Any]) -> None:
        now = _state_of(module)
        changed = {k: v for k, v in now.items() if before.get(k, _MISSING) is not v}
        # the top level cannot be opaque; what it only stores is not read again
        if not path and all(isinstance(v, torch.Tensor) for v in changed.values()):
            self.notes += [
                f"forward stores a tensor in self.{name}; the stages do not" for name in changed
            ]
        elif changed:
            raise BakedInError(
                f"forward changes the module's own attribute '{next(iter(changed))}': if only "
                "its first call does that, call the model once before"
            )


def _state_of(module: nn.Module) -> dict[str, Any]:
    state = {k: v for k, v in vars(module).items() if k not in MODULE_INTERNALS}
    return {**state, **module._buffers, **module._parameters}
