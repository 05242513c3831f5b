"""The models of other people's packages, small, randomly initialised, called as their users do.

A row of a table is a name, how to build the model and what it is called with. What a row needs is
imported when the model is built, so that a process has the packages that it examines and no more.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

INTRODUCTION = (
    "Small random configurations with each package's own defaults for the rest, and inputs as its "
    "documentation has them: images, volumes, texts, waves, graphs, point clouds, tables, spikes, "
    "observations. What users write themselves around a package's parts (a loop over time steps, "
    "the negative log-likelihood of a flow) is written as its tutorial does."
)

Make = Callable[[int, torch.Generator, torch.dtype], Any]  # batch, where to draw from, dtype


@dataclass(frozen=True)
class Row:
    """One model: ``make`` is a class or a function, or the "module:name" of one, which is
    called with ``options``; the inputs are made by functions of the batch size.
    """

    make: str | Callable[..., nn.Module]
    inputs: tuple[Make, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Make] = field(default_factory=dict)

    def prepare(self) -> None:
        """Import the class's module, for processes that fork from this one."""
        if not callable(self.make):
            with contextlib.suppress(ImportError):  # `build` says it
                importlib.import_module(self.make.partition(":")[0])

    def build(self) -> nn.Module:
        """The model, randomly initialised."""
        make = self.make if callable(self.make) else named(self.make)
        return make(**self.options)

    def example(self, batch: int, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
        """Positional and keyword inputs."""
        generator = torch.Generator().manual_seed(seed)
        args = tuple(draw(batch, generator, dtype) for draw in self.inputs)
        keywords = {key: draw(batch, generator, dtype) for key, draw in self.keywords.items()}
        return args, keywords


def row(make: str | Callable[..., nn.Module], /, *inputs: Make, **options: Any) -> Row:
    """A row whose inputs are all positional."""
    return Row(make, inputs, options)


def named(path: str) -> Any:
    """The object that "module:name" says."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def real(*shape: int) -> Make:
    """Normal numbers, a batch of ``shape``."""
    return lambda batch, generator, dtype: torch.randn(
        (batch, *shape), generator=generator, dtype=dtype
    )


def unit(*shape: int) -> Make:
    """Numbers between 0 and 1, a batch of ``shape``."""
    return lambda batch, generator, dtype: torch.rand(
        (batch, *shape), generator=generator, dtype=dtype
    )


def ids(count: int, *shape: int) -> Make:
    """Integers below ``count``, a batch of ``shape``."""
    return lambda batch, generator, _: torch.randint(count, (batch, *shape), generator=generator)


def ones(*shape: int) -> Make:
    """A mask that hides nothing."""
    return lambda batch, generator, _: torch.ones((batch, *shape), dtype=torch.bool)


def constant(value: Any) -> Make:
    """The same object for every batch."""
    return lambda batch, generator, dtype: value
