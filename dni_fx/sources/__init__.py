"""Where a stage's outgoing gradients come from: synthesizers and controls, by name or factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import DecouplingError, did_you_mean
from ..plan import TensorSpec
from .asks import Asks, Wait
from .base import GradientSource, Prediction, awaited_kinds, message_kinds
from .context import OneHot, align_context, one_hot
from .controls import Exact, Stale, Zero
from .convolutional import Conv, ConvNetwork
from .each import EACH, Each, is_each
from .grouping import JOINT, Joint, Served, is_joint, serve
from .heads import Critic, Distill, Local, LossHead, Sobolev
from .inputs import INPUTS, InputFactory, InputSource, make_input
from .late import Corrected, Delayed, Feedback, Mix, mix
from .regression import MLP, Linear, Network, Pointwise, Regression
from .through_time import AcrossTime
from .traces import Traces

__all__ = [
    "EACH",
    "INPUTS",
    "JOINT",
    "MLP",
    "SOURCES",
    "AcrossTime",
    "Asks",
    "Auto",
    "Conv",
    "Corrected",
    "Critic",
    "Delayed",
    "Distill",
    "Each",
    "Exact",
    "Feedback",
    "GradientSource",
    "InputFactory",
    "InputSource",
    "Joint",
    "Linear",
    "Local",
    "LossHead",
    "Mix",
    "Network",
    "OneHot",
    "Prediction",
    "Regression",
    "Served",
    "Sobolev",
    "SourceFactory",
    "Stale",
    "Traces",
    "Wait",
    "Zero",
    "align_context",
    "auto_name",
    "awaited_kinds",
    "is_each",
    "is_joint",
    "make_input",
    "make_source",
    "message_kinds",
    "mix",
    "one_hot",
    "serve",
]

SourceFactory = Callable[[Sequence[TensorSpec], TensorSpec | None], GradientSource]


def auto_name(spec: TensorSpec, context: TensorSpec | None = None) -> str:
    """What ``"auto"`` takes for a value: ``"conv"`` for maps, else ``"linear"`` with a context and
    ``"mlp"`` without.

    With the label a linear source is the paper's choice; without it only the label's average can be
    learnt, which is no linear function. Convolutional maps have one to three spatial dimensions.
    """
    if spec.feature_dim == 1 and len(spec.shape) > 2:
        return "conv"
    return "linear" if auto_context(spec, context) is not None else "mlp"


def auto_context(spec: TensorSpec, context: TensorSpec | None) -> TensorSpec | None:
    """The context, or None for a value that has no batch dimension to line it up with (scalars,
    position tables).
    """
    if context is None or not spec.shape:
        return None
    return None if spec.shape[0] != context.shape[0] else context


class Auto(Regression):
    """The regression that fits each value's kind, shape and context; see :func:`auto_name`."""

    def __init__(self, specs: Sequence[TensorSpec], context: TensorSpec | None = None) -> None:
        def network(spec: TensorSpec, context: TensorSpec | None) -> Network:
            name, context = auto_name(spec, context), auto_context(spec, context)
            if name == "conv":
                return ConvNetwork(spec, context)
            return Pointwise(spec, context, hidden=1 if name == "mlp" else 0)

        super().__init__(specs, context, network)


SOURCES: dict[str, type[GradientSource]] = {
    "auto": Auto,
    "linear": Linear,
    "mlp": MLP,
    "conv": Conv,
    "local": Local,
    "critic": Critic,
    "sobolev": Sobolev,
    "distill": Distill,
    "delayed": Delayed,
    "corrected": Corrected,
    "mix": Mix,
    "feedback": Feedback,
    "zero": Zero,
    "stale": Stale,
    "exact": Exact,
}


def make_source(
    option: str | SourceFactory, specs: Sequence[TensorSpec], context_spec: TensorSpec | None = None
) -> GradientSource:
    """Make the gradient source for an interface or a whole boundary.

    The global random state is left as it was; a source's initial weights follow from it all the
    same.

    Args:
        option: a name of :data:`SOURCES`, with or without ``"joint:"`` before it, or a callable
            ``(specs, context_spec) -> GradientSource``; a GradientSource class is one.
        specs: the values served.
        context_spec: the context, None where there is none.

    Returns:
        A new source, on the CPU (or torch's default device).

    Raises:
        DecouplingError: unknown name; not a factory; a source that does not fit the value or the
            context.
    """
    factory: object = SOURCES.get(option.removeprefix(JOINT)) if isinstance(option, str) else option
    if factory is None:
        hint = did_you_mean(str(option).removeprefix(JOINT), SOURCES)
        known = ", ".join(repr(name) for name in SOURCES)
        raise DecouplingError(
            f"unknown gradient source {option!r}{hint}. Known: {known}, or a GradientSource "
            "factory."
        )
    if isinstance(factory, GradientSource):
        raise DecouplingError(
            f"got a {type(factory).__name__} object as gradient source, but each interface makes "
            "its own. Pass the class, or a callable (specs, context_spec) -> GradientSource."
        )
    if not callable(factory):
        raise DecouplingError(
            "a gradient source is a name or a callable (specs, context_spec) -> GradientSource, "
            f"but got {factory!r}"
        )
    devices = (
        range(torch.cuda.device_count())
        if torch.cuda.is_available() and torch.cuda.is_initialized()
        else ()
    )
    if isinstance(factory, nn.Module):
        raise DecouplingError(
            f"got a {type(factory).__name__} object as gradient source; pass a GradientSource class"
        )
    try:
        inspect.signature(factory).bind(tuple(specs), context_spec)
    except TypeError as error:
        raise DecouplingError(
            f"the gradient source factory {factory!r} must take (specs, context_spec): {error}"
        ) from error
    with torch.random.fork_rng(devices=devices):
        source = factory(tuple(specs), context_spec)
    if not isinstance(source, GradientSource):
        raise DecouplingError(
            f"the gradient source factory {factory!r} returned {type(source).__name__}, expected a "
            "GradientSource"
        )
    return source
