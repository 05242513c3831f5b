"""How many bytes of tensors are alive, and what the most were."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches the memory of all tensors that operators see; what was freed or resized counts no
    more.

    Attributes:
        most: bytes, at the worst moment after an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.most = 0

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        alive = {id(s): s.nbytes() for ref in self._seen.values() if (s := ref()) is not None}
        return sum(alive.values())

    def watch(self, *values: Any) -> None:
        """Count these, too, from now on."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage.device.type != "meta":
                    self._seen[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and look."""
        found = operator(*args, **(kwargs or {}))
        self.watch(args, found)
        self._seen = {k: ref for k, ref in self._seen.items() if ref() is not None}
        self.most = max(self.most, self.now)
        return found
