"""Synthetic inputs: what a stage receives, predicted from the model's own inputs, so that it need
not wait for its predecessors' forward: it runs on ``h^``, and ``h`` is the target when it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .align_inputs import Lineup, feature_count
from .base import count_flops, wide_dtype
from .layers import affine, convolutions, make_layers, make_norms, run_layers
from .making import make
from .regression import update_scale


@dataclass
class InputPrediction:
    """What a source says that a stage will receive.

    Attributes:
        value: detached, of the value's dtype, and of its shape for this batch.
        state: what :meth:`InputSource.fit` needs; usually the raw output with its autograd graph.
    """

    value: Tensor
    state: Any = None


class InputSource(nn.Module):
    """Predicts one value from the model's inputs; the extension point for synthetic inputs.

    A subclass implements :meth:`predict` and :meth:`fit`. As in
    :class:`~dni_fx.sources.GradientSource`, parameters and buffers are created in ``__init__``, and
    neither method may draw from the global random number generator.

    Attributes:
        spec: the value, of the example batch.
        input_specs: the tensors among the model's inputs, in the order in which ``predict`` gets
            them.
    """

    def __init__(self, spec: TensorSpec, inputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.spec, self.input_specs = spec, tuple(inputs)

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        """Predict the value; with grad mode on, ``state`` keeps the graph that ``fit`` needs."""
        raise NotImplementedError(f"{type(self).__name__} must implement predict(inputs)")

    def fit(self, prediction: InputPrediction, real: Tensor) -> Tensor:
        """A scalar loss with graph, for what ``predict`` returned and the real value of the same
        batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fit(prediction, real)")

    def forward(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        return self.predict(inputs)

    def flops(self) -> int:
        """Floating-point operations (multiply-adds x 2) of one ``predict`` on the example batch."""
        return count_flops(self, self.input_specs)


class InputRegression(InputSource):
    r"""Regresses the value from the model's inputs :math:`x`, lined up with it by :class:`Lineup`.

    .. math::
        \hat h = s\, I(x; \psi), \qquad
        \mathcal L(\psi) = \operatorname{mean}\,\bigl(I(x; \psi) - h / s\bigr)^2

    with :math:`s` the running root mean square of the real values, 1 until one is known (buffer
    ``scale``; ``count``: the values in it, at most 100). Unlike a gradient's synthesizer its last
    layer does not start at zero: a batch of equal values has no variance for a batch normalisation
    to divide by.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, complete unlock: loss :math:`\|\hat h - h\|^2`, one
        hidden layer with batch normalisation. The scale, embeddings and coordinates are ours.

    Args:
        spec: the value.
        inputs: the model's inputs.
        hidden: number of hidden layers, with ReLUs.
        width: of each; by default the value's features, at least 64.
        norm: of the hidden layers, ``"batch"`` (by the batch's own statistics, in any mode) or
            ``"none"``.
        kernel: odd: size of the convolutions over a map; 0: the same affine layers at every
            position; None: 3 for maps if an input has as many dimensions of positions, else 0.
        buckets: ids are taken modulo this.

    Raises:
        DecouplingError: the value and the inputs do not line up; a number out of range.
    """

    scale: Tensor
    count: Tensor
    kind: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        inputs: Sequence[TensorSpec],
        *,
        hidden: int = 1,
        width: int | None = None,
        norm: str = "batch",
        kernel: int | None = None,
        buckets: int = 4096,
    ) -> None:
        super().__init__(spec, inputs)
        features = feature_count(spec.shape, spec.feature_dim)
        width = max(features, 64) if width is None else width
        if buckets < 1 or hidden < 0 or width < 1:
            raise DecouplingError(
                "a synthetic input needs at least 1 bucket, width 1 and 0 hidden layers, but got "
                f"{buckets=}, {width=}, {hidden=}"
            )
        dtype = wide_dtype([spec])
        self.lineup = Lineup(spec, self.input_specs, buckets, dtype)
        local, shared, space = self.lineup.local, self.lineup.shared, self.lineup.space
        if kernel is None:
            reference = self.lineup.reference
            kernel = 3 if reference is not None and len(reference.sizes) == space else 0
        if kernel and (not space or kernel < 0 or kernel % 2 == 0):
            raise DecouplingError(
                "'conv' needs maps (batch, channels, *space) and an odd kernel, but the value has "
                f"shape {spec.shape} with its features in dimension {spec.feature_dim}, and "
                f"{kernel=}. Use 'linear' or 'mlp' for other values."
            )
        self.kernel = kernel
        sizes = [local] + [width] * hidden + [features]
        layer = convolutions(space, kernel, dtype) if kernel else affine(dtype)
        self.layers = make_layers(sizes, shared, layer, False)
        self.norms = make_norms(norm, sizes[1:-1], dtype)
        self.register_buffer("scale", torch.ones((), dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=dtype))
        # Remembers the value's dtype; a buffer, so that casting the model casts it too.
        self.register_buffer("kind", torch.empty(0, dtype=spec.dtype), persistent=False)

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        """Scale times network; ``state`` is the network's output with its graph.

        Raises:
            DecouplingError: an input is not of the kind that the source was made for.
        """
        h, shared = self.lineup(inputs, self.scale.dtype)
        space = self.lineup.space
        h = h if space else h.movedim(1, -1)
        if shared is not None:
            shared = shared.view(shared.shape[0], *(1,) * (h.dim() - 2), -1)
        h = run_layers(self.layers, self.norms, h, shared, space)
        output = h if h.dim() == len(self.spec.shape) else h.squeeze(1)
        value = output.detach().to(self.scale.dtype) * self.scale
        return InputPrediction(value.to(self.kind.dtype), output)

    def fit(self, prediction: InputPrediction, real: Tensor) -> Tensor:
        """Mean squared error in units of the running scale, which is updated first.

        Raises:
            DecouplingError: the real value's shape differs from the prediction's.
        """
        if prediction.state.shape != real.shape:
            raise DecouplingError(
                f"a synthetic input of shape {tuple(prediction.state.shape)} for a real value of "
                f"shape {tuple(real.shape)}: its sizes follow the model inputs by the example's "
                "ratio, which does not hold here. Decouple with an example of such sizes, or leave "
                "this interface out of inputs."
            )
        real = real.detach().to(self.scale.dtype)
        update_scale(self.scale, self.count, (real,))
        return F.mse_loss(prediction.state.to(real.dtype), real / self.scale)


class LinearInput(InputRegression):
    """Affine in the inputs, at every token or pixel alike."""

    def __init__(
        self, spec: TensorSpec, inputs: Sequence[TensorSpec], *, buckets: int = 4096
    ) -> None:
        super().__init__(spec, inputs, hidden=0, kernel=0, buckets=buckets)


class MLPInput(InputRegression):
    """Hidden layers of ReLUs, at every token or pixel alike."""

    __init__ = partialmethod(InputRegression.__init__, kernel=0)


class ConvInput(InputRegression):
    """Convolutions over a map, and planes of what has no positions."""

    __init__ = partialmethod(InputRegression.__init__, kernel=3)


InputFactory = Callable[[TensorSpec, tuple[TensorSpec, ...]], InputSource]

INPUTS: dict[str, type[InputRegression]] = {
    "auto": InputRegression,
    "linear": LinearInput,
    "mlp": MLPInput,
    "conv": ConvInput,
}


def make_input(
    option: str | InputFactory, spec: TensorSpec, inputs: Sequence[TensorSpec]
) -> InputSource:
    """Make the source of synthetic inputs for one interface, as
    :func:`dni_fx.sources.make_source` does.

    Args:
        option: ``"auto"`` (``"conv"`` for maps where an input lines up with their space, else
            ``"mlp"``), ``"linear"``, ``"mlp"``, ``"conv"``, or a callable ``(spec, inputs) ->
            InputSource``; an InputSource class is one.
        spec: the value.
        inputs: the tensors among the model's inputs.

    Returns:
        A new source, on the CPU (or torch's default device).

    Raises:
        DecouplingError: unknown name; not a factory; a value that does not line up with the inputs.
    """
    arguments = {"spec": spec, "inputs": tuple(inputs)}
    return make(option, INPUTS, "synthetic input", InputSource, arguments)
