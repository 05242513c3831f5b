"""What Python code saw while a step was recorded, besides what the model's graph guards: the loss,
the sources and modules that are called as a whole, with their attributes and what their code refers
to.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...graphs.pictures import ATOMS
from ...passes.trace.contents import MISSING
from ...passes.trace.held import HOOKS, MODES, TABLES, Held
from ...passes.trace.outside import Outside
from ...passes.trace.state import MODULE_INTERNALS


class Holding:
    """Looks at a loss and at modules before every step.

    Args:
        loss: the user's.
        called: the modules, with all that is in them.
    """

    def __init__(self, loss: Callable[..., Any], called: Iterable[nn.Module]) -> None:
        self._held: list[Held] = []
        outside = Outside(self._hold, lambda name: None, dict.fromkeys(MODES, ""))
        modules = [m for each in called for m in each.modules()]
        if isinstance(loss, nn.Module):
            modules += list(loss.modules())
        outside.held(loss)
        for module in modules:
            outside.function(type(module).forward)
        self._facts: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks = [vars(m)[n] for m in modules for n in HOOKS]
        for module in modules:
            own = [(n, v) for n, v in vars(module).items() if n not in MODULE_INTERNALS]
            self._facts += [(vars(module), n, v) for n, v in own]
            tables = [vars(module)[name] for name in TABLES]
            self._facts += [(t, n, v) for t in tables for n, v in t.items()]
        for table, name, value in self._facts:
            if _may_change(value):
                self._held.append(Held(name, functools.partial(table.get, name, MISSING)))

    def _hold(self, place: str, read: Callable[[], Any]) -> None:
        self._held.append(Held(f"'{place}' in the code", read))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        same = all(table.get(name, MISSING) is value for table, name, value in self._facts)
        return same and not any(self._hooks) and all(held.holds() for held in self._held)


def _may_change(value: Any) -> bool:
    """Whether the same object may hold something else later, besides tensors and modules."""
    if isinstance(value, tuple):
        return any(map(_may_change, value))
    if dataclasses.is_dataclass(value):
        return not type(value).__dataclass_params__.frozen  # type: ignore[union-attr]
    return not isinstance(value, (*ATOMS, Tensor, nn.Module, type, types.FunctionType))
