"""BP(λ) through time: a linear source that learns online from all later windows, by eligibility
traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DecouplingError
from ..plan import TensorSpec
from .asks import Asks
from .base import Prediction
from .regression import Linear

MOST_ELEMENTS = 2**27  # of the traces: half a gigabyte in single precision


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
        if not isinstance(decay, int | float) or not 0 <= decay <= 1:
            raise DecouplingError(f"Traces needs a decay from 0 to 1, not {decay!r}")
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
        self.decay, self.factor = float(decay), 1.0  # the factor is set by who uses the prediction
        self._traces: Tensor | None = None

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """As the regression; ``fit`` needs the state, its Jacobian and what ends, too."""
        prediction = super().predict(values, context)
        prediction.state = (*prediction.state, values[0], self.jacobian, self.ended)
        return prediction

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """Learn from the target of one window.

        Args:
            prediction: what ``predict`` returned.
            message: the target ``(batch, features)``.

        Returns:
            The mean squared error, whose gradient is that of the traces.
        """
        (target,) = message
        output, state, jacobian, ended = prediction.state
        _, (inverse,) = self.rescale((output,), message)
        wanted = target.detach().to(output.dtype) * inverse.to(output.dtype)
        error = wanted - output.detach()
        seen = F.pad(state.detach().to(output.dtype), (0, 1), value=1.0)
        features = output.shape[1]
        traces = torch.einsum(
            "ip,bq->bipq", torch.eye(features, dtype=output.dtype, device=output.device), seen
        )
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
        loss: Tensor = error.square().mean() + (slope - slope.detach())
        return loss


def _without(tensor: Tensor, ended: Tensor | None) -> Tensor:
    """Zero for the samples whose sequence has ended."""
    if ended is None:
        return tensor
    return tensor.masked_fill(ended.view(-1, *(1,) * (tensor.dim() - 1)), 0.0)
