"""A trained model judged on held-out batches, with training left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import preserved_rng
from ..passes.trace.storages import Tensors
from .emitted import keep_modes

Metric = Callable[[Any, Any], Any]
Sums = Mapping[str, tuple[float, int]]  # by metric, with what it is a sum over


@contextlib.contextmanager
def evaluating(model: nn.Module, keep_buffers: bool = True) -> Iterator[None]:
    """Evaluation mode without gradients; after it each module's mode, the buffers (unless the
    caller sees to them) and all random states are as before, so that training goes on as if nothing
    had happened.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = Tensors(model.buffers() if keep_buffers else (), whole=True)
    put_back = preserved_rng()  # a DataLoader draws a number for each pass
    try:
        with torch.no_grad(), keep_modes():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        buffers.restore()
        put_back()


class Means:
    """Means over a loader, which stay on their device until they are asked for.

    Args:
        metric: ``metric(output, target)``, or several by name.
        loss: what counts where there is none.

    Attributes:
        found: by name, the sum so far and what it is a sum over.
        batches: how many were added.

    Raises:
        DecouplingError: something that cannot be called.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric] | None, loss: Metric) -> None:
        self.single = not isinstance(metric, Mapping)
        one = metric or (lambda output, target: loss(output, target).reshape(()))
        named = dict(one) if isinstance(one, Mapping) else {"metric": one}
        for name, each in named.items():
            if not callable(each):
                raise DecouplingError(
                    f"metric= must be a callable (output, target), or a mapping from names to "
                    f"such, but {name!r} is {each!r}: pass lambda output, y: output.argmax(1) == y"
                )
        self.metrics: dict[str, Metric] = named
        self.found: dict[str, tuple[Tensor, int]] = {}
        self.batches = 0

    def add(self, output: Any, target: Any, rows: int | None = None) -> None:
        """One batch.

        Args:
            output: of the model.
            target: as the loader gave it.
            rows: how much a metric counts that is one number; by default the length of the output's
                first tensor.

        Raises:
            DecouplingError: a metric that returns no number.
        """
        self.batches += 1
        for name, metric in self.metrics.items():
            value = _numbers(name, metric(output, target))
            count = value.numel() if value.dim() else _rows(output) if rows is None else rows
            total = value.sum() if value.dim() else value * count
            before, counted = self.found.get(name, (total.new_zeros(()), 0))
            self.found[name] = before + total.to(before.device), counted + count

    def sums(self) -> Sums:
        """What was found, as plain numbers."""
        return {name: (float(total), count) for name, (total, count) in self.found.items()}

    def result(self, parts: Sequence[Sums]) -> Any:
        """The means, over what several have found.

        Args:
            parts: of each its :meth:`sums`.

        Raises:
            DecouplingError: no batch was seen.
        """
        means = {}
        for name in self.metrics:
            pairs = [part[name] for part in parts if name in part]
            if not pairs:
                raise DecouplingError(
                    "the loader gave no batch to evaluate: pass a list or a DataLoader; an "
                    "iterator can be used only once"
                )
            count = sum(counted for _, counted in pairs)
            means[name] = sum(total for total, _ in pairs) / count if count else float("nan")
        return means["metric"] if self.single else means


def _numbers(name: str, value: Any) -> Tensor:
    """What a metric returned, in double precision."""
    try:
        found = torch.as_tensor(value).detach()
        return found.to(torch.float32 if found.device.type == "mps" else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecouplingError(
            f"{name!r} must return a number, or a tensor of one number for each sample, but "
            f"returned {type(value).__name__}: return a mean over the batch"
        ) from error


def _rows(output: Any) -> int:
    return next((len(leaf) for leaf in flatten(output)[0] if leaf.dim()), 1)
