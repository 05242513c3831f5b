"""Loss heads: small networks that guess the loss from what crosses a cut and the label; their
gradient is pulled back.

A synthesizer that regresses gradients must find out how the loss depends on the label; a head is
told. Except in Sobolev training, messages are a few numbers per sample, where a gradient is as
large as its value. Of two values that cross a cut together, say a block's output and its skip
connection, either says little alone: a head may serve a whole boundary jointly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import GradientSource, Prediction, like, wide_dtype
from .checking import (
    check_reached,
    has_classes,
    has_slope,
    no_classes,
    no_slope,
    refuse_labels,
)
from .context import check_batch_first
from .head_networks import Encoder, HandedOver, RunningScale

Loss = Callable[[Tensor, Tensor], Tensor]


class Evaluation(NamedTuple):
    """The ``state`` of a head's prediction: one forward, with its graph."""

    logits: Tensor  # (batch, *positions, k); positions are the context's
    losses: Tensor  # (batch,), each sample's
    mean: Tensor  # the scalar whose gradient was predicted
    weights: Tensor  # (batch, *positions), of each in the mean; 0 for ignored labels
    gradients: tuple[Tensor, ...]  # of ``mean``, with a graph; none where no head learns from them


class LossHead(GradientSource):
    r"""Base of the heads: logits :math:`p = W [e_1(h_1), \dots, e_n(h_n)] + b` of one or several
    values, jointly.

    .. math::
        \hat g_i = \frac{\partial}{\partial h_i}
        \operatorname{mean} \ell(p(h_1, \dots, h_n; \phi), c)

    Maps ``(batch, channels, *space)`` are encoded by convolutions, other values ``(batch, ...,
    features)`` by the same layers at every position; then come means over all positions that the
    context lacks. So labels ``(batch, k)`` give logits ``(batch, k)``, and a context per token
    ``(batch, time, k)`` or per pixel ``(batch, height, width, k)`` gives logits of its own shape.
    Values of shape ``(batch,)`` count as one feature.

    A sample's loss is the mean over its positions, and the mean loss that over all positions of the
    batch, as in ``torch.nn.functional.cross_entropy``. For cross entropy, rows of the context that
    are all 0 are ignored labels: they count in neither mean, and a batch of nothing else has loss
    0. What a head learns from is its subclass's.

    Args:
        specs: the values served.
        context: the context, with as many features as the model has outputs. Required.
        loss: ``"cross_entropy"`` with the context as probabilities, ``"mse"`` to the context, or a
            callable ``(logits, context) -> losses`` of shape ``(batch, *positions)`` or
            ``(batch,)``.
        hidden: number of hidden layers of each encoder: convolution 3 (or linear), normalisation
            (maps only), ReLU; by default 2 for maps and 1 for others.
        width: features of the first one, further ones have ``stride`` times as many, up to 256; by
            default the value's times ``stride`` for maps, and the value's, at least 64, for others.
        stride: of each convolution; 1 where the context has positions, since these are kept.
        norm: ``"batch"``: by the batch's own mean and variance, in any mode; ``"none"``.
        factor: multiplies the gradients on use.

    Raises:
        DecouplingError: no context, scalars, a context that does not line up, or options that do
            not exist; a loss without a slope, such as cross entropy over one logit; when called:
            cross entropy with a context that is no class probabilities.
    """

    create_graph: ClassVar[bool] = False  # of the gradients, to be fitted themselves
    # The label loss is all that is learnt: one backward gives everything.
    greedy: ClassVar[bool] = False

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        loss: str | Loss = "cross_entropy",
        hidden: int | None = None,
        width: int | None = None,
        stride: int = 2,
        norm: str = "batch",
        factor: float = 1.0,
    ) -> None:
        super().__init__(specs, context)
        refuse_labels(self)
        if context is None or not context.shape or any(not spec.shape for spec in self.specs):
            found = "has no context" if context is None or not context.shape else "serves a scalar"
            raise DecouplingError(
                f"{type(self).__name__} is a loss head: it needs labels, and values with a batch "
                f"dimension, but {found}. Pass context=dni_fx.one_hot(classes) to decouple, or use "
                "'linear' or 'delayed' here."
            )
        if not callable(loss) and loss not in ("cross_entropy", "mse"):
            raise DecouplingError(
                f"unknown loss {loss!r}; known: 'cross_entropy', 'mse', or a callable"
            )
        if loss == "cross_entropy" and context.shape[-1] == 1:
            raise no_slope(self, "the context has one feature, and cross entropy over one logit")
        self.loss, self.factor, self.context_shape = loss, factor, tuple(context.shape)
        self._own = callable(loss) or type(self).evaluate is not LossHead.evaluate
        # Whether the loss is known to have a slope, or the context to be what it takes.
        self._is_judged = not self._own and loss == "mse"
        dtype = wide_dtype(self.specs)
        stride = stride if len(self.context_shape) == 2 else 1
        encoders = [Encoder(spec, hidden, width, stride, norm, dtype) for spec in self.specs]
        for spec, encoder in zip(self.specs, encoders, strict=True):
            check_batch_first(spec, self.context_shape)
            encoder.line_up(spec.shape, self.context_shape)
        self.encoders = nn.ModuleList(encoders)
        inputs = sum(e.outputs for e in encoders)
        self.output = nn.Linear(inputs, self.context_shape[-1], dtype=dtype)

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Gradients of the mean loss; ``state`` is an :class:`Evaluation`.

        Raises:
            DecouplingError: a value or the context is not of the kind that the head was made for.
        """
        rank, features = len(self.context_shape), self.context_shape[-1]
        if context is None or context.dim() != rank or context.shape[-1] != features:
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            raise DecouplingError(
                f"a loss head was made for a context like {self.context_shape}, but got {got}. "
                "Pass target= to Trainer.step, or context= to stage.step; the rank and features of "
                "a context may not change."
            )
        keep, dtype = torch.is_grad_enabled(), self.output.weight.dtype
        learnt: list[nn.Parameter] = []
        if keep and self.greedy:
            learnt = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad():
            # In the head's dtype at once: gradients of mean losses are too small for float16.
            leaves = [value.detach().to(dtype).requires_grad_() for value in values]
            # Views, since FlopCounterMode hooks what a module is given, which autograd.grad does
            # not allow for leaves.
            logits = self.logits([leaf.view_as(leaf) for leaf in leaves], context)
            losses, mean, weights = self.evaluate(logits, context.detach().to(dtype))
            if not self._is_judged:
                self._is_judged = self._judge(mean, logits, context.detach().to(dtype))
            retain, again = keep and not self.greedy, keep and self.create_graph
            wanted = (*leaves, *learnt)
            found = torch.autograd.grad(mean, wanted, None, retain, again, allow_unused=True)
            check_reached(self, found[: len(leaves)])
            if keep and self.greedy:  # of a head that is frozen nothing is left to pull back
                mean = mean.detach()
                if learnt:
                    mean = HandedOver.apply(mean, found[len(leaves) :], *learnt)
        factor = self.unit * self.factor
        gradients = tuple(
            like(g.detach() * factor, value) for g, value in zip(found, values, strict=False)
        )
        state = Evaluation(logits, losses, mean, weights, found if self.create_graph else ())
        return Prediction(gradients, state, losses.detach(), logits.detach())

    def _judge(self, mean: Tensor, logits: Tensor, context: Tensor) -> bool:
        if self._own:
            return has_slope(self, mean, logits, context)
        return has_classes(self, context)

    def check_example(self, not_classes: str) -> None:
        """Refuse an example of a context, told why it is no class probabilities, where they are
        needed.
        """
        if not_classes and not self._own and self.loss == "cross_entropy":
            raise no_classes(self, not_classes)

    def logits(self, values: Sequence[Tensor], context: Tensor) -> Tensor:
        """Logits ``(batch, *positions, k)``, in the parameters' dtype."""
        shape = tuple(context.shape)
        pairs = zip(self.encoders, values, strict=True)
        encoded = [encoder(value, shape) for encoder, value in pairs]
        if len(encoded) == 1 and encoded[0].shape[:-1] == shape[:-1]:  # nothing to broadcast
            alone: Tensor = self.output(encoded[0])
            return alone.to(self.output.weight.dtype)
        lead = torch.broadcast_shapes(shape[:-1], *(e.shape[:-1] for e in encoded))
        joined = encoded[0]
        if len(encoded) > 1:
            joined = torch.cat([e.expand(*lead, -1) for e in encoded], -1)
        logits: Tensor = self.output(joined).to(self.output.weight.dtype)
        return logits.expand(*lead, -1)

    def evaluate(self, logits: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, mean and weights of an :class:`Evaluation`."""
        lead = logits.shape[:-1]
        counts = logits.new_ones(lead)
        if self.loss == "cross_entropy":
            losses = -(context * F.log_softmax(logits, -1)).sum(-1)
            counts = (context != 0).any(-1).to(logits.dtype).expand(lead)
        elif self.loss == "mse":
            losses = (logits - context).square().mean(-1)
        else:
            losses = self.loss(logits, context)  # type: ignore[operator]
        weights = counts / counts.sum().clamp(min=1)
        if losses.shape == lead:
            total = (losses * weights).sum()
            if len(lead) == 1:
                return losses * counts, total, weights
            flat = counts.flatten(1)
            each = (losses.reshape(flat.shape) * flat).sum(1) / flat.sum(1).clamp(min=1)
            return each, total, weights
        if losses.shape != lead[:1]:
            raise DecouplingError(
                f"the loss of a head returned shape {tuple(losses.shape)} for logits of shape "
                f"{tuple(logits.shape)}: it must return a loss per position, {tuple(lead)}, or per "
                f"sample, {tuple(lead[:1])}"
            )
        return losses, losses.mean(), weights


class Local(LossHead):
    r"""Greedy: the head learns from the labels alone, :math:`\mathcal L(\phi) = \operatorname{mean}
    \ell(p, c)`.

    Nothing comes back over the cut. Arguments as for :class:`LossHead`.

    Source:
        Belilovsky et al. 2019, arXiv:1901.08164 (decoupled greedy learning).
    """

    asks = Asks(learns_from=())
    greedy = True

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """The mean label loss; its gradient for the head was found with that for the values."""
        return prediction.state.mean


class Critic(LossHead):
    r"""The head learns each sample's loss: :math:`\mathcal L(\phi) = \operatorname{mean}_b
    |\ell(p_b, c_b) - L_b|`.

    :math:`L_b` is the loss as the next head estimates it, the true one before the last stage.

    Args:
        distance: ``"l1"`` or ``"l2"``: mean absolute or squared difference.
        specs, context, **options: as for :class:`LossHead`.

    Source:
        Lee et al. 2021, arXiv:2102.01963 (local critic training); Czarnecki et al. 2017,
        arXiv:1706.04859 (critic).
    """

    asks = Asks(learns_from=("loss",))

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        distance: str = "l1",
        **options: Any,
    ) -> None:
        super().__init__(specs, context, **options)
        known = {"l1": F.l1_loss, "l2": F.mse_loss}
        if distance not in known:
            raise DecouplingError(
                f"unknown distance {distance!r} between losses; known: 'l1', 'l2'"
            )
        self.distance = known[distance]

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """The mean distance of the losses.

        Raises:
            DecouplingError: the message does not end with a loss per sample.
        """
        losses, target = prediction.state.losses, message[-1]
        if target.shape != losses.shape:
            raise DecouplingError(
                f"losses of shape {tuple(target.shape)} came back to a head whose own have shape "
                f"{tuple(losses.shape)}: a critic learns from one loss per sample"
            )
        return self.distance(losses, target.detach().to(losses.dtype))


class Sobolev(Critic):
    r"""A critic that learns gradients too: adds :math:`w \sum_i \operatorname{mean} (\hat g_i -
    \delta_i)^2 / s_i^2`.

    :math:`\delta_i` is the gradient that came back, :math:`s_i` its running root mean square as in
    :class:`~dni_fx.sources.Regression`, and :math:`\hat g` is taken without ``factor``. The
    backward of ``fit`` differentiates twice, so the head's loss needs a second derivative.

    Args:
        weight: :math:`w`.
        specs, context, **options: as for :class:`Critic`.

    Source:
        Czarnecki et al. 2017, arXiv:1706.04859, section on synthetic gradients. The normalisation
        is ours.
    """

    asks = Asks(learns_from=("gradient", "loss"))
    create_graph: ClassVar[bool] = True

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(specs, context, **options)
        self.weight, self.running = weight, RunningScale(self.specs)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """The critic's loss plus the weighted error of the gradients, whose scale it updates.

        Raises:
            DecouplingError: the message is not a gradient per value, then a loss per sample.
        """
        gradients = [gradient * self.unit for gradient in prediction.state.gradients]
        loss = super().fit(prediction, message)
        return loss + self.weight * self.running.compare(gradients, message[:-1])


class Distill(LossHead):
    r"""The head learns the next head's logits, the model's before the last stage, and the labels.

    .. math::
        \mathcal L(\phi) = T^2 \operatorname{mean} \mathrm{KL}\bigl(
        \operatorname{softmax}(q / T) \,\|\, \operatorname{softmax}(p / T)\bigr)
        + \lambda \operatorname{mean} \ell(p, c)

    with :math:`q` the logits that came back. For ``loss="mse"`` the first term is the mean of
    :math:`(p - q)^2`. Positions with ignored labels count in neither term.

    Args:
        specs: the values served.
        context: the context, with as many features as the model's output. Required.
        temperature: :math:`T`.
        labels: :math:`\lambda`; 0 to learn from the logits alone.
        specs, context, **options: as for :class:`LossHead`.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2. The chain of heads is ours.
    """

    asks = Asks(learns_from=("logits",))

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        temperature: float = 1.0,
        labels: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(specs, context, **options)
        if self.loss != "mse" and self.context_shape[-1] == 1:
            raise no_slope(self, "the context has one feature, and the divergence of one logit")
        self.temperature, self.labels = temperature, labels

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """Divergence from the logits that came back, whose features are last, or second as models
        of maps have them.

        Raises:
            DecouplingError: logits of another shape.
        """
        own, target = prediction.state.logits, message[0]
        if target.shape != own.shape and target.dim() > 2:
            target = target.movedim(1, -1)
        if target.shape != own.shape:
            raise DecouplingError(
                f"logits of shape {tuple(message[0].shape)} came back to a head whose own have "
                f"shape {tuple(own.shape)}: 'distill' needs a model output with as many features "
                "as the context has, at the context's positions. Use 'local'."
            )
        target = target.detach().to(own.dtype)
        if self.loss == "mse":
            distances = (own - target).square().mean(-1)
        else:
            log_p, log_q = [F.log_softmax(p / self.temperature, -1) for p in (own, target)]
            kl = F.kl_div(log_p, log_q, reduction="none", log_target=True)
            distances = self.temperature**2 * kl.sum(-1)
        loss: Tensor = (distances * prediction.state.weights).sum()
        return loss + self.labels * prediction.state.mean if self.labels else loss
