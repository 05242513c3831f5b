"""What a synthesizer sees besides its value, and how that is lined up with values of any rank.

A context always has its features last; its other dimensions line up with the value's dimensions
other than the feature dimension, from the left (batch first), each equal or 1, missing ones taken
as 1. So one tensor ``(batch, classes)`` serves vectors, token sequences and convolutional maps of
the same model, and a context per token or per pixel (``(batch, time, k)``, ``(batch, height, width,
k)``) needs no other rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DecouplingError
from ..plan import TensorSpec


@dataclass(frozen=True)
class Exampled:
    """A context callable that was tried on an example of its targets.

    Attributes:
        encode: the user's callable.
        spec: of what it made of the example.
        not_classes: why that is no class probabilities; empty where it may be.
    """

    encode: Callable[[Any], Tensor]
    spec: TensorSpec
    not_classes: str = ""

    @classmethod
    def of(cls, encode: Callable[[Any], Any], target: Any) -> Exampled:
        """Try a callable.

        Raises:
            DecouplingError: it fails on the example, or returns no float tensor with features.
        """
        try:
            value = encode(target)
        except DecouplingError as error:
            raise DecouplingError(f"context= failed on example_target=: {error}") from error
        except Exception as error:
            raise DecouplingError(
                f"context= failed on example_target= ({type(error).__name__}: {error}): it must "
                "turn a target, as the loss takes it, into a float tensor (batch, ..., features)"
            ) from error
        labels = isinstance(encode, OneHot) and encode.sparse
        is_tensor = isinstance(value, Tensor) and value.dim() > 0
        if not is_tensor or not (labels or value.is_floating_point()):
            found = type(value).__name__
            if isinstance(value, Tensor):
                found = f"one of {value.dtype}, {tuple(value.shape)}"
            raise DecouplingError(
                "context= must return a float tensor (batch, ..., features), but made of "
                f"example_target= {found}"
            )
        check_features(value)
        return cls(encode, TensorSpec(tuple(value.shape), value.dtype), not_classes(value))

    def __call__(self, target: Any) -> Tensor:
        """What sources see of a target."""
        return self.encode(target)


def check_features(value: Tensor, otherwise: str = "") -> None:
    """Refuse a context without a dimension for features, for which the batch would be taken; with
    what to do ``otherwise``.
    """
    if value.dim() == 1:
        raise DecouplingError(
            f"context= returned shape {tuple(value.shape)}, whose only dimension, the batch, would "
            "be taken for features: return (batch, 1), as context=lambda target: "
            f"target.unsqueeze(1) does{otherwise}"
        )


def check_batch_first(spec: TensorSpec, context: Sequence[int]) -> None:
    """Refuse a value whose batch is not its first dimension for a context ``(batch, features)``."""
    if spec.batch_dim and len(context) == 2:
        raise DecouplingError(
            f"a context of shape {tuple(context)} does not line up with a value of shape "
            f"{spec.shape}, whose batch is dimension {spec.batch_dim}, as in the last state of a "
            f"recurrent layer: let the model put it first, value.transpose(0, {spec.batch_dim}), "
            "and cut after that; or give this value a source that ignores the context: "
            "gradients={'<interface>': lambda specs, context: dni_fx.sources.MLP(specs)}"
        )


def not_classes(context: Tensor) -> str:
    """Why the rows of a context are no class probabilities; empty where they are, or all zeros, or
    where it holds no data.
    """
    if not has_data(context) or not context.is_floating_point():
        return ""
    rows = context.detach().reshape(-1, context.shape[-1]).float()
    sums = rows.sum(-1)
    # Rounded probabilities, in half precision too, sum to 1 but for that much.
    wrong = (rows < 0).any(-1) | (rows != 0).any(-1) & ((sums - 1).abs() > 0.02)
    if not wrong.any():
        return ""
    row, total = rows[wrong][0], float(sums[wrong][0])
    if (row < 0).any():
        return f"it holds {float(row.min()):.3g}, below 0"
    return f"one of its rows sums to {total:.3g}, not 1"


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be read."""
    return type(tensor) is Tensor and tensor.device.type != "meta"


@dataclass(frozen=True)
class OneHot:
    """Class labels as context; made by :func:`one_hot`."""

    classes: int
    positions: int = 0
    shift: int = 0
    sparse: bool = False

    def __post_init__(self) -> None:
        wanted = (
            ("classes", 1, self.classes),
            ("position dimensions", 0, self.positions),
            ("positions to shift by", 0, self.shift),
        )
        for what, least, number in wanted:
            if not isinstance(number, int) or number < least:
                raise DecouplingError(
                    f"one_hot needs the number of {what}, at least {least}, but got {number!r}"
                )

        if self.shift and not self.positions:
            raise DecouplingError(
                "one_hot(shift=...) moves labels along their first position, so it needs "
                "positions=1 or more"
            )

    @property
    def features(self) -> int:
        """Size of the context's last dimension."""
        return 1 if self.sparse else self.classes

    @property
    def dtype(self) -> torch.dtype:
        """Of the context."""
        return torch.long if self.sparse else torch.get_default_dtype()

    def __call__(self, target: Tensor) -> Tensor:
        """Encode labels, in the default dtype; see :func:`one_hot`."""
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            got = type(target).__name__
            if isinstance(target, Tensor):
                got = f"{target.dtype}, {tuple(target.shape)}"
            raise DecouplingError(
                f"one_hot({self.classes}) needs a tensor of integer labels, but the target is "
                f"{got}. Pass context=<callable> that turns your target into a float tensor "
                "(batch, features)."
            )
        index = target.long()
        if self.shift:
            rest = index.new_full((len(index), self.shift, *index.shape[2:]), -1)
            index = torch.cat([index[:, self.shift :], rest[:, : index.shape[1]]], 1)
        if self.sparse:
            return self._as_they_are(index)
        # Elsewhere looking at labels would wait for the device; scatter_ checks there.
        if target.device.type == "cpu":
            with contextlib.suppress(RuntimeError):
                return F.one_hot(index, self.classes).to(torch.get_default_dtype())
            self._check(index)
        index = index.unsqueeze(-1)
        encoded = torch.zeros(*index.shape[:-1], self.classes, device=target.device)
        return encoded.scatter_(-1, index.clamp(min=0), (index >= 0).to(encoded.dtype))

    def _as_they_are(self, index: Tensor) -> Tensor:
        """Labels with a last dimension of 1, all ignored ones -1."""
        if index.device.type == "cpu":
            self._check(index)
        return index.clamp(min=-1).unsqueeze(-1)

    def _check(self, index: Tensor) -> None:
        if index.numel() and (last := int(index.max())) >= self.classes:
            raise DecouplingError(
                f"one_hot({self.classes}) met the label {last}: labels run from 0 to "
                f"{self.classes - 1}. Use one_hot({last + 1}) or more."
            )

    def __repr__(self) -> str:
        options = [f"{n}={getattr(self, n)}" for n in ("positions", "shift", "sparse")]
        named = [o for o in options if not o.endswith(("=0", "=False"))]
        return f"one_hot({', '.join([str(self.classes), *named])})"


def one_hot(classes: int, positions: int = 0, shift: int = 0, sparse: bool = False) -> OneHot:
    """Context of class labels, the paper's cDNI (Jaderberg et al. 2016, arXiv:1608.05343).

    Args:
        classes: number of classes.
        positions: how many dimensions labels have besides the batch's: 1 for a label per token, 2
            per pixel. Loss heads need to know.
        shift: how many positions on the label is that a position is to predict: 1 for a causal
            language model whose labels are its own tokens, which its loss shifts itself. The last
            positions have none then. Unshifted, a head would learn to copy its input.
        sparse: leave labels as they are, integers ``(batch, ..., 1)``, for
            :class:`~dni_fx.sources.Tied`: of a large vocabulary nothing is then as wide.

    Returns:
        A callable from integer labels ``(batch,)`` (or ``(batch, time)``, ``(batch, height,
        width)``) to floats with one more dimension of size ``classes``. Negative labels, which
        losses commonly ignore, become zeros.

    Raises:
        DecouplingError: ``classes`` is no positive integer; when called: the target is no tensor of
            integers, or holds a label that is too large.

    Example:
        >>> import torch
        >>> one_hot(3)(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    return OneHot(classes, positions, shift, sparse)


def align_context(context: Tensor, value_shape: Sequence[int], feature_dim: int = -1) -> Tensor:
    """View the context so that it broadcasts against a value whose feature dimension is last.

    Args:
        context: ``(*lead, k)``.
        value_shape: ``(batch, ..., features)``, or ``(batch, channels, *space)`` with
            ``feature_dim=1``.
        feature_dim: 1 or -1, as in :class:`~dni_fx.plan.TensorSpec`.

    Returns:
        A view with as many dimensions as the value, features last also for maps: ``(batch, 1, 1,
        k)`` for labels against images.

    Raises:
        DecouplingError: the sizes do not line up.
    """
    return context.view(aligned_shape(context.shape, value_shape, feature_dim))


def as_planes(context: Tensor, maps: Tensor) -> Tensor:
    """A view of an aligned context as constant planes ``(batch, k, *space)`` over maps."""
    return context.movedim(-1, 1).expand(maps.shape[0], context.shape[-1], *maps.shape[2:])


def aligned_shape(
    context_shape: Sequence[int], value_shape: Sequence[int], feature_dim: int = -1
) -> tuple[int, ...]:
    """What :func:`align_context` views a context as, or its error, from shapes alone."""
    context, value = tuple(context_shape), tuple(value_shape)
    lead = value[:1] + value[2:] if feature_dim == 1 else value[:-1]
    sizes = context[:-1]
    fits = len(context) > 0 and len(sizes) <= len(lead)
    if not fits or any(have not in (1, want) for have, want in zip(sizes, lead, strict=False)):
        raise DecouplingError(
            f"a context of shape {context} does not line up with a value of shape {value} "
            f"(features in dimension {feature_dim}): expected (*sizes, features), its sizes "
            f"matching {lead} from the left, each equal or 1. Return such a shape from "
            "context=<callable>, or give this value a source that ignores the context: "
            "gradients={'<interface>': lambda specs, context: dni_fx.sources.MLP(specs)}."
        )
    return sizes + (1,) * (len(lead) - len(sizes)) + context[-1:]
