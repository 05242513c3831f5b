"""The one extension point for synthesizers, critics, delayed gradients and controls: when a source
is asked, what it is given, and what it must return.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Declares


@dataclass
class Prediction:
    """What a source says about the values of one step.

    Attributes:
        gradients: one per value, detached, each with its value's shape, dtype and memory format;
            they are pulled back at once. None from a source that waits for a message and says in
            :meth:`GradientSource.complete` what to pull back.
        state: whatever :meth:`GradientSource.fit` needs; usually the raw outputs, which keep the
            source's autograd graph so that the source runs once a step.
        loss: the source's estimate of each sample's loss, ``(batch,)``, detached: what upstream
            sources hear that ask for ``"loss"``. None from sources that estimate none; the true
            loss passes them by.
        logits: the source's estimate of the model's output, detached; the same for ``"logits"``.
        guess: what the source takes the gradients to be, where that is not what is pulled back.
    """

    gradients: tuple[Tensor, ...] | None
    state: Any = None
    loss: Tensor | None = None
    logits: Tensor | None = None
    guess: tuple[Tensor, ...] | None = None

    @property
    def guessed(self) -> tuple[Tensor, ...] | None:
        """What is compared with the gradients that arrive; None where nothing is predicted."""
        return self.gradients if self.guess is None else self.guess


class GradientSource(Declares, nn.Module):
    """Says which gradients enter a stage from behind, in place of the stages that follow it.

    A subclass says in ``asks`` what it wants to hear, implements :meth:`predict` and, where there
    is something to learn, :meth:`fit`. Parameters and buffers are created in ``__init__`` from the
    specs, so that the ``state_dict`` is complete before the first step. Neither method may draw
    from the global random number generator: training decoupled must not shift the model's dropout.

    Attributes:
        asks: the kinds of message that it learns from, and whether its stage waits; declared in the
            class, or set in ``__init__`` where it depends on arguments; see
            :class:`~dni_fx.sources.Asks`. What sources were written with before, ``message =
            "none"`` or ``lag = 1``, is taken as well.
        takes_labels: of a class, whether its context may be labels themselves, integers.
        unit: the factor in front of the mean loss, set by the trainer (1 / accumulate); what a
            source that computes gradients of a loss of its own multiplies them by.
        ended: set by the trainer for a source that asks for ``ends``, before it predicts: a bool
            mask ``(batch,)`` of the samples whose sequence ends with the window, or None.
        jacobian: set by the trainer for a source that asks for it, before it predicts: of the
            state's elements side by side for those of the window before, ``(batch, features,
            features)``; None at the start of a sequence.
        specs: shape, dtype and feature dimension of each value served, of the example batch.
        context_spec: the same for the context, or None; a source made without one ignores every
            context.
        input_specs: the same for the inputs that it sees, where it asks for those; by default
            ``specs``: its values stand in for them where it is asked without a stage, as when its
            cost is estimated.

    Args:
        specs: the values served, one interface or a whole boundary; of every source.
        context: the context that ``predict`` will be given, None where there is none; the same.

    Example:
        A source of one's own, the running mean of the gradients seen, as a regression:

        >>> import torch
        >>> from torch import nn
        >>> from dni_fx.plan import TensorSpec
        >>> from dni_fx.sources import GradientSource, Prediction
        >>> class MeanGradient(GradientSource):
        ...     def __init__(self, specs, context=None):
        ...         super().__init__(specs, context)
        ...         self.mean = nn.Parameter(torch.zeros(self.specs[0].shape[1:]))
        ...     def predict(self, values, context=None):
        ...         guess = torch.zeros_like(values[0]) + self.mean
        ...         return Prediction((guess.detach(),), state=guess)
        ...     def fit(self, prediction, message):
        ...         return nn.functional.mse_loss(prediction.state, message[0])
        >>> source = MeanGradient([TensorSpec((4, 2), torch.float32)])
        >>> optimizer = torch.optim.SGD(source.parameters(), lr=1.0)
        >>> values = (torch.ones(4, 2),)
        >>> loss = source.fit(source(values), (torch.full((4, 2), 3.0),))
        >>> loss.backward()
        >>> optimizer.step()
        >>> source(values).gradients[0][0]
        tensor([3., 3.])

        Use it as ``dni_fx.decouple(model, cuts, gradients=MeanGradient)``.
    """

    takes_labels: ClassVar[bool] = False
    unit: float = 1.0
    ended: Tensor | None = None
    jacobian: Tensor | None = None

    def __init__(self, specs: Sequence[TensorSpec], context: TensorSpec | None = None) -> None:
        super().__init__()
        self.specs = self.input_specs = tuple(specs)
        self.context_spec = context

    def see_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """Called once, before the first step, for a source that asks for inputs: what it will see.

        Parameters whose shapes depend on that are made here.
        """
        self.input_specs = tuple(specs)

    def hand_on(self, source: GradientSource) -> None:
        """Tell a source that this one is made of what the trainer has told this one."""
        source.unit, source.ended, source.jacobian = self.unit, self.ended, self.jacobian

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Predict the gradient of each value.

        A source whose ``asks`` names ``inputs`` takes these as a third argument, ``inputs``.

        Args:
            values: the values served, detached; the batch may differ from the specs'.
            context: what the context callable made of the training target, or None.

        Returns:
            A gradient per value. With grad mode on, ``state`` keeps the graph that ``fit`` needs.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement predict(values, context)")

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """Learn from what came back; the caller runs ``backward`` on the loss and steps the
        optimiser.

        Args:
            prediction: what ``predict`` returned for the same values.
            message: what ``asks.learns_from`` names; finite, checked by the caller.

        Returns:
            A scalar loss with graph, or None where no parameter learns.
        """
        return None

    def fit_part(
        self, place: int, prediction: Prediction, message: tuple[Tensor, ...]
    ) -> Tensor | None:
        """As :meth:`fit`, for sources with a part for each consumer: one part learns.

        Args:
            place: which of the consumers, in ascending order of their stages.
            prediction: what ``predict`` returned for the same values.
            message: that consumer's gradient for each value.
        """
        raise NotImplementedError(
            f"{type(self).__name__} asks for each consumer's gradient and must implement "
            "fit_part(place, prediction, message)"
        )

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """For sources that wait: what to pull back now, besides what was pulled back at once.

        Args:
            prediction: what ``predict`` returned for the same values.
            awaited: what ``asks.wait.for_`` names.

        Returns:
            A gradient per value.
        """
        raise NotImplementedError(
            f"{type(self).__name__} waits and must implement complete(prediction, awaited)"
        )

    def forward(
        self,
        values: tuple[Tensor, ...],
        context: Tensor | None = None,
        inputs: tuple[Tensor, ...] | None = None,
    ) -> Prediction:
        """:meth:`predict`, checked, as one module call in an emitted function; with ``inputs`` for
        a source that asks for them.

        Raises:
            DecouplingError: ``predict`` returned no prediction, not one gradient per value, or one
                of another shape or dtype than its value.
        """
        seen = (values if inputs is None else inputs,) if self.asks.inputs else ()
        prediction: Any = self.predict(values, context, *seen)
        name, is_one = type(self).__name__, isinstance(prediction, Prediction)
        given: Any = prediction.gradients if is_one else ()
        if given is None and not self.asks.early:
            return prediction
        fits = is_one and isinstance(given, tuple) and len(given) == len(values)
        if not fits or not all(isinstance(gradient, Tensor) for gradient in given):
            found = f"Prediction({_described(given)})" if is_one else _described(prediction)
            raise DecouplingError(
                f"{name}.predict must return a Prediction with a tuple of one gradient per value "
                f"({len(values)} here; None only from a source that waits), such as "
                f"Prediction((gradient,)), but returned {found}"
            )
        for g, v in zip(given, values, strict=True):
            if g.shape != v.shape or g.dtype is not v.dtype:
                raise DecouplingError(
                    f"{name}.predict returned a gradient of shape {tuple(g.shape)}, {g.dtype} for "
                    f"a value of shape {tuple(v.shape)}, {v.dtype}: each must have its value's "
                    "shape, and be cast by .to(value.dtype) where that is another one"
                )
        return prediction

    @property
    def has_own_loss(self) -> bool:
        """Whether it learns, but not from the gradient: it says the slope of a loss of its own."""
        learns = any(p.requires_grad for p in self.parameters())
        return learns and "gradient" not in self.asks.learns_from

    def flops(self) -> int:
        """Floating-point operations (multiply-adds x 2) of one ``predict`` on the example batch.

        Counted on a copy without storage, so that nothing here changes.
        """
        seen = (self.input_specs,) if self.asks.inputs else ()
        return count_flops(self, self.specs, self.context_spec, *seen)


SourceFactory = Callable[[Sequence[TensorSpec], TensorSpec | None], GradientSource]


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, tuple | list):
        kinds = ", ".join(type(element).__name__ for element in found)
        return f"a {type(found).__name__}, {len(found)} of them: {kinds}"
    return repr(found)[:60]


def count_flops(
    source: Any, specs: Sequence[TensorSpec], *rest: TensorSpec | Sequence[TensorSpec] | None
) -> int:
    """Multiply-adds x 2 of one ``predict``, on a copy without storage; ``rest`` describes what it
    takes besides values.
    """

    def empty(spec: TensorSpec | Sequence[TensorSpec] | None) -> Any:
        if spec is None or isinstance(spec, TensorSpec):
            return spec and torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return tuple(map(empty, spec))

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(source).to("meta").predict(tuple(map(empty, specs)), *map(empty, rest))
    return int(counter.get_total_flops())


def wide_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    """Double for values in double, else single: half is too coarse for small steps of learning."""
    double = any(spec.dtype == torch.float64 for spec in specs)
    return torch.float64 if double else torch.float32


def like(gradient: Tensor, value: Tensor) -> Tensor:
    """``gradient`` in the dtype and memory format of ``value``; no copy where both agree.

    Raises:
        DecouplingError: their shapes differ; a copy would be broadcast.
    """
    if gradient.shape != value.shape:
        raise DecouplingError(
            f"a source computed a gradient of shape {tuple(gradient.shape)} for a value of shape "
            f"{tuple(value.shape)}: they must be equal"
        )
    gradient = gradient.to(value.dtype)
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def checked_share(name: str, value: Any, *, zero: bool = True) -> float:
    """The value, or an error where it is no number from 0 (itself only where allowed) to 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1 or not (zero or value):
        above = "" if zero else " and above 0"
        raise DecouplingError(f"{name} must be a number from 0 to 1{above}, not {value!r}")
    return float(value)
