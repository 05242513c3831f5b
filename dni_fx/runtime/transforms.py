"""What training stage by stage cannot be part of: inference mode, transforms of a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from ..errors import DecouplingError
from ..graphs.nested import flatten


def check_ordinary(values: dict[str, Any], target: Any = None) -> dict[str, Any]:
    """Refuse to train in inference mode, or on tensors that were made in it.

    Args:
        values: the model's inputs by name.
        target: what the loss takes.

    Returns:
        The values.

    Raises:
        DecouplingError: either is the case; which tensor.
    """
    if torch.is_inference_mode_enabled():
        raise DecouplingError(
            "training needs gradients, which torch.inference_mode() takes away: leave it for this, "
            "as only validation goes inside"
        )
    targets = (target,) if isinstance(target, torch.Tensor) else flatten(target)[0]
    named = [(f"the input {n!r}", v) for n, v in values.items() if isinstance(v, torch.Tensor)]
    for place, tensor in [*named, *(("a tensor of the target", t) for t in targets)]:
        if tensor.is_inference():
            raise DecouplingError(
                f"{place} was made in inference mode, so it cannot be trained on: make it outside "
                "of torch.inference_mode(), or pass a clone, tensor.clone(), made outside"
            )
    return values


def transformed(what: str) -> DecouplingError:
    """The error for a drop-in that meets a transform which needs the model's own computation."""
    return DecouplingError(
        f"{what} cannot be applied to a drop-in, whose gradients are predictions, taken stage by "
        "stage while it runs: use the plain model for this, decoupled.model, which has the same "
        "parameters"
    )


def refuse_transforms(args: Any, kwargs: Any) -> None:
    """Refuse to predict gradients while something records or transforms what is computed.

    Raises:
        DecouplingError: it does; what, and the way out.
    """
    if torch._C._are_functorch_transforms_active():  # what autograd.Function itself asks
        raise transformed("a transform of torch.func (grad, vjp, jvp, vmap, ...)")
    if forward_ad._current_level >= 0:
        raise transformed("forward-mode differentiation")
    if torch.compiler.is_exporting():
        raise transformed("torch.export in training mode")
    if torch._C._get_tracing_state() is not None:
        raise transformed("torch.jit.trace in training mode")
    if get_proxy_mode() is not None:
        raise transformed("make_fx in training mode")
    if any(isinstance(t, FakeTensor | fx.Proxy) for t in pytree.tree_leaves((args, kwargs))):
        raise transformed("a call with fake tensors or proxies, in training mode,")
