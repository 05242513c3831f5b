"""``"auto"``: the regression that fits a value's kind, and its cheaper forms."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import TensorSpec
from .convolutional import ConvNetwork
from .naming import with_options
from .regression import Network, Pointwise, Regression

LEAST = 4  # rank or width of the cheapest form


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


def auto_forms(spec: TensorSpec, context: TensorSpec | None) -> list[str]:
    """Cheaper forms of what ``"auto"`` takes for a value, the dearest first; none for
    narrow values, and for those that a context does not line up with.

    Ranks and widths are powers of two: ``"linear(rank=64)"``, ``"linear(rank=32)"``, ...
    """
    if auto_context(spec, context) is not context:
        return []
    name, features = auto_name(spec, context), 1
    if spec.shape:
        features = spec.shape[1 if name == "conv" else -1] if len(spec.shape) > 1 else 1
    if name == "conv":
        whole = with_options(name, depthwise=True)
        widths = _halved(features)
        return [whole, *(with_options(name, depthwise=True, width=n) for n in widths)]
    if name == "mlp":
        return [with_options(name, width=n) for n in _halved(max(features, 64))]
    return [with_options(name, rank=n) for n in _halved(features // 2)]


def _halved(most: int) -> list[int]:
    """Powers of two below a number, the largest first, down to the least."""
    powers = (1 << k for k in reversed(range(most.bit_length())))
    return [n for n in powers if LEAST <= n < most]


class Auto(Regression):
    """The regression that fits each value's kind, shape and context; see :func:`auto_name`.

    This is the full form. A plan puts a cheaper one in its place where it would cost more than a
    quarter of its stage.
    """

    def __init__(self, specs: Sequence[TensorSpec], context: TensorSpec | None = None) -> None:
        def network(spec: TensorSpec, context: TensorSpec | None) -> Network:
            name, context = auto_name(spec, context), auto_context(spec, context)
            if name == "conv":
                return ConvNetwork(spec, context)
            return Pointwise(spec, context, hidden=1 if name == "mlp" else 0)

        super().__init__(specs, context, network)
