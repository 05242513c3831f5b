"""Sources of every kind alone, fed by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from dni_fx.plan import TensorSpec

KINDS = {
    "vector": ((4, 6), -1),
    "flat map": ((4, 6), 1),
    "tokens": ((4, 5, 6), -1),
    "channels last": ((4, 5, 3, 6), -1),
    "map1d": ((4, 6, 5), 1),
    "map2d": ((4, 6, 5, 3), 1),
    "map3d": ((4, 6, 3, 2, 3), 1),
    "one feature": ((4,), -1),
    "scalar": ((), -1),
}


MAPS = ["map1d", "map2d", "map3d"]


LABELS = torch.tensor([0, 2, 1, 2])


WIDE = [kind for kind, (shape, _) in KINDS.items() if len(shape) > 1]
CHEAP = {  # forms by their kind, each with values that it takes
    "linear(rank=2)": [*KINDS],
    "linear(groups=2)": WIDE,
    "linear(pooled=True)": [*KINDS],
    "mlp(width=4)": [*KINDS],
    "mlp(pooled=True)": WIDE,
    "conv(rank=2)": MAPS,
    "conv(depthwise=True)": MAPS,
    "conv(depthwise=True, width=2)": MAPS,
}
CASES = [
    *((name, kind) for name in ("linear", "mlp", "auto") for kind in KINDS),
    *(("conv", kind) for kind in MAPS),
    *((name, kind) for name, kinds in CHEAP.items() for kind in kinds),
]


def spec_of(kind: str, dtype: torch.dtype = torch.float32) -> TensorSpec:
    shape, feature_dim = KINDS[kind]
    return TensorSpec(shape, dtype, feature_dim)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
