"""Finds when a source is made what would fail, or pass unnoticed, when it is used."""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import DecouplingError
from ..passes.trace.settings import FAKES, unheard
from .asks import Asks
from .base import GradientSource
from .context import has_data, not_classes

ARGUMENTS = {
    "predict": "(values, context)",
    "fit": "(prediction, message)",
    "fit_part": "(place, prediction, message)",
    "complete": "(prediction, awaited)",
}


def check_source(source: GradientSource) -> None:
    """Refuse a source without the methods that it needs, or that is not written as one."""
    name, asks = type(source).__name__, source.asks
    if "training" not in vars(source) or "specs" not in vars(source):
        raise _not_started(source)
    if not isinstance(asks, Asks):
        raise DecouplingError(f"{name}.asks must be an Asks(...), but is {asks!r}")
    for attribute, value in _written(source).items():
        if isinstance(value, Asks) and attribute != "asks":
            raise DecouplingError(f"{name}.{attribute} is an Asks that nobody reads: call it asks")
    for method, arguments in ARGUMENTS.items():
        if _has(source, method):
            if method == "predict" and asks.inputs is not None:
                arguments = "(values, context, inputs)"
            try:
                inspect.signature(getattr(source, method)).bind(*arguments.split(","))
            except TypeError as error:
                raise DecouplingError(f"{name}.{method} must take {arguments}: {error}") from error
    refuse_labels(source)
    if not _has(source, "predict"):
        raise _missing(source, "predict", "says which gradients to pull back")
    if asks.wait is not None and not _has(source, "complete"):
        raise _missing(source, "complete", "says what to pull back when what it waits for is there")
    if asks.per_consumer and not _has(source, "fit_part"):
        raise _missing(source, "fit_part", "hears each consumer's gradient")
    if _has(source, "fit"):
        return
    # Without a fit, parameters would stay as they are, and what is heard be thrown away.
    learnt = [n for n, p in source.named_parameters() if p.requires_grad]
    if learnt and not asks.per_consumer:
        purpose = f"trains its parameters ({', '.join(learnt[:3])}{', ...' * (len(learnt) > 3)})"
        raise _missing(source, "fit", purpose, "; or freeze them by requires_grad_(False)")
    if asks.learns_from and _close_to("fit", source):
        purpose = f"learns from {' and '.join(asks.learns_from)}"
        otherwise = "; or let it ask for nothing: asks = Asks(learns_from=())"
        raise _missing(source, "fit", purpose, otherwise)


def refuse_labels(source: GradientSource) -> None:
    """Refuse a context of labels themselves for a source that takes it for floats."""
    seen = source.context_spec
    if seen is not None and not seen.dtype.is_floating_point and not source.takes_labels:
        raise DecouplingError(
            f"{type(source).__name__} sees a context of floats, but this one holds labels "
            f"themselves ({seen.dtype}, as one_hot(..., sparse=True) makes them), which only "
            "sources.Tied and sources of one's own with takes_labels = True read: leave out "
            "sparse=True"
        )


def explain_start(error: Exception) -> DecouplingError | None:
    """The error to raise instead, where an ``__init__`` failed since it had not called
    ``super().__init__``; None where the cause is another one.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if isinstance(made, GradientSource) and "training" not in vars(made):
            signs = (
                "Module.__init__() call",  # nn.Module was assigned a layer
                f"'{type(made).__name__}' object has no attribute",
                "GradientSource.__init__() missing",
            )
            if any(sign in str(error) for sign in signs):
                return _not_started(made)
    return None


def try_predict(source: GradientSource) -> None:
    """Look at what ``predict`` returns for the example batch, where others wrote it.

    A copy is asked, with tensors that hold nothing, so no state changes and nothing is computed. A
    source that cannot be copied or reads numbers is judged by its first step instead.

    Raises:
        DecouplingError: not a gradient of each value's shape and dtype; what ``predict`` itself
            raises as one.
    """
    ours = (__package__, "torch.nn.")
    if all(type(module).__module__.startswith(ours) for module in source.modules()):
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        tensors = itertools.chain(source.parameters(), source.buffers())
        asked = copy.deepcopy(source, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        with warnings.catch_warnings(), unheard(FAKES), mode, torch.enable_grad():
            warnings.simplefilter("ignore")
            values, inputs = (
                tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs)
                for specs in (source.specs, source.input_specs)
            )
            seen = source.context_spec
            context = None if seen is None else torch.zeros(seen.shape, dtype=seen.dtype)
            asked(values, context, inputs)
    except DecouplingError:
        raise
    except Exception:
        return


def no_slope(source: GradientSource, what: str) -> DecouplingError:
    """The error for a head whose loss is the same whatever its logits are."""
    return DecouplingError(
        f"{type(source).__name__}: {what} is the same whatever the logits are, so no gradient "
        f"would ever be sent. {_other_losses(source, 'one probability')}"
    )


def no_classes(source: GradientSource, why: str) -> DecouplingError:
    """The error for a head that takes a context for class probabilities, which it is not."""
    return DecouplingError(
        f"{type(source).__name__}: the context is no class probabilities, which its loss, cross "
        f"entropy, needs: {why}. {_other_losses(source, 'several labels at once')}"
    )


def _other_losses(source: GradientSource, binary: str) -> str:
    """What to do where cross entropy is no loss for a context; what ``binary`` cross entropy is
    for.
    """
    name, bce = type(source).__name__, ""
    if source.asks.learns_from != ("logits",):
        bce = (
            "loss=lambda p, c: F.binary_cross_entropy_with_logits(p, c, reduction='none').mean(-1) "
            f"for {binary}; "
        )
    return (
        f"Pass loss= to the source: gradients=functools.partial(dni_fx.sources.{name}, loss='mse') "
        f"for a regression; {bce}or let the context have a feature for each class, as "
        "dni_fx.one_hot(2) does"
    )


def has_classes(head: GradientSource, context: Tensor) -> bool:
    """Whether a context is known to hold class probabilities; tensors without data, and those of
    nothing but zeros (ignored labels), tell nothing.

    Raises:
        DecouplingError: it holds something else.
    """
    if not has_data(context) or torch.compiler.is_compiling():
        return False
    if why := not_classes(context):
        raise no_classes(head, why)
    return bool(context.any())


def has_slope(head: Any, mean: Tensor, logits: Tensor, context: Tensor) -> bool:
    """Whether a head's loss is known to depend on its logits; tensors without data, and contexts of
    nothing but zeros (ignored labels), tell nothing.

    Args:
        head: a ``LossHead``, whose loss the user may have written.
        mean: its loss on a batch.
        logits: what it made of that.
        context: the batch's context.

    Raises:
        DecouplingError: it does not, neither at these logits nor at others.
    """
    if not mean.requires_grad:
        raise no_slope(head, "its loss")
    if not has_data(mean) or torch.compiler.is_compiling() or not context.any():
        return False
    noise = torch.Generator().manual_seed(0)
    for _ in range(4):
        (slope,) = torch.autograd.grad(mean, logits, retain_graph=True, allow_unused=True)
        if slope is not None and slope.any():
            return True
        moved = torch.randn(logits.shape, generator=noise).to(logits)
        logits = (logits.detach() + moved).requires_grad_()
        mean = head.evaluate(logits, context)[1]
    raise no_slope(head, "its loss")


def check_reached(head: GradientSource, found: Sequence[Tensor | None]) -> None:
    """Refuse a head that computes nothing with one of its values, which nothing would then train.

    Args:
        head: a ``LossHead``.
        found: the gradients of its values.
    """
    for place, gradient in enumerate(found):
        if gradient is None:
            raise DecouplingError(
                f"{type(head).__name__}: the loss does not depend on value {place} of "
                f"{len(found)}: logits() must compute with every value that it is given"
            )


def _has(source: GradientSource, method: str) -> bool:
    """Whether its class, or itself, brings the method."""
    found = getattr(source, method)
    return getattr(found, "__func__", None) is not getattr(GradientSource, method)


def _written(source: GradientSource) -> dict[str, Any]:
    """What the classes of a source define, without those that every source has."""
    own = itertools.takewhile(lambda owner: owner is not GradientSource, type(source).__mro__)
    return {name: value for owner in own for name, value in vars(owner).items()}


def _close_to(method: str, source: GradientSource) -> str:
    """A method that may have been meant; empty without one."""
    names = {n.lower(): n for n, v in _written(source).items() if callable(v) and n != method}
    close = difflib.get_close_matches(method, names, n=1, cutoff=0.75)
    return names[close[0]] if close else ""


def _missing(
    source: GradientSource, method: str, purpose: str, otherwise: str = ""
) -> DecouplingError:
    close = _close_to(method, source)
    hint = f" (is {close!r} misspelt?)" if close else ""
    lacks = f"{type(source).__name__} has no method {method}{ARGUMENTS[method]}{hint}"
    return DecouplingError(f"{lacks}, which {purpose}: write one{otherwise}")


def _not_started(source: GradientSource) -> DecouplingError:
    call = f"{type(source).__name__}.__init__ must call super().__init__(specs, context)"
    return DecouplingError(f"{call} before anything else")
