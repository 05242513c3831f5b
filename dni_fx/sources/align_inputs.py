"""Lines the model's inputs up with a value that is predicted from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DecouplingError
from ..plan import TensorSpec

MOST = 4096  # numbers of one input that a vector is predicted from; an ImageNet picture has 150,528


@dataclass(frozen=True)
class _Route:
    """How one model input gets to a value: its features, and what becomes of its positions."""

    index: int
    spec: TensorSpec
    feature_dim: int | None  # None: all dimensions but the batch are positions
    sizes: tuple[int, ...]  # of its positions, in the example
    kept: bool = False  # resized to the value's positions; else averaged away
    flat: tuple[int, ...] = ()  # for vectors: what positions are pooled to, then flattened

    @property
    def embedded(self) -> bool:
        return _kind(self.spec.dtype) == "ids"


class Lineup(nn.Module):
    """Turns the model's inputs into features that line up with a value, whatever the batch, length
    and image size.

    A tensor's *positions* are its time steps or pixels. Floats, bools and ``uint8`` (pixels,
    divided by 255) are used as they are, other integers as ids: modulo ``buckets``, through a
    learned embedding.

    * Vectors ``(batch, features)``: an input is flattened, its positions first pooled to as many as
      in the example, and to at most 4096 numbers; embeddings are averaged over all positions.
    * Sequences ``(batch, *time, features)`` and maps ``(batch, channels, *space)``: an input with
      as many dimensions of positions is resized to the value's by adaptive average pooling, an
      image is pooled to as many patches as a sequence has tokens, and anything else is averaged
      over its positions and given to all of the value's alike. Coordinates are added: without them
      nothing could vary over the positions of a value made from a vector.

    A value's sizes are those of the input that it lines up with, times their ratio in the example.
    Floats may lack a feature dimension: masks ``(batch, time)`` with the sizes of ids or of the
    value; images ``(batch, height, width)`` and signals ``(batch, time)`` for maps, where no other
    input has a map's rank. They are one channel.

    Complex inputs and those without the value's batch dimension are left out. The embeddings have
    ``buckets`` rows and the given dtype.

    Raises:
        DecouplingError: no input is left, or the value has more than 3 dimensions of positions.
    """

    def __init__(
        self, spec: TensorSpec, inputs: tuple[TensorSpec, ...], buckets: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = spec.shape
        self.space = len(shape) - 2 if spec.feature_dim == 1 and len(shape) > 2 else 0
        self.sizes = shape[2:] if self.space else shape[1:-1]
        self.buckets, self.specs = buckets, inputs
        used = [
            (i, s)
            for i, s in enumerate(inputs)
            if _kind(s.dtype) != "complex" and shape[:1] == s.shape[:1] != ()
        ]
        if len(self.sizes) > 3 or not used:
            problem = (
                "its first dimension is not the batch dimension of any model input (shapes "
                f"{', '.join(str(s.shape) for s in inputs) or 'none'}), so it has none, or batch "
                "and time are merged"
            )
            if len(self.sizes) > 3:
                problem = "it has more than 3 dimensions of time or space"
            raise DecouplingError(
                f"no synthetic input for a value of shape {shape}: {problem}. Pass "
                f"inputs={{'<interface>': factory}} with a factory of your own, or leave this "
                "interface out of inputs."
            )
        self.routes = [self._route(i, s, [other for _, other in used]) for i, s in used]
        # An input of the very same sizes comes first: a decoder's tokens rather than its encoder's.
        self.reference = min(
            (r for r in self.routes if r.kept),
            key=lambda r: (r.sizes != self.sizes, len(r.sizes) != len(self.sizes)),
            default=None,
        )
        width = min(max(feature_count(shape, spec.feature_dim), 8), 128)
        ids = [str(r.index) for r in self.routes if r.embedded]
        rows = {index: nn.Embedding(buckets, width, dtype=dtype) for index in ids}
        self.embeddings = nn.ModuleDict(rows)
        self.local, self.shared = len(self.sizes), 0  # numbers of features
        for r in self.routes:
            features = feature_count(r.spec.shape, r.feature_dim) * math.prod(r.flat)
            features = width if r.embedded else features
            if self.sizes and not r.kept:
                self.shared += features
            else:
                self.local += features

    def forward(
        self, inputs: tuple[Tensor, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """What differs between positions, ``(batch, features, *sizes)``; what does not, without."""
        tensors = [self._features_first(r, inputs, dtype) for r in self.routes]
        if len({x.shape[0] for x in tensors}) > 1:
            shapes = ", ".join(str(tuple(inputs[r.index].shape)) for r in self.routes)
            raise DecouplingError(
                f"a synthetic input needs model inputs of one batch size, but got shapes {shapes}"
            )
        pairs = list(zip(self.routes, tensors, strict=True))
        if not self.sizes:
            flat = [_mean(x) if r.embedded else _resized(x, r.flat).flatten(1) for r, x in pairs]
            return torch.cat(flat, 1), None
        sizes = next((self._sizes(r, x) for r, x in pairs if r is self.reference), self.sizes)
        local = [self._coordinates(sizes, tensors[0])]
        local += [_resized(x, sizes) for r, x in pairs if r.kept]
        shared = [_mean(x) for r, x in pairs if not r.kept]
        return torch.cat(local, 1), torch.cat(shared, 1) if shared else None

    def _route(self, index: int, spec: TensorSpec, used: list[TensorSpec]) -> _Route:
        shape, want = spec.shape, self.sizes
        if _kind(spec.dtype) == "ids":
            return _Route(index, spec, None, shape[1:], _lines_up(shape[1:], want))
        masked = {want, *(s.shape[1:] for s in used if _kind(s.dtype) == "ids")}
        bare = len(shape) > 1 and shape[1:] in masked
        if len(shape) == len(want) + 1 and (self.space or len(want) > 1) and not bare:
            alone = not any(_kind(s.dtype) != "ids" and len(s.shape) == len(want) + 2 for s in used)
            bare = alone and all(a >= b for a, b in zip(shape[1:], want, strict=True))
        dim: int | None = None if bare else spec.feature_dim
        if want and not bare and len(shape) == len(want) + 2:
            dim = self._feature_dim(spec)
        sizes = shape[1:] if dim is None else shape[2:] if dim == 1 else shape[1:-1]
        if want:
            return _Route(index, spec, dim, sizes, _lines_up(sizes, want))
        shrink = min(1.0, (MOST / max(math.prod(shape[1:]), 1)) ** (1 / max(len(sizes), 1)))
        flat = tuple(max(1, int(n * shrink + 1e-9)) for n in sizes)
        return _Route(index, spec, dim, sizes, flat=flat)

    def _feature_dim(self, spec: TensorSpec) -> int:
        """Of an input of the value's rank: what its spec says, which cannot know it for inputs
        ``(batch, a, b)`` or channels last, unless sizes or the value speak for the other way.
        """
        dim = 1 if self.space == 1 else spec.feature_dim
        first, last = spec.shape[2:], spec.shape[1:-1]  # positions if features are first, or last
        sizes, others = (first, last) if dim == 1 else (last, first)
        if sizes == self.sizes or (len(spec.shape) == 3 and spec.feature_dim == 1):
            return dim
        # A class token may be added.
        fits = all(5 * a >= 4 * b for a, b in zip(sizes, self.sizes, strict=True))
        better = not fits and all(a >= b for a, b in zip(others, self.sizes, strict=True))
        return -dim if others == self.sizes or better else dim

    def _features_first(
        self, route: _Route, inputs: tuple[Tensor, ...], dtype: torch.dtype
    ) -> Tensor:
        """An input as ``(batch, features, *positions)``, checked."""
        shape, dim = route.spec.shape, route.feature_dim
        x = inputs[route.index] if len(inputs) == len(self.specs) else None
        fits = x is not None and x.dim() == len(shape) and _kind(x.dtype) == _kind(route.spec.dtype)
        if x is None or not fits or feature_count(x.shape, dim) != feature_count(shape, dim):
            made = ", ".join(f"{s.shape} {s.dtype}" for s in self.specs)
            got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
            raise DecouplingError(
                f"a synthetic input was made for model inputs like {made}, but got {got}: only "
                "batch, time and space may change. Decouple again for new inputs."
            )
        if route.embedded:
            ids = x.long().remainder(self.buckets)  # never negative
            return self.embeddings[str(route.index)](ids).movedim(-1, 1)
        x = x.detach().to(dtype)
        x = x / 255 if route.spec.dtype == torch.uint8 else x
        return x.unsqueeze(1) if dim is None or x.dim() == 1 else x.movedim(dim, 1)

    def _sizes(self, route: _Route, x: Tensor) -> tuple[int, ...]:
        """The value's sizes for the reference's ``x``."""
        now, then = tuple(x.shape[2:]), route.sizes
        if len(now) != len(self.sizes):
            now, then = (math.prod(now),), (math.prod(then),)
        # Half rounds up: so do padded convolutions of stride 2 on an odd size.
        return tuple(
            max(1, (2 * a * c + b) // (2 * b))
            for a, b, c in zip(now, then, self.sizes, strict=True)
        )

    def _coordinates(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """``(batch, len(sizes), *sizes)``, from -1 to nearly 1."""
        # A pixel stands for a share of its image, a time step for its number.
        whole = sizes if self.space else self.sizes
        lines = [
            torch.arange(now, dtype=like.dtype, device=like.device) * (2 / n) - 1
            for now, n in zip(sizes, whole, strict=True)
        ]
        planes = torch.stack(torch.meshgrid(*lines, indexing="ij"))
        return planes.expand(like.shape[0], -1, *sizes)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype == torch.uint8:
        return "pixels"
    return "numbers" if dtype.is_floating_point or dtype == torch.bool else "ids"


def feature_count(shape: Sequence[int], feature_dim: int | None) -> int:
    """Size of the feature dimension; 1 where there is none."""
    return 1 if feature_dim is None or len(shape) < 2 else shape[feature_dim]


def _lines_up(sizes: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether an input's positions can be resized to the value's."""
    return bool(want) and (len(sizes) == len(want) or (len(want) == 1 and len(sizes) in (2, 3)))


def _mean(x: Tensor) -> Tensor:
    """``(batch, features, *sizes)`` averaged over its positions: ``(batch, features)``."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def _resized(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``(batch, features, *sizes)``, by average pooling; images against one size become patches."""
    have = tuple(x.shape[2:])
    if have == sizes:
        return x
    if len(have) > len(sizes):  # a grid of about as many patches, then exactly as many
        share = (sizes[0] / math.prod(have)) ** (1 / len(have))
        patches = tuple(max(1, int(n * share + 1e-9)) for n in have)
        return _resized(_resized(x, patches).flatten(2), sizes)
    if len(sizes) > 3:
        raise DecouplingError(
            f"a synthetic input cannot take an input of sizes {have}: made for {sizes} only"
        )
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(sizes) - 1]
    return pool(x, sizes)  # type: ignore[arg-type]
