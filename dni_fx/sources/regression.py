"""Synthesizers that regress the gradient, on targets of unit size.

Gradients at a cut are tiny (root mean square 1e-4 to 1e-6 for mean losses), far less than one Adam
step moves a network's output: regressed raw, a synthesizer is hundreds of times too large at first,
or does not learn at all. So the target is divided by its running root mean square, which is
multiplied back on use, and the last layer starts at zero: the prediction grows from exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec
from .base import GradientSource, Prediction, like, wide_dtype
from .context import align_context, aligned_shape, check_batch_first
from .layers import affine, make_layers, make_norms, run_layers

# non-zero targets in the running scale: their plain mean at first, then a moving mean of decay 0.99
WINDOW = 100


class Shaped(nn.Module):
    """What serves vectors, sequences or maps of so many features, whatever the other sizes.

    Values of shape ``(batch,)`` and scalars count as one feature.
    """

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.shape = _at_least_2d(spec.shape)
        self.space = len(self.shape) - 2 if spec.feature_dim == 1 else 0
        self.feature_dim = 1 if self.space else -1
        self.features = self.shape[self.feature_dim]
        if spec.dtype.is_complex:
            raise DecouplingError(
                f"no network of features for values like {spec.shape}, {spec.dtype}: it would see "
                "their real parts alone. Cut where values are real, or use 'zero', 'stale', "
                "'delayed' or 'exact' here"
            )
        if self.space > 3:
            raise DecouplingError(
                "no synthesizer for maps with more than 3 spatial dimensions, but the value has "
                f"shape {spec.shape}. Pass a GradientSource of your own for this interface, or "
                "'zero' or 'stale'."
            )

    def check(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape with a dimension of features, or an error where it is of another kind."""
        full = _at_least_2d(shape)
        if len(full) != len(self.shape) or full[self.feature_dim] != self.features:
            raise DecouplingError(
                f"a synthesizer made for values like {self.shape} (features in dimension "
                f"{self.feature_dim}) got one of shape {tuple(shape)}: only batch, time and space "
                "may change. Decouple again for a new size."
            )
        return full


class Network(Shaped):
    """``M(value, context)`` for one value, in units of the running scale.

    A scalar has no dimension to line a context up with and ignores it. Subclasses make the layers,
    or implement :meth:`compute`.

    Raises:
        DecouplingError: the context cannot be lined up with the value.
    """

    layers: nn.ModuleList  # each with a weight
    norms: nn.ModuleList

    def __init__(self, spec: TensorSpec, context: TensorSpec | None) -> None:
        super().__init__(spec)
        self.context_shape = None if context is None or not spec.shape else context.shape
        self.context_features = 0
        if self.context_shape is not None:
            check_batch_first(spec, self.context_shape)
            aligned_shape(self.context_shape, self.shape, self.feature_dim)
            self.context_features = self.context_shape[-1]
        self.dtype = wide_dtype([spec])

    def forward(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Output of the value's shape, in the parameters' dtype (or autocast's)."""
        dtype: torch.dtype = self.layers[0].weight.dtype  # type: ignore[assignment]
        full, h, seen = self.check(value.shape), value.to(dtype), None
        if h.dim() < 2:
            h = h.reshape(full)
        if self.context_shape is not None:
            if context is not None:
                seen = align_context(context, full, self.feature_dim).to(dtype)
            if seen is None or seen.shape[-1] != self.context_features:
                got = "none. Pass target= to Trainer.step, or context= to stage.step."
                if seen is not None:
                    got = f"{seen.shape[-1]}. The callable must always return the same number."
                raise DecouplingError(
                    f"a synthesizer for values like {self.shape} was made for a context of "
                    f"{self.context_features} features, but got {got}"
                )
        output = self.compute(h, seen)
        return output if output.dim() == value.dim() else output.reshape(value.shape)

    def compute(self, value: Tensor, context: Tensor | None) -> Tensor:
        """The network proper: value ``(batch, ..., features)`` or a map, context aligned with
        features last.
        """
        return run_layers(self.layers, self.norms, value, context, self.space)


class Pointwise(Network):
    """The same network at every position, or one for their mean: affine, or hidden ReLUs; the last
    layer starts at 0.
    """

    def __init__(
        self,
        spec: TensorSpec,
        context: TensorSpec | None,
        hidden: int = 0,
        width: int | None = None,
        norm: str = "none",
        *,
        rank: int | None = None,
        groups: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__(spec, context)
        # As wide as the value, so that the synthesizer costs what a layer of its stage costs;
        # narrow values need more.
        width = max(self.features, 64) if width is None else width
        sizes = [self.features] + [width] * hidden + [self.features]
        make = affine(self.dtype, rank, groups)
        self.layers = make_layers(sizes, self.context_features, make, True)
        self.norms = make_norms(norm, sizes[1:-1], self.dtype)
        self.pooled = pooled

    def compute(self, value: Tensor, context: Tensor | None) -> Tensor:
        if not self.pooled or value.dim() == 2:
            return super().compute(value, context)
        # positions of a value, whose features are second in maps, and of a context
        first = 2 if self.space else 1
        mean = value.mean(tuple(range(first, first + value.dim() - 2)), keepdim=True)
        if context is not None:
            context = context.mean(tuple(range(1, context.dim() - 1)), keepdim=True)
        return super().compute(mean, context).expand(value.shape)


class Regression(GradientSource):
    r"""Base of the synthesizers that regress the gradient, one network per value.

    .. math::
        \hat g = s\, M(h, c; \phi), \qquad
        \mathcal L(\phi) = \operatorname{mean}\,\bigl(M(h, c; \phi) - \delta / s\bigr)^2, \qquad
        s^2 = \operatorname{ema}\,\operatorname{mean}\,\delta^2

    with :math:`\delta` the target. The regression error updates the synthesizer only. Targets that
    are zero throughout (what a synthesizer that has not learnt yet sends) leave the scale as it
    was, and so do non-finite ones.

    Buffers, one element per value: ``scale``, the running root mean square of the targets (0 until
    one is known); ``count``, the targets in it, at most 100.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343; the start at zero from its appendix A.1 (C.1 in the
        ICML version). The normalisation is ours.

    Args:
        network: makes ``M`` for one value.
    """

    scale: Tensor
    count: Tensor

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None,
        network: Callable[[TensorSpec, TensorSpec | None], Network],
    ) -> None:
        super().__init__(specs, context)
        self.networks = nn.ModuleList(network(spec, context) for spec in self.specs)
        dtype = wide_dtype(self.specs)
        self.register_buffer("scale", torch.zeros(len(self.specs), dtype=dtype))
        self.register_buffer("count", torch.zeros(len(self.specs), dtype=dtype))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        """Scale times network; ``state`` holds the networks' outputs with their graph.

        Raises:
            DecouplingError: a value or the context is not of the kind that the source was made for.
        """
        pairs = zip(self.networks, values, strict=True)
        outputs = tuple(network(value, context) for network, value in pairs)
        gradients = tuple(
            like(output.detach().to(scale.dtype) * scale, value)
            for output, scale, value in zip(outputs, self.scale, values, strict=True)
        )
        return Prediction(gradients, outputs)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        """Mean squared error in units of the running scale, summed over the values; updates the
        scale first.

        Raises:
            DecouplingError: a target's shape differs from its prediction's.
        """
        targets, inverses = self.rescale(prediction.state, message)
        losses = [
            F.mse_loss(output.to(target.dtype), target * inverse)
            for output, target, inverse in zip(prediction.state, targets, inverses, strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def rescale(
        self, predicted: Sequence[Tensor], message: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Update the scale; the targets in its dtype, and what each is multiplied by to be of unit
        size.
        """
        expected, got = ([tuple(t.shape) for t in tensors] for tensors in (predicted, message))
        if expected != got:
            raise DecouplingError(
                f"targets of shapes {got} came back for predictions of shapes {expected}: a source "
                "learns from one target per value, of the value's shape"
            )
        targets = [target.detach().to(self.scale.dtype) for target in message]
        update_scale(self.scale, self.count, targets)
        # 1 / 0 -> 0: while no scale is known every target is zero.
        return targets, self.scale.reciprocal().nan_to_num(posinf=0.0).unbind()


def update_scale(scale: Tensor, count: Tensor, targets: Sequence[Tensor]) -> None:
    """Follow the targets' root mean squares, of up to :data:`WINDOW` of them; in place."""
    # Few and small tensor operations: reading a number back would make the host wait.
    norms = [torch.linalg.vector_norm(t) / math.sqrt(t.numel()) for t in targets]
    square = torch.stack(norms).view_as(scale).square_().nan_to_num_(0.0, posinf=0.0)
    known = square > 0
    count.add_(known).clamp_(max=WINDOW)
    scale.copy_(scale.square().lerp_(square, known / count.clamp(min=1)).sqrt_())


class Linear(Regression):
    r"""Affine in value and context: :math:`M(h, c) = W [h, c] + b`, at every token or pixel alike.

    Enough for vectors when the context is the label: under a linear head with squared error, ``g =
    V^T (V h - y)`` is itself linear in ``[h, y]``, and of a rank no larger than the number of
    outputs.

    Args:
        specs: the values served.
        context: the context, or None.
        rank: :math:`W = U V` with so many columns in :math:`U`, which alone starts at zero. Costs
            ``2 rank / features`` of the full one.
        groups: features are mapped within so many groups of them; every feature sees the context.
            Costs ``1 / groups``.
        pooled: see the mean over tokens or pixels, and predict the same for each; the mean of a
            context that has positions, too. Costs ``1 / positions``.

    Raises:
        DecouplingError: a rank and groups; groups that do not divide the features.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, appendix A.1 (cDNI without hidden layers);
        Czarnecki et al. 2017, arXiv:1703.00522. The cheap forms are ours.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        rank: int | None = None,
        groups: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__(
            specs,
            context,
            lambda spec, c: Pointwise(spec, c, rank=rank, groups=groups, pooled=pooled),
        )


class MLP(Regression):
    r"""Hidden ReLUs, at every token or pixel alike: :math:`M(h, c) = W_2\,\mathrm{relu}(W_1 [h, c]
    + b_1) + b_2`.

    Args:
        specs: the values served.
        context: the context, or None.
        hidden: number of hidden layers. The paper's DNI on MNIST is
            ``partial(MLP, hidden=2, width=1024, norm="batch")``.
        width: of each; by default the value's features, at least 64, so that the synthesizer costs
            about two layers of its stage and not several times the stage. A small one is a
            bottleneck, which costs ``2 width / features`` of one layer.
        norm: of the hidden layers, ``"batch"`` (by the batch's own statistics, in any mode) or
            ``"none"``.
        pooled: as for :class:`Linear`.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, appendix A.1.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        context: TensorSpec | None = None,
        *,
        hidden: int = 1,
        width: int | None = None,
        norm: str = "none",
        pooled: bool = False,
    ) -> None:
        super().__init__(
            specs,
            context,
            lambda spec, c: Pointwise(spec, c, hidden, width, norm, pooled=pooled),
        )


def _at_least_2d(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape, *(1,) * (2 - len(shape)))
