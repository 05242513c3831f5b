"""What Python code saw while a step was recorded, besides what the model's graph guards: the loss,
the sources and modules that are called as a whole, with their attributes and what their code refers
to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...graphs.pictures import ATOMS
from ...passes.trace.held import MODES, Held
from ...passes.trace.outside import MISSING, Outside

_TABLES = ("_parameters", "_buffers", "_modules")


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
        for module in modules:
            tables = [vars(module), *(vars(module)[name] for name in _TABLES)]
            self._facts += [(t, n, v) for t in tables for n, v in t.items() if n not in _TABLES]
        for table, name, value in self._facts:
            if not isinstance(value, (*ATOMS, Tensor, nn.Module)):
                self._held.append(Held(name, functools.partial(table.get, name, MISSING)))

    def _hold(self, place: str, read: Callable[[], Any]) -> None:
        self._held.append(Held(f"'{place}' in the code", read))

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are plain attributes, which a recording would hold fast."""
        own = [(t, v) for t, _, v in self._facts if isinstance(v, Tensor)]
        return [v for t, v in own if "_parameters" in t]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        same = all(table.get(name, MISSING) is value for table, name, value in self._facts)
        return same and all(held.holds() for held in self._held)
