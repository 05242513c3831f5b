"""Synthesizers for maps, where a gradient depends on the neighbourhood."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DecouplingError
from ..plan import TensorSpec
from .layers import convolutions, make_layers, make_norms
from .regression import Network, Regression


class ConvNetwork(Network):
    """Convolutions with ReLUs between them, zero padded to the same size; the last starts at 0."""

    def __init__(
        self,
        spec: TensorSpec,
        context: TensorSpec | None,
        hidden: int = 1,
        kernel: int = 3,
        width: int | None = None,
        norm: str = "none",
        *,
        rank: int | None = None,
        depthwise: bool = False,
    ) -> None:
        super().__init__(spec, context)
        if self.space == 0:
            raise DecouplingError(
                "'conv' needs convolutional maps (batch, channels, *space), but the value has "
                f"shape {spec.shape} with its features in dimension {spec.feature_dim}. Use "
                "'linear' or 'mlp'."
            )
        if kernel % 2 == 0:
            raise DecouplingError(
                f"'conv' needs an odd kernel, so that maps keep their size, but got {kernel}"
            )
        width = self.features if width is None else width
        sizes = [self.features] + [width] * hidden + [self.features]
        make = convolutions(self.space, kernel, self.dtype, rank, depthwise)
        self.layers = make_layers(sizes, self.context_features, make, True)
        self.norms = make_norms(norm, sizes[1:-1], self.dtype)


class Conv(Regression):
    r"""For maps: :math:`M(h, c) = W_2 * \mathrm{relu}(W_1 * [h, c] + b_1) + b_2` with ``c`` as
    constant planes.

    Args:
        specs: the values served: maps with 1, 2 or 3 spatial dimensions.
        context: the context, or None.
        hidden: number of hidden layers. The paper's source on MNIST is ``partial(Conv, hidden=2,
            kernel=5, width=64, norm="batch")``; one hidden layer of kernel 3 sees 5 x 5 at a
            fraction of the cost.
        kernel: size in each dimension, odd.
        width: channels of the hidden layers; by default the value's.
        norm: of the hidden layers, ``"batch"`` (by the batch's own statistics, in any mode) or
            ``"none"``.
        rank: every convolution makes so many channels, and an affine layer at every position makes
            the others of them. Costs about ``rank / channels`` of a full one.
        depthwise: every convolution takes each channel by itself, before an affine layer at every
            position. Costs about ``1 / kernel^2`` of a full one (a ninth in two dimensions), and
            more for few channels.

    With either, the affine layers see the context, the convolutions do not.

    Raises:
        DecouplingError: values that are no maps, an even kernel, a rank and ``depthwise``.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, appendix A.1. The cheap forms of a convolution:
        Jaderberg et al. 2014, arXiv:1405.3866 (low rank); Howard et al. 2017, arXiv:1704.04861
        (depthwise separable).
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        hidden: int = 1,
        kernel: int = 3,
        width: int | None = None,
        norm: str = "none",
        rank: int | None = None,
        depthwise: bool = False,
    ) -> None:
        super().__init__(
            specs,
            context,
            lambda spec, c: ConvNetwork(
                spec, c, hidden, kernel, width, norm, rank=rank, depthwise=depthwise
            ),
        )
