"""Tensors whose memory is elsewhere: whoever reads one is told so, where torch would crash."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DecouplingError

# What is known of a tensor without its memory.
_KNOWN = {
    *("shape", "dtype", "device", "requires_grad", "requires_grad_", "grad", "is_leaf", "ndim"),
    *("layout", "_version", "size", "dim", "numel", "stride", "untyped_storage", "__hash__"),
    *("__len__", "is_floating_point", "is_complex", "element_size", "is_cuda", "is_sparse"),
    *("_backward_hooks", "_post_accumulate_grad_hooks", "grad_fn", "nbytes", "is_meta"),
}


class AbsentError(DecouplingError):
    """A tensor was read whose stage is not in memory."""


def mark_absent(tensor: Tensor, stage: int) -> None:
    """From now on all that reads it raises :class:`AbsentError`; it stays the same object."""
    tensor.__class__ = _absent(type(tensor), stage)


def mark_present(tensor: Tensor) -> None:
    """It may be read again."""
    kind: Any = type(tensor)
    if "dni_fx_kind" in vars(kind):
        tensor.__class__ = kind.dni_fx_kind


@functools.cache
def _absent(kind: type[Tensor], stage: int) -> type[Tensor]:
    """A class of the same layout."""

    def refuse(
        cls: type, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            name = function.__self__.__name__  # type: ignore[attr-defined]
        if name not in _KNOWN:
            raise AbsentError(
                f"{name}: a tensor of stage_{stage} is not in memory now, since the trainer keeps "
                "few stages there (resident=): call trainer.gather() before the model or its "
                "optimisers are read, run or saved by other code"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    body = {"__torch_function__": classmethod(refuse), "dni_fx_kind": kind}
    return type(kind.__name__, (kind,), body | {"__module__": kind.__module__})
