"""Synthesizers for maps, where a gradient depends on the neighbourhood; and ``"auto"``, which
takes them there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DecouplingError
from ..plan import TensorSpec
from .regression import Network, Pointwise, Regression, make_layers, make_norms


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
        shared = self.context_features
        self.layers = make_layers(sizes, shared, self.space, kernel, self.dtype, True)
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

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, appendix A.1.
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
    ) -> None:
        super().__init__(
            specs, context, lambda spec, c: ConvNetwork(spec, c, hidden, kernel, width, norm)
        )


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
