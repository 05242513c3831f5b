"""What program folders hold besides a model's own stages: it is copied there, as far as it is used.

Nothing but torch is imported where it is copied to; what is taken from this library is copied, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sources.keeping import kept_weights
from ..sources.regression import update_scale


class Regression(nn.Module):
    """Predicts the gradient for one value, in units of the running size of those that come back.

    A subclass gives in ``forward`` what is predicted of value and context, in those units.
    """

    scale: Tensor
    count: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros((), dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=dtype))

    def predict(self, value: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient to pull back, and what ``fit`` compares with the one that comes back."""
        output = self(value, *context)
        return like(output.detach().to(self.scale.dtype) * self.scale, value), output

    def fit(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean squared error, once the scale has followed the target."""
        target = target.detach().to(self.scale.dtype)
        update_scale(self.scale, self.count, [target])
        inverse = self.scale.reciprocal().nan_to_num(posinf=0.0)
        return F.mse_loss(output.to(target.dtype), target * inverse)


class JointRegression(nn.Module):
    """Predicts the gradients for several values, each in units of the running size of its own.

    A subclass gives in ``forward`` what is predicted of values and context, in those units.
    """

    scale: Tensor
    count: Tensor

    def __init__(self, values: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(values, dtype=dtype))
        self.register_buffer("count", torch.zeros(values, dtype=dtype))

    def predict(
        self, values: Sequence[Tensor], *context: Tensor
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The gradients to pull back, and what ``fit`` compares with those that come back."""
        outputs = self(*values, *context)
        gradients = [
            like(output.detach().to(scale.dtype) * scale, value)
            for output, scale, value in zip(outputs, self.scale, values, strict=True)
        ]
        return gradients, outputs

    def fit(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The mean squared errors, added up, once the scales have followed the targets."""
        targets = [target.detach().to(self.scale.dtype) for target in targets]
        update_scale(self.scale, self.count, targets)
        inverses = self.scale.reciprocal().nan_to_num(posinf=0.0).unbind()
        losses = [
            F.mse_loss(output.to(target.dtype), target * inverse)
            for output, target, inverse in zip(outputs, targets, inverses, strict=True)
        ]
        return torch.stack(losses).sum()


class LocalHead(nn.Module):
    """Guesses the loss from values and context, and learns to do so; its gradient is pulled back.

    A subclass gives in ``forward`` the mean loss, of values in its own ``dtype``.
    """

    factor: float = 1.0
    dtype: torch.dtype = torch.float32

    def predict(self, values: Sequence[Tensor], *context: Tensor) -> list[Tensor]:
        """The gradient for each value; those of the head's parameters are accumulated, too."""
        leaves = [value.detach().to(self.dtype).requires_grad_() for value in values]
        loss = self(*(leaf.view_as(leaf) for leaf in leaves), *(c.to(self.dtype) for c in context))
        torch.autograd.backward(loss)
        pairs = zip(leaves, values, strict=True)
        return [like(gradient_of(leaf) * self.factor, value) for leaf, value in pairs]


class AcrossTime(nn.Module):
    """Predicts what the rest of a sequence would send back to the state at the end of a window.

    Args:
        source: predicts for the state's tensors side by side, ``(batch, features)``.
        factor: on what is pulled back.
        batch_dims: which dimension of each tensor is the batch.
    """

    def __init__(self, source: Regression, factor: float, batch_dims: Sequence[int]) -> None:
        super().__init__()
        self.source, self.factor, self.batch_dims = source, factor, batch_dims

    def predict(
        self, values: Sequence[Tensor], done: bool, *context: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients to pull back, none where the sequence ends, and what ``fit`` compares."""
        with kept_weights(self.source):  # they are updated before the target comes
            guess, said = self.source.predict(side_by_side(values, self.batch_dims), *context)
        guess = torch.zeros_like(guess) if done else guess
        return apart(guess * self.factor, values, self.batch_dims), said

    def fit(self, said: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The error, once the next window has sent back its gradients."""
        return self.source.fit(said, side_by_side(targets, self.batch_dims))


def side_by_side(values: Sequence[Tensor], batch_dims: Sequence[int]) -> Tensor:
    """All tensors of a state as one, ``(batch, features)``."""
    pairs = zip(values, batch_dims, strict=True)
    return torch.cat([value.movedim(dim, 0).flatten(1) for value, dim in pairs], 1)


def apart(joined: Tensor, values: Sequence[Tensor], batch_dims: Sequence[int]) -> list[Tensor]:
    """What stands side by side as tensors like those of the state again."""
    fronts = [value.movedim(dim, 0) for value, dim in zip(values, batch_dims, strict=True)]
    parts = joined.split([front[0].numel() for front in fronts], 1)
    return [
        like(part.reshape(front.shape).movedim(0, dim), value)
        for part, front, dim, value in zip(parts, fronts, batch_dims, values, strict=True)
    ]


def no_gradients(*values: Tensor) -> list[Tensor]:
    """No gradient at all for each value: the stages before learn nothing from those behind."""
    return [torch.zeros_like(value) for value in values]


def gradient_of(value: Tensor) -> Tensor:
    """What flowed back to a value that a stage was given; zeros where nothing did."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def like(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient in the dtype and memory format of its value."""
    gradient = gradient.to(value.dtype)
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Labels as floats, zeros for negative ones."""
    index = target.long().unsqueeze(-1)
    encoded = torch.zeros(*target.shape, classes, device=target.device)
    return encoded.scatter_(-1, index.clamp(min=0), (index >= 0).to(encoded.dtype))


def share(owner: nn.Module, name: str, other: nn.Module, other_name: str) -> None:
    """Make a parameter or buffer of one module that of another, too."""
    path, _, last = name.rpartition(".")
    tensor = getattr(owner.get_submodule(path), last)
    path, _, last = other_name.rpartition(".")
    setattr(other.get_submodule(path), last, tensor)


def unshared(module: nn.Module, *others: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that none of the others has."""
    theirs = {id(parameter) for other in others for parameter in other.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in theirs]


class Link:
    """A queue between two threads, which ends when any thread has failed.

    Args:
        stop: set by a thread that fails.
        room: how many items it holds.
    """

    def __init__(self, stop: Event, room: int) -> None:
        self.stop, self.queue = stop, Queue[Any](room)

    def put(self, item: Any) -> None:
        """Add an item, when there is room."""
        while not self.stop.is_set():
            with contextlib.suppress(Full):
                self.queue.put(item, timeout=0.1)
                return
        raise RuntimeError("another thread has failed")

    def get(self) -> Any:
        """The next item, when there is one."""
        while not self.stop.is_set():
            with contextlib.suppress(Empty):
                return self.queue.get(timeout=0.1)
        raise RuntimeError("another thread has failed")


class Guard:
    """Where something fails, all threads end; ``links`` keeps the error."""

    def __init__(self, links: Any) -> None:
        self.links = links

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.links.errors.append(error)
            self.links.stop.set()
        return error is not None


def start_thread(
    run: Callable[[Any, Any, int], None], program: Any, links: Any, steps: int
) -> Thread:
    """Run a stage on a thread of its own; an error there ends all others."""

    def guarded() -> None:
        with Guard(links):
            run(program, links, steps)

    thread = Thread(target=guarded, daemon=True)
    thread.start()
    return thread


def update(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Step the optimisers of one stage."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
