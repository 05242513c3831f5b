"""Sources that wait: for the true gradient, late or mixed in, and for the output's error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks, Wait
from .base import GradientSource, Prediction, SourceFactory, checked_share, like
from .making import make_source


class Delayed(GradientSource):
    r"""The true gradient of the same batch, some steps late: :math:`\theta_t` moves along
    :math:`\beta\,\delta_{t-d}\,\partial h_{t-d} / \partial\theta`.

    Each cut adds its own lag, so the first of K stages is ``steps`` (K - 1) steps behind, and
    learns nothing before.

    Args:
        specs, context: as for every source; the context is ignored.
        steps: lag, in steps; at least 1.
        shrink: :math:`\beta`; what arrives at the n-th cut from the end is shrunk n times (0.2 to
            0.8 in FDG).
        recompute: run the stage again on the batch of then with the weights of now (Features
            Replay: inputs are kept), else keep its graph and the weights that it used (DDG).
        predict_weights: run the stage's forward with the weights that the gradient will meet, as
            SGD's momentum, Adam or AdamW tells them; other optimisers are refused.

    Source:
        DDG: Huo et al. 2018, arXiv:1804.10574, eq. 8. Features Replay: Huo et al. 2018,
        arXiv:1807.04511, eq. 7. The shrinking factor: Zhuang et al. 2021, FDG, arXiv:1906.12108;
        its forward delay is not part of this source. Weight prediction: PipeOptim, Guan et al.
        2023, arXiv:2312.00839.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        steps: int = 1,
        shrink: float = 1.0,
        recompute: bool = True,
        predict_weights: bool = False,
    ) -> None:
        super().__init__(specs)
        wait = Wait(_checked_lag(steps), recompute=recompute, predict_weights=predict_weights)
        self.asks = Asks(learns_from=(), wait=wait)
        self.shrink = checked_share("the shrinking factor", shrink, zero=False)

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Nothing yet."""
        return Prediction(None)

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The true gradient, shrunk."""
        return awaited if self.shrink == 1 else tuple(g * self.shrink for g in awaited)


class Wrapping(GradientSource):
    """Base of the sources that put the true gradient beside another source's, which is made from a
    name or factory, and learns as it would by itself.
    """

    takes_labels = True  # where what it is made of does

    def __init__(
        self, specs: Sequence[TensorSpec], context: TensorSpec | None, source: str | SourceFactory
    ) -> None:
        super().__init__(specs, context)
        self.source = make_source(source, specs, context)
        if not self.source.asks.at_once or self.source.asks.exact:
            raise DecouplingError(
                f"{type(self).__name__} needs a source that predicts at once, such as 'linear' or "
                f"'local', not {type(self.source).__name__}"
            )
        self.asks = self.source.asks

    def see_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """The other source sees them."""
        super().see_inputs(specs)
        self.source.see_inputs(specs)

    def predict(
        self,
        values: tuple[Tensor, ...],
        context: Tensor | None = None,
        inputs: tuple[Tensor, ...] | None = None,
    ) -> Prediction:
        """What the other source predicts."""
        self.hand_on(self.source)
        return self.source(values, context, inputs)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """As the other source learns."""
        return self.source.fit(prediction, message)

    def flops(self) -> int:
        """The other source's."""
        return self.source.flops()


class Corrected(Wrapping):
    r"""A prediction at once, and what was wrong with it when the true gradient arrives: first
    :math:`\hat g_t`, then :math:`w\,(\beta\,\delta_{t-d} - \hat g_{t-d})` on the batch of then.

    With a weight of 1 every batch has over time moved the stage by its true gradient, as with
    :class:`Delayed`, but its first part came without delay. The difference is a control variate's:
    small where the source is good. It is stale all the same, and harms the more the later it comes,
    so by default its weight is :math:`w = 1 / (1 + d)`. What it sends back to the stages before has
    its whole weight: they weight it themselves, by their own delay.

    Args:
        source: name or factory of the source that predicts.
        weight: :math:`w`, from 0 (exclusive) to 1, or ``"delay"``, where d counts the updates since
            the stage's forward.
        steps, shrink, recompute, predict_weights: as for :class:`Delayed`.

    Source:
        Ours.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        source: str | SourceFactory = "auto",
        weight: float | str = "delay",
        steps: int = 1,
        shrink: float = 1.0,
        recompute: bool = True,
        predict_weights: bool = False,
    ) -> None:
        super().__init__(specs, context, source)
        lag = _checked_lag(steps)
        options: Any = {"recompute": recompute, "predict_weights": predict_weights}
        self.asks = replace(self.asks, wait=Wait(lag, corrects=True, weight=weight, **options))
        self.shrink = checked_share("the shrinking factor", shrink, zero=False)

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The true gradient, shrunk, without what was pulled back already."""
        assert prediction.gradients is not None
        pairs = zip(awaited, prediction.gradients, strict=True)
        return tuple(like(self.shrink * true - guess, guess) for true, guess in pairs)


class Mix(Wrapping):
    r"""BP(λ): the stage waits for its gradient, locked, and takes :math:`\bar g = \lambda\,\delta +
    (1 - \lambda)\,\hat g`; the source is regressed to what arrives, itself mixed.

    λ = 1 is backpropagation, bit for bit; λ = 0 is the source alone. With ``steps`` nothing waits:
    :math:`(1 - \lambda) \hat g_t` is pulled back at once and :math:`\lambda\,\delta_{t-d}` when it
    is there, on the batch of then.

    Args:
        source: name or factory of the source that predicts.
        share: λ, from 0 to 1.
        steps: lag of the true gradient; 0 waits for it within the step.
        at_once: with ``steps``: whether the predicted part goes ahead; else both come late, in one
            backward.
        recompute, predict_weights: as for :class:`Delayed`.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, appendix A. The late forms are ours.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        source: str | SourceFactory = "auto",
        share: float = 0.5,
        steps: int = 0,
        at_once: bool = True,
        recompute: bool = True,
        predict_weights: bool = False,
    ) -> None:
        super().__init__(specs, context, source)
        lag = 0 if steps == 0 else _checked_lag(steps)
        early = lag > 0 and at_once
        wait = Wait(lag, recompute=recompute, corrects=early, predict_weights=predict_weights)
        self.asks = replace(self.asks, wait=wait)
        self.share = checked_share("Mix's share of the true gradient", share)

    def predict(
        self,
        values: tuple[Tensor, ...],
        context: Tensor | None = None,
        inputs: tuple[Tensor, ...] | None = None,
    ) -> Prediction:
        """The other source's prediction: its share, or held back where the stage waits."""
        made = super().predict(values, context, inputs)
        early = None
        if self.asks.early and made.gradients is not None:
            early = tuple(gradient * (1 - self.share) for gradient in made.gradients)
        return Prediction(early, made, made.loss, made.logits, guess=made.gradients)

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mixed gradients, the true ones themselves for a share of 1; the true one's share where it
        comes late.
        """
        if self.asks.early:
            return tuple(self.share * gradient for gradient in awaited)
        return mix(self.share, awaited, prediction.state.gradients)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """As the other source learns, from its own prediction."""
        return super().fit(prediction.state, message)


class Feedback(GradientSource):
    r"""Control: direct feedback alignment, the output's error through a fixed random matrix,
    :math:`\hat g = B\,\partial L / \partial y`.

    The stage waits for the output's error, but for no backward pass of the stages behind it.

    Args:
        specs: the values served.
        context: tells the number of outputs, where ``outputs`` does not.
        outputs: elements of one sample's output.
        scale: size of a sample's gradient over that of its error, in the mean.
        seed: of B, drawn once from a normal distribution.

    Source:
        Nøkland 2016, arXiv:1609.01596, eq. 7.
    """

    asks = Asks(learns_from=(), wait=Wait(0, for_=("error",)))

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        outputs: int | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(specs)
        outputs = outputs or (None if context is None else math.prod(context.shape[1:]))
        if not outputs:
            raise DecouplingError(
                "'feedback' needs the number of the model's outputs: pass "
                "context=dni_fx.one_hot(classes), or functools.partial(dni_fx.sources.Feedback, "
                "outputs=...) as the source"
            )
        for spec in self.specs:
            if spec.batch_dim:
                raise DecouplingError(
                    f"'feedback' projects each sample's error, but the batch of a value of shape "
                    f"{spec.shape} is dimension {spec.batch_dim}: let the model put it first, "
                    f"value.transpose(0, {spec.batch_dim}), and cut after that"
                )
        generator = torch.Generator().manual_seed(seed)
        self.outputs = outputs
        for index, spec in enumerate(self.specs):
            elements = max(math.prod(spec.shape[1:]), 1)
            drawn = torch.randn(outputs, elements, generator=generator, device="cpu")
            self.register_buffer(f"matrix_{index}", drawn * (scale / math.sqrt(elements)))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Nothing yet; the values are kept for their shapes."""
        return Prediction(None, values)

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Project the error.

        Raises:
            DecouplingError: the output, or a value, has another number of elements per sample than
                B.
        """
        error = awaited[0].reshape(awaited[0].shape[0], -1)
        found = []
        for index, value in enumerate(prediction.state):
            matrix: Tensor = getattr(self, f"matrix_{index}")
            elements = value.numel() // value.shape[0] if value.dim() else 1
            if (*error.shape, elements) != (*value.shape[:1], *matrix.shape):
                raise DecouplingError(
                    f"'feedback' was made for {matrix.shape[0]} outputs and {matrix.shape[1]} "
                    f"elements a sample, but the output has shape {tuple(awaited[0].shape)} and "
                    f"the value {tuple(value.shape)}"
                )
            found.append(like((error.to(matrix.dtype) @ matrix).view(value.shape), value))
        return tuple(found)

    def flops(self) -> int:
        """2 x outputs x elements."""
        return sum(2 * self.outputs * math.prod(spec.shape) for spec in self.specs)


def mix(share: float, true: Sequence[Any], guess: Sequence[Tensor] | None) -> tuple[Any, ...]:
    """``share`` of the true gradients and the rest of the guessed ones; untouched where the share
    is 1.
    """
    if share == 1 or guess is None:
        return tuple(true)
    if share == 0:
        return tuple(guess)
    return tuple(like(share * t + (1 - share) * g, g) for t, g in zip(true, guess, strict=True))


def _checked_lag(steps: Any) -> int:
    if type(steps) is not int or steps < 1:
        raise DecouplingError(
            f"a late gradient needs a whole number of steps, at least 1, not {steps!r}"
        )
    return steps
