"""``"auto"``: the regression that fits a value's kind, and its cheaper forms."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import TensorSpec
from .convolutional import ConvNetwork
from .regression import Network, Pointwise, Regression


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
