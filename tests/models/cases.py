"""A model of the zoo with its inputs, cuts, target and loss; and how inputs are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]


Loss = Callable[[Any, Any], Tensor]


def named_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested containers (dicts, sequences, named tuples, dataclasses) with their
    paths, in order.
    """
    if isinstance(value, dict):
        for key in value:
            yield from named_leaves(value[key], f"{prefix}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from named_leaves(item, f"{prefix}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from named_leaves(getattr(value, field.name), f"{prefix}.{field.name}")
    else:
        yield prefix, value


def squares(output: Any, target: Any = None) -> Tensor:
    """The default loss: a weighted mean of squares over all float outputs. Each has its own weight
    and offset.
    """
    floats = [
        leaf
        for _, leaf in named_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    terms = [
        (tensor - 0.1 * rank).square().mean() * (1 + rank) for rank, tensor in enumerate(floats)
    ]
    return torch.stack(terms).sum()


def classify(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the last dimension, for any leading ones."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def seed_generator(seed: int) -> None:
    """Seed the CPU's generator alone: ``torch.manual_seed`` also takes a stack trace for CUDA,
    which costs more.
    """
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    ``inputs(batch, dtype)`` gives positional and keyword arguments, ``target(batch, dtype)`` the
    target, if any; some take a generator, too, to draw from.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    cuts: tuple[str, ...]
    target: Callable[..., Any] | None = None
    loss: Loss = squares
    notes: str = ""

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model in train mode; the same bits for the same seed."""
        seed_generator(seed)
        return self.make().to(dtype)


def rows(*shape: int) -> Inputs:
    """One float input of shape (batch, *shape)."""

    def inputs(batch: int, dtype: torch.dtype, generator: Any = None) -> Any:
        return (torch.randn(batch, *shape, dtype=dtype, generator=generator),), {}

    return inputs


def tokens(length: int, vocabulary: int) -> Inputs:
    """One integer input of shape (batch, length)."""

    def inputs(batch: int, dtype: torch.dtype, generator: Any = None) -> Any:
        return (torch.randint(0, vocabulary, (batch, length), generator=generator),), {}

    return inputs


def labels(classes: int, *shape: int) -> Callable[..., Tensor]:
    """Integer targets of shape (batch, *shape)."""

    def target(batch: int, dtype: torch.dtype, generator: Any = None) -> Tensor:
        return torch.randint(0, classes, (batch, *shape), generator=generator)

    return target


def floats(*shapes: tuple[int, ...]) -> Inputs:
    """Several float inputs, each of shape (batch, *shape)."""
    return lambda batch, dtype: (
        tuple(torch.randn(batch, *shape, dtype=dtype) for shape in shapes),
        {},
    )


def with_keyword(name: str, width: int, extra: int = 0, **constants: Any) -> Inputs:
    """(batch, 6) positional inputs, ``extra`` more of (batch, 8), and one keyword tensor of (batch,
    width).
    """

    def inputs(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(torch.randn(batch, width, dtype=dtype) for width in (6, *(8,) * extra))
        return args, {name: torch.rand(batch, width, dtype=dtype), **constants}

    return inputs
