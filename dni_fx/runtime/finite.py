"""Whether all numbers are finite, and which is not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import NonFiniteError


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether nothing is NaN or infinite; False may also mean that a norm overflowed: look at the
    tensors then.
    """
    return not tensors or bool(finite_flag(tensors))  # none where no stage was updated


def finite_flag(tensors: list[Tensor]) -> Tensor:
    """The same as a bool without dimensions, on the device of the first of them."""
    if not tensors:
        return torch.ones((), dtype=torch.bool)
    first = tensors[0]
    same = [t.dtype is torch.float32 and t.device == first.device for t in tensors]
    if all(same) and not any(t.is_sparse for t in tensors):
        found = torch.zeros((), device=first.device)
        one = torch.ones((), device=first.device)
        # GradScaler's operator: one pass over all, times one.
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
        return found == 0
    norms = list(
        torch._foreach_norm([t.coalesce().values() if t.is_sparse else t for t in tensors])
    )
    if len({(n.dtype, n.device) for n in norms}) > 1:
        norms = [n.to(device=norms[0].device, dtype=torch.float64) for n in norms]
    return torch.stack(norms).isfinite().all()


def value_places(sent: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Values that cross, with their names; they may hold -inf, as masked attention logits do."""
    masked = {n: v.nan_to_num(nan=torch.nan, neginf=0.0) for n, v in sent.items()}
    return [(f"the value of interface {n!r}", v) for n, v in masked.items()]


def refuse(places: Iterable[tuple[str, Tensor]], when: str, consequence: str) -> None:
    """Name the first place that is not finite; do nothing where all are.

    Args:
        places: tensors with their names, in the order in which to look.
        when: the step, and the stage where only one is meant.
        consequence: what was not done.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    for name, tensor in places:
        if not bool(tensor.isfinite().all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            raise NonFiniteError(
                f"{when}: {name} is {kind}; {consequence}. Look at the batch, lower the learning "
                "rates or set clip_norm="
            )
