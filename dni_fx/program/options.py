"""What a trainer is told, as text: the loss, the optimisers, what sources see of a target."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import DecouplingError
from ..runtime.optimizing import MakeOptimizer, NamedParameters
from ..sources import Exampled, OneHot
from .constructors import constructed
from .functions import function_name, importing
from .text import literal


@dataclass(frozen=True)
class TrainingOptions:
    """How a program trains.

    Attributes:
        loss: ``loss(output, target)``.
        optimizer, synthesizer_optimizer, clip_norm, accumulate: as for :class:`dni_fx.Trainer`.
        context: what sources see of a target; as the model was decoupled by default.
    """

    loss: Callable[[Any, Any], torch.Tensor] = nn.functional.cross_entropy
    optimizer: MakeOptimizer = torch.optim.Adam
    synthesizer_optimizer: MakeOptimizer | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    context: Any = None


@dataclass
class Text:
    """An expression, and the imports that it needs."""

    expression: str
    imports: set[str] = field(default_factory=set)


def loss_text(loss: Any) -> Text:
    """A loss as an expression of ``output`` and ``target``.

    Raises:
        DecouplingError: one that can be neither written nor imported.
    """
    if isinstance(loss, nn.Module):
        if any(True for _ in (*loss.parameters(), *loss.buffers())):
            raise DecouplingError(
                f"the loss, a {type(loss).__name__}, holds tensors, which a call does not write "
                "down: pass a function that makes them, at the top of a module"
            )
        return Text(f"{constructed(loss, 'loss')}(output, target)")
    named: dict[str, Any] = {}
    if isinstance(loss, functools.partial):
        if loss.args:
            raise DecouplingError("the loss is a partial with positional arguments: name them")
        loss, named = loss.func, loss.keywords
    told = "".join(f", {n}={literal(v)}" for n, v in named.items())
    try:
        name, needed = function_name(loss)
    except DecouplingError as error:
        raise DecouplingError(f"{error}; or use a loss of torch.nn.functional") from error
    return Text(f"{name}(output, target{told})", {needed} - {""})


def context_text(context: Any) -> Text | None:
    """What sources see of ``target``; None where they see nothing."""
    encode = context.encode if isinstance(context, Exampled) else context
    if encode is None:
        return None
    if isinstance(encode, OneHot):
        return Text(f"one_hot(target, {encode.classes})")
    name, needed = function_name(encode)
    return Text(f"{name}(target)", {needed} - {""})


def optimizer_text(make: MakeOptimizer, named: NamedParameters, argument: str) -> Text:
    """What makes an optimiser, with ``{}`` where its parameters stand.

    Args:
        make: the user's function.
        named: parameters to try it on.
        argument: what it is called.

    Raises:
        DecouplingError: it makes none, or one that is set otherwise for some parameters.
    """
    made: Any = make(list(named))
    if not isinstance(made, torch.optim.Optimizer) or len(made.param_groups) != 1:
        raise DecouplingError(
            f"{argument}= must return one optimiser with one group of parameters to be written as "
            f"Python, but returned a {type(made).__name__} with "
            f"{len(getattr(made, 'param_groups', []))}"
        )
    kind, group = type(made), made.param_groups[0]
    imports: set[str] = set()
    if getattr(torch.optim, kind.__name__, None) is kind:
        name = f"torch.optim.{kind.__name__}"
    else:
        name = kind.__name__
        imports.add(importing(kind, name))
    told = [
        f"{n}={literal(group[n])}"
        for n, p in inspect.signature(kind.__init__).parameters.items()
        if n in group and n != "params" and (n == "lr" or not _same(group[n], p.default))
    ]
    return Text(f"{name}({', '.join(['{}', *told])})", imports)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))
