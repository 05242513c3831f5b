"""The source between two windows of a sequence, one for all tensors of the state; and BP(λ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import GradientSource, Prediction, SourceFactory, checked_share, like
from .keeping import kept_weights
from .making import make_source
from .regression import MLP, Linear

MOST_ELEMENTS = 2**27  # of the traces: half a gigabyte in single precision


def side_by_side(values: Sequence[Tensor], specs: Sequence[TensorSpec]) -> Tensor:
    """All tensors of a state as one, ``(batch, features)``, in a dtype that holds each of them."""
    parts = [
        value.movedim(spec.batch_dim, 0).flatten(1) if value.dim() > 1 else value[:, None]
        for value, spec in zip(values, specs, strict=True)
    ]
    return torch.cat([part.to(_common_dtype(specs)) for part in parts], 1)


def _common_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    return reduce(torch.promote_types, [spec.dtype for spec in specs])


class AcrossTime(GradientSource):
    r"""Predicts what the rest of a sequence would send back to the state at the end of a window.

    .. math::
        \frac{\partial L}{\partial\theta} \approx
        \sum_{\tau \le t} \frac{\partial L_\tau}{\partial\theta}
        + \alpha\, \hat g_t\, \frac{\partial s_t}{\partial\theta}, \qquad \hat g_t = M(s_t)

    The target of :math:`\hat g_t` is what the next window sends back to its first state: its own
    losses' gradient, and :math:`\alpha \hat g_{t+T}` pulled back through it. All tensors of the
    state are put side by side, ``(batch, features)``, for another source that predicts. Where the
    sequence ends the target is zero, and nothing is pulled back.

    With ``auxiliary`` the state must tell the next prediction, too: :math:`A(s_t) \approx \hat
    g_{t+T}`, both in units of its size. That loss is one of the next window's, so its gradient is
    part of the target.

    Args:
        specs, context: as for every source; the specs are the state's tensors.
        source: name or factory of the source that predicts; ``"auto"`` is an MLP with one hidden
            layer as wide as the state, batch-normalised, without which it learnt next to nothing on
            the copy task.
        factor: :math:`\alpha`, on use.
        auxiliary: weight of the auxiliary loss.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, section 2.2 and the recurrent experiments; the
        factor 0.1 is theirs.
    """

    takes_labels = True  # where what it is made of does

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        source: str | SourceFactory = "auto",
        factor: float = 0.1,
        auxiliary: float = 0.0,
    ) -> None:
        super().__init__(specs, context)
        batches = [spec.shape[spec.batch_dim] for spec in self.specs]
        size = sum(math.prod(s.shape) // b for s, b in zip(self.specs, batches, strict=True))
        dtype = _common_dtype(self.specs)
        joined = TensorSpec((batches[0], size), dtype)
        if source == "auto":
            source = partial(MLP, hidden=1, width=max(size, 64), norm="batch")
        self.source = make_source(source, (joined,), context)
        asked = self.source.asks
        plain = replace(asked, ends=False, jacobian=False, inputs=None)
        if plain not in (Asks(), Asks(learns_from=())):
            raise DecouplingError(
                f"{type(self.source).__name__} cannot serve the state between windows: there a "
                "source must predict at once and learn from gradients alone, such as 'auto', "
                "'mlp', 'linear', 'zero' or 'stale'"
            )
        if auxiliary and asked.jacobian:
            raise DecouplingError(
                "auxiliary= does not go with Traces, which learns online from targets alone"
            )
        self.factor, self.auxiliary = float(factor), float(auxiliary)
        heard = ("gradient",) if self.auxiliary else asked.learns_from
        self.asks = replace(asked, learns_from=heard, ends=True)
        if isinstance(self.source, Traces):
            self.source.factor = self.factor
        self._latest = torch.zeros(())
        self.teller = nn.Linear(size, size, dtype=dtype) if self.auxiliary else None

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
        """``factor`` times the prediction, zero for samples whose sequence ends."""
        joined = side_by_side(values, self.specs)
        with kept_weights(self.source):  # they are updated before the target comes
            self.hand_on(self.source)
            inner = self.source((joined,), context, inputs)
        assert inner.gradients is not None
        guess = inner.gradients[0]
        if self.ended is not None:
            guess = guess.masked_fill(self.ended[:, None], 0.0)
        self._latest = guess
        used = guess if self.factor == 1 else guess * self.factor
        state = (inner, joined, self.ended)
        return Prediction(self._part(used, values), state, guess=self._part(guess, values))

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        """As the other source learns; with the auxiliary loss, its gradient is in the targets."""
        inner, joined, ended = prediction.state
        if not self.asks.learns_from:
            return self.source.fit(inner, ())
        target = side_by_side(message, self.specs)
        if self.teller is None:
            return self.source.fit(inner, (target,))
        state = joined.detach().requires_grad_()
        latest = self._latest if self._latest.shape == joined.shape else torch.zeros_like(joined)
        size = latest.square().mean().sqrt()
        wrong = self.teller(state) - latest / size.clamp(min=torch.finfo(size.dtype).tiny)
        if ended is not None:  # no next prediction is of the same sequence
            wrong = wrong.masked_fill(ended[:, None], 0.0)
        loss = self.auxiliary * wrong.square().mean()
        (gradient,) = torch.autograd.grad(loss, state, retain_graph=True)
        heard = (target + gradient,) if self.source.asks.learns_from else ()
        fitted = self.source.fit(inner, heard)
        return loss if fitted is None else loss + fitted

    def flops(self) -> int:
        """The other source's, and the auxiliary prediction's."""
        batch = self.specs[0].shape[self.specs[0].batch_dim]
        told = 0 if self.teller is None else 2 * batch * self.teller.weight.numel()
        return self.source.flops() + told

    def _part(self, joined: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found, first = [], 0
        for value, spec in zip(values, self.specs, strict=True):
            front = value.movedim(spec.batch_dim, 0)
            count = front[0].numel() if len(front) else 0
            part = joined[:, first : first + count].reshape(front.shape).movedim(0, spec.batch_dim)
            found.append(like(part, value))
            first += count
        return tuple(found)


class Traces(Linear):
    r"""Affine in the state, :math:`\hat g_t = W [s_t, 1]`, regressed to λ-weighted targets without
    keeping old windows.

    .. math::
        \delta_t &= \frac{\partial L_{t+1}}{\partial s_t}
        + \alpha J_{t+1}^\top \hat g_{t+1} - \hat g_t, \qquad
        J_t = \frac{\partial s_t}{\partial s_{t-1}} \\
        e_t &= \frac{\partial \hat g_t}{\partial W} + \alpha\lambda J_t e_{t-1}, \qquad
        \Delta W \propto \delta_t^\top e_t

    λ = 0 is the bootstrapped regression of :class:`Linear`; with λ = 1 and α = 1 the bootstraps
    cancel, and the sum over a whole sequence is the regression to the true gradient of full
    backpropagation through time, as far as W stands still meanwhile. A trace has ``batch x state^2
    x (state + 1)`` elements and a window costs one more backward pass for each feature of the
    state, so this is for small states. It serves the state between windows only.

    Args:
        specs: the state's tensors side by side, one value ``(batch, features)``.
        context: ignored.
        decay: λ, from 0 to 1.

    Source:
        Pemberton & Costa 2024, BP(λ), Transactions on Machine Learning Research, algorithm 1.
    """

    asks = Asks(ends=True, jacobian=True)

    def __init__(
        self, specs: Sequence[TensorSpec], context: TensorSpec | None = None, *, decay: float = 1.0
    ) -> None:
        super().__init__(specs)
        self.decay = checked_share("the decay of Traces", decay)
        if len(self.specs[0].shape) != 2:
            raise DecouplingError(
                "Traces serves the state between windows, not a cut within one: ask for it by the "
                "state's interfaces, gradients={'next_...': Traces}"
            )
        batch, features = self.specs[0].shape
        if (count := batch * features * features * (features + 1)) > MOST_ELEMENTS:
            raise DecouplingError(
                f"the traces of a state of {features} features and a batch of {batch} would have "
                f"{count:.1e} elements, more than {MOST_ELEMENTS:.1e}; use a smaller state or "
                "batch, or 'linear'"
            )
        self.factor = 1.0  # set by who uses the prediction
        self._traces: Tensor | None = None

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """As the regression; ``fit`` needs the state, its Jacobian and what ends, too."""
        prediction = super().predict(values, context)
        prediction.state = (*prediction.state, values[0], self.jacobian, self.ended)
        return prediction

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """The mean squared error of one window's target, whose gradient is that of the traces."""
        (target,) = message
        output, state, jacobian, ended = prediction.state
        _, (inverse,) = self.rescale((output,), message)
        wanted = target.detach().to(output.dtype) * inverse.to(output.dtype)
        error = wanted - output.detach()
        seen = F.pad(state.detach().to(output.dtype), (0, 1), value=1.0)
        eye = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        traces = torch.einsum("ip,bq->bipq", eye, seen)
        known = self._traces is not None and self._traces.shape == traces.shape
        if jacobian is not None and known:
            # Where a sequence ends nothing was bootstrapped from, so earlier windows have nothing
            # to learn there.
            weighted = self.factor * self.decay * _without(jacobian.to(output.dtype), ended)
            traces += torch.einsum("bij,bjpq->bipq", weighted, self._traces)
        step = torch.einsum("bi,bipq->pq", error, traces) * (2 / error.numel())
        self._traces = _without(traces, ended)
        layer: Any = self.networks[0].layers[0]  # type: ignore[index]
        slope = -(layer.weight * step[:, :-1]).sum() - (layer.bias * step[:, -1]).sum()
        return error.square().mean() + (slope - slope.detach())


def _without(tensor: Tensor, ended: Tensor | None) -> Tensor:
    """Zero for the samples whose sequence has ended."""
    if ended is None:
        return tensor
    return tensor.masked_fill(ended.view(-1, *(1,) * (tensor.dim() - 1)), 0.0)
