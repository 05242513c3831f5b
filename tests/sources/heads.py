"""Loss heads of every kind, and their mathematics written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dni_fx.plan import TensorSpec
from dni_fx.sources.heads import Critic, Distill, Local, LossHead, Sobolev

HEADS = [Local, Critic, Sobolev, Distill]


KINDS = {
    "vector": ((4, 6), -1),
    "flat map": ((4, 6), 1),
    "one feature": ((4,), -1),
    "tokens": ((4, 5, 6), -1),
    "channels last": ((4, 5, 3, 6), -1),
    "map1d": ((4, 6, 5), 1),
    "map2d": ((4, 6, 5, 3), 1),
    "map3d": ((4, 6, 3, 2, 3), 1),
    "map of one pixel": ((4, 6, 1, 1), 1),
}


LABELS = TensorSpec((4, 3), torch.float32)


Y = torch.tensor([0, 2, 1, 2])


def spec_of(kind: str, dtype: torch.dtype = torch.float64) -> TensorSpec:
    shape, feature_dim = KINDS[kind]
    return TensorSpec(shape, dtype, feature_dim)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def message_for(head: LossHead, values: tuple[Tensor, ...], seed: int = 5) -> tuple[Tensor, ...]:
    """A message of the right shapes, with labels per sample."""
    batch = values[0].shape[0]
    parts = {
        "gradient": tuple(random_tensor(*v.shape, seed=seed).to(v) for v in values),
        "loss": (random_tensor(batch, seed=seed).abs(),),
        "logits": (random_tensor(batch, 3, seed=seed),),
    }
    kinds = [] if head.message == "none" else head.message.split("+")
    return tuple(tensor for kind in kinds for tensor in parts[kind])
