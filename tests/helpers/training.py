"""A small model, decoupled and trained in a line.

assert_bits_equal(record(train(trainer_of("linear", SKIPS), 8)), record(...), "why"))
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dni_fx

from ..models.cases import Case, named_leaves, seed_generator
from ..models.small import CHAIN
from .optimisers import adam, sgd

ONE_HOT = dni_fx.one_hot(3)
DECOUPLE = inspect.signature(dni_fx.decouple).parameters


def batch(
    step: int, size: int = 8, case: Case = CHAIN, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same for the same step; the global generator, which threads may be
    using, stays out of it.
    """
    generator = torch.Generator().manual_seed(100 + step)
    (x,), _ = case.inputs(size, dtype, generator)
    assert case.target is not None
    return x, case.target(size, dtype, generator)


def decoupled_of(
    gradients: Any = "linear", case: Case = CHAIN, *, model: nn.Module | None = None, **options: Any
) -> dni_fx.Decoupled:
    """The case's model, always with the same weights, or a given one of its kind; sources know the
    label.
    """
    model = case.build() if model is None else model
    dtype = next(model.parameters()).dtype
    options = {
        "cuts": list(case.cuts),
        "example_inputs": (batch(0, case=case, dtype=dtype)[0],),
        "context": ONE_HOT,
        "check": False,
    } | options
    return dni_fx.decouple(model, gradients=gradients, **options)


def trainer_of(
    gradients: Any = "linear",
    case: Case = CHAIN,
    *,
    model: nn.Module | None = None,
    loss: Any = None,
    optimizer: Any = sgd,
    kind: Any = dni_fx.Trainer,
    **options: Any,
) -> Any:
    """A trainer of the case's model; options are those of ``decouple`` and of the trainer.

    Args:
        kind: what makes the trainer.
    """
    mine = {name: options.pop(name) for name in list(options) if name in DECOUPLE}
    decoupled = decoupled_of(gradients, case, model=model, **mine)
    return kind(decoupled, loss or case.loss, optimizer=optimizer, **options)


def train(
    trainer: Any,
    steps: int,
    first: int | None = None,
    *,
    case: Case = CHAIN,
    sizes: Sequence[int] = (8,),
    pause: float = 0.0,
) -> Any:
    """Make steps, each with random numbers of its own, on batches of the sizes in turn.

    Args:
        first: whose batch comes first; by default that of the trainer's next step.

    Returns:
        The trainer.
    """
    first = trainer.steps if first is None else first
    dtype = next(trainer.decoupled.parameters()).dtype
    for step in range(first, first + steps):
        seed_generator(step)
        x, y = batch(step, sizes[step % len(sizes)], case, dtype)
        trainer.step(x, target=y)
        if pause:
            time.sleep(pause)
    return trainer


def teach(
    source: Any,
    arguments: tuple[Any, ...],
    message: Any,
    steps: int = 10,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adam,
) -> list[float]:
    """Fit a source to one message by hand, again and again.

    Args:
        arguments: of ``predict``.

    Returns:
        The losses.
    """
    made, losses = optimizer(source.parameters()), []
    for _ in range(steps):
        made.zero_grad()
        loss = source.fit(source.predict(*arguments), message)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return losses


def record(trainer: Any) -> dict[str, Any]:
    """Weights, buffers, sources and the states of all optimisers, copied."""
    state = trainer.state_dict()
    names = ("decoupled", "optimizers", "synthesizer_optimizers", "steps")
    return copy.deepcopy({name: state[name] for name in names})


def state(trainer: Any) -> dict[str, Tensor]:
    """Weights and buffers of the model, copied."""
    return {n: t.clone() for n, t in trainer.decoupled.model.state_dict().items()}


def largest_difference(a: Any, b: Any) -> float:
    """Between the floats of two structures that are alike."""
    left, right = (dict(named_leaves(x)) for x in (a, b))
    pairs = [
        (value, right[name])
        for name, value in left.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    ]
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
