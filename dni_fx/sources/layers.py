"""Layers of the networks that predict: affine ones, convolutions, and cheap forms of both.

Every layer is made by a :data:`Layer`, so that a network is told once what its layers are like.
Those of this module have a ``weight``, whose dtype is the network's, and are called with a value,
the context where they see one, and how many dimensions of a map are behind the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from .context import as_planes

Layer = Callable[[int, int, int, bool], nn.Module]
"""Makes a layer from its features in, those of the context it sees, its features out, and whether
it starts at 0."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Affine(nn.Module):
    """``W [h, c] + b`` at every position; for anything but vectors ``W`` is split and the context's
    part added where it broadcasts, without a copy of the value.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        context: int,
        outputs: int,
        dtype: torch.dtype,
        zero: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.inputs, self.context = inputs, context
        self.weight = nn.Parameter(torch.zeros(outputs, inputs + context, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype)) if bias else None
        if not zero:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, value: Tensor, context: Tensor | None = None, space: int = 0) -> Tensor:
        """Map features; ``space``: how many dimensions of a map are behind them."""
        if context is None:
            return self._project(value, self.weight, space)
        if value.dim() == 2 and context.shape[0] == value.shape[0]:
            return F.linear(torch.cat((value, context), 1), self.weight, self.bias)
        for_value, for_context = self.weight.split((self.inputs, self.context), 1)
        return self._project(value, for_value, space) + _shift(context, for_context, space)

    def _project(self, value: Tensor, weight: Tensor, space: int) -> Tensor:
        if space == 0:
            return F.linear(value, weight, self.bias)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
        return convolve(value, weight[(...,) + (None,) * space], self.bias)


class LowRank(nn.Module):
    """``U V [h, c] + b`` with ``rank`` columns in ``U``; only ``U`` starts at 0."""

    def __init__(
        self, inputs: int, context: int, outputs: int, rank: int, dtype: torch.dtype, zero: bool
    ) -> None:
        super().__init__()
        self.inner = Affine(inputs, context, rank, dtype, bias=False)
        self.outer = Affine(rank, 0, outputs, dtype, zero)

    @property
    def weight(self) -> Tensor:
        """``V``."""
        return self.inner.weight

    def forward(self, value: Tensor, context: Tensor | None = None, space: int = 0) -> Tensor:
        return self.outer(self.inner(value, context, space), None, space)


class Grouped(nn.Module):
    """``W h + W' c + b`` with ``W`` of ``groups`` blocks on the diagonal: features are mapped
    within their group, and every feature sees the context.
    """

    def __init__(
        self, inputs: int, context: int, outputs: int, groups: int, dtype: torch.dtype, zero: bool
    ) -> None:
        super().__init__()
        if inputs % groups or outputs % groups:
            raise DecouplingError(
                f"{groups} groups cannot share {inputs} features evenly: groups= must divide them"
            )
        self.groups, size = groups, inputs // groups
        self.weight = nn.Parameter(torch.zeros(outputs, size, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(outputs, context, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))
        if not zero:
            # as one layer that sees both
            bound = 1 / math.sqrt(size + context)
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.shift, -bound, bound)

    def forward(self, value: Tensor, context: Tensor | None = None, space: int = 0) -> Tensor:
        if space:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
            kernel = self.weight[(...,) + (None,) * space]
            output = convolve(value, kernel, self.bias, groups=self.groups)
        else:
            parts = value.unflatten(-1, (self.groups, -1))
            blocks = self.weight.unflatten(0, (self.groups, -1))
            output = torch.einsum("...gi,goi->...go", parts, blocks).flatten(-2) + self.bias
        return output if context is None else output + _shift(context, self.shift, space)


class Separated(nn.Module):
    """A convolution of each channel by itself, or to ``rank`` channels, then an affine layer at
    every position, which alone sees the context and starts at 0.
    """

    def __init__(
        self,
        inputs: int,
        context: int,
        outputs: int,
        space: int,
        kernel: int,
        rank: int | None,
        dtype: torch.dtype,
        zero: bool,
    ) -> None:
        super().__init__()
        between, groups = (inputs, inputs) if rank is None else (rank, 1)
        self.spatial = _CONVOLUTIONS[space - 1](
            inputs, between, kernel, padding=kernel // 2, groups=groups, bias=False, dtype=dtype
        )
        self.pointwise = Affine(between, context, outputs, dtype, zero)

    @property
    def weight(self) -> Tensor:
        """The convolution's."""
        return self.spatial.weight

    def forward(self, value: Tensor, context: Tensor | None = None, space: int = 0) -> Tensor:
        return self.pointwise(self.spatial(value), context, space)


class BatchNorm(nn.Module):
    """Batch normalisation by the batch's own statistics; a single value per channel stays."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))

    def forward(self, value: Tensor, feature_dim: int = 1) -> Tensor:
        """Normalise over all but ``feature_dim``, 1 or -1."""
        if value.numel() == value.shape[feature_dim]:  # no variance: F.batch_norm refuses
            return (value.flatten() * self.weight + self.bias).view_as(value)
        features_first = value if feature_dim == 1 or value.dim() == 2 else value.movedim(-1, 1)
        normed = F.batch_norm(features_first, None, None, self.weight, self.bias, training=True)
        return normed if features_first is value else normed.movedim(1, -1)


def make_norms(norm: str, sizes: Sequence[int], dtype: torch.dtype) -> nn.ModuleList:
    """A normalisation for every hidden layer, or none; other words are refused."""
    if norm not in ("batch", "none"):
        raise DecouplingError(f"unknown norm {norm!r}; known: 'batch', 'none'")
    return nn.ModuleList(BatchNorm(size, dtype) for size in sizes if norm == "batch")


def affine(dtype: torch.dtype, rank: int | None = None, groups: int = 1) -> Layer:
    """Affine layers, full ones, or of one of the two cheap forms.

    Raises:
        DecouplingError: numbers out of range, or both.
    """
    _check_count("rank", rank)
    _check_count("groups", groups)
    if rank is not None and groups > 1:
        raise DecouplingError(f"{rank=} and {groups=}: a layer has a rank or groups, not both")
    if rank is not None:
        return lambda a, c, b, zero: LowRank(a, c, b, rank, dtype, zero)
    if groups > 1:
        return lambda a, c, b, zero: Grouped(a, c, b, groups, dtype, zero)
    return lambda a, c, b, zero: Affine(a, c, b, dtype, zero)


def convolutions(
    space: int, kernel: int, dtype: torch.dtype, rank: int | None = None, depthwise: bool = False
) -> Layer:
    """Convolutions over maps, zero padded to the same size: full ones, or of one of the two cheap
    forms.

    Raises:
        DecouplingError: a number out of range, or both.
    """
    _check_count("rank", rank)
    if rank is not None and depthwise:
        raise DecouplingError(
            f"{rank=} and {depthwise=}: a convolution has a rank or is depthwise, not both"
        )
    if rank is not None or depthwise:
        return lambda a, c, b, zero: Separated(a, c, b, space, kernel, rank, dtype, zero)

    def full(inputs: int, context: int, outputs: int, zero: bool) -> nn.Module:
        layer = _CONVOLUTIONS[space - 1](
            inputs + context, outputs, kernel, padding=kernel // 2, dtype=dtype
        )
        for parameter in layer.parameters() if zero else ():
            nn.init.zeros_(parameter)
        return layer

    return full


def make_layers(sizes: Sequence[int], shared: int, make: Layer, zero: bool) -> nn.ModuleList:
    """One layer from each size to the next; the first sees ``shared`` features of a context, and
    the last may start at 0.
    """
    seen, last = [shared] + [0] * len(sizes), len(sizes) - 2
    return nn.ModuleList(
        make(a, seen[i], b, zero and i == last) for i, (a, b) in enumerate(pairwise(sizes))
    )


def run_layers(
    layers: nn.ModuleList, norms: nn.ModuleList, h: Tensor, shared: Tensor | None, space: int
) -> Tensor:
    """Layers with normalisations and ReLUs between them; the first sees ``shared``, aligned with
    features last, convolutions as planes that end at the border like the maps, as in the paper.
    """
    convolve = isinstance(layers[0], _CONVOLUTIONS)
    if convolve and shared is not None:
        h = torch.cat((h, as_planes(shared, h)), 1)
    for i, layer in enumerate(layers):
        if i:
            h = F.relu(norms[i - 1](h, 1 if space else -1) if norms else h)
        h = layer(h) if convolve else layer(h, None if i else shared, space)
    return h


def _shift(context: Tensor, weight: Tensor, space: int) -> Tensor:
    """What a context adds, where it broadcasts against a value."""
    shift = F.linear(context, weight)
    return shift.movedim(-1, 1) if space else shift


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (type(count) is not int or count < 1):
        raise DecouplingError(
            f"{name}= of a synthesizer must be a whole number from 1, not {count!r}"
        )
