"""Values and model inputs of every kind, as specs and as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dni_fx.plan import TensorSpec

VALUES = {
    "vector": ((4, 6), -1),
    "one feature": ((4,), -1),
    "sequence": ((4, 5, 6), -1),
    "channels last": ((4, 4, 3, 6), -1),
    "map1d": ((4, 6, 4), 1),
    "map2d": ((4, 6, 4, 3), 1),
    "map3d": ((4, 6, 2, 2, 2), 1),
}


# Shape, feature dimension as a traced model's spec has it, dtype, dimensions that may change
# besides the batch.
FLOAT, IDS = torch.float32, torch.int64


MODEL_INPUTS = {
    "vector": ((4, 3), -1, FLOAT, ()),
    "number": ((4,), -1, FLOAT, ()),
    "sequence": ((4, 5, 3), -1, FLOAT, (1,)),
    "signal": ((4, 1, 16), -1, FLOAT, (2,)),
    "tokens": ((4, 5), -1, IDS, (1,)),
    "class": ((4,), -1, torch.int32, ()),
    "mask": ((4, 5), -1, torch.bool, ()),
    "image": ((4, 3, 8, 6), 1, FLOAT, (2, 3)),
    "channels last": ((4, 8, 6, 3), -1, FLOAT, (1, 2)),
    "bytes": ((4, 3, 8, 6), 1, torch.uint8, (2, 3)),
    "volume": ((4, 2, 4, 4, 4), 1, FLOAT, (2, 3, 4)),
}


def value_spec(kind: str, dtype: torch.dtype = FLOAT) -> TensorSpec:
    shape, feature_dim = VALUES[kind]
    return TensorSpec(shape, dtype, feature_dim)


def input_spec(kind: str) -> TensorSpec:
    shape, feature_dim, dtype, _ = MODEL_INPUTS[kind]
    return TensorSpec(shape, dtype, feature_dim)


def draw(shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)


def specs_of(*tensors: Tensor) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tuple(x.shape), x.dtype, 1 if x.dim() > 3 else -1) for x in tensors)
