"""What a stage's forward writes to, as it was before a batch: put back where that is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..passes.trace.state import Changes


def written_in(module: nn.Module, changes: Changes) -> dict[str, nn.Parameter]:
    """The weights that a stage's forward writes to, by name.

    Args:
        module: the stage.
        changes: what was seen of a call of the model; how often one is rescaled depends on values.
    """
    seen = {id(tensor) for tensor, _ in changes.tensors}
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            seen.add(id(part.weight))
    return {name: p for name, p in module.named_parameters() if id(p) in seen}


class ForwardState:
    """The buffers of a stage, and weights that its forward writes to.

    Args:
        module: the stage.
        changes: what was seen of a call of the model.

    Attributes:
        watched: what must stay finite, with its name; masks of -inf are not among it.
    """

    def __init__(self, module: nn.Module, changes: Changes) -> None:
        self.module = module
        self._tensors: dict[str, Tensor] = {
            **dict(module.named_buffers()),
            **written_in(module, changes),
        }
        self._contents: dict[str, Tensor] = {}
        numbers = [(n, t) for n, t in self._tensors.items() if t.is_floating_point()]
        self.watched = [(f"the buffer {n!r}", t) for n, t in numbers if bool(t.isfinite().all())]

    def keep(self) -> None:
        """Before a batch."""
        self._contents = {n: t.detach().clone() for n, t in self._tensors.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """The batch is refused."""
        for name, content in self._contents.items():
            tensor = self._tensors[name]
            if not torch.equal(tensor, content):  # else graphs that hold it must find it untouched
                tensor.copy_(content)
        self._contents = {}

    def accept(self) -> None:
        """The batch is done."""
        self._contents = {}
