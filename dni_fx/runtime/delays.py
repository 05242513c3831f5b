"""How late each stage's gradient is, and the weights that it will meet then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from ..errors import DecouplingError
from ..sources import Served

# of a stage, so many steps ahead, the weights that it alone uses
Ahead = Callable[[int, int, Collection[nn.Parameter]], AbstractContextManager[None]]


def find_delays(served: Sequence[Served], count: int) -> dict[int, int]:
    """In how many steps each stage will have pulled back a batch, of stages in turn.

    Args:
        served: the sources that are asked.
        count: number of stages.
    """
    delays = {count - 1: 0}
    for index in reversed(range(count - 1)):
        late = [0]
        for group in (s for s in served if s.producer == index):
            asks = group.source.asks
            hears = "gradient" in asks.awaited
            behind = max(delays[c] for c in group.consumers) if hears else 0
            late.append((asks.lag or 0) + behind)
        delays[index] = max(late)
    return delays


@contextlib.contextmanager
def moved_along(
    optimizer: torch.optim.Optimizer | None, own: Collection[nn.Parameter], updates: int
) -> Iterator[None]:
    r"""Inside, weights are where so many updates would take them: :math:`\hat W = W - s\,\eta\,
    \Delta W`.

    :math:`\Delta W` is the optimiser's last direction: the velocity of SGD with momentum,
    :math:`\hat m / (\sqrt{\hat v} + \epsilon)` of Adam, plus the decay of AdamW. Weights without a
    state yet stay. Nothing is written to: afterwards the parameters hold their own memory again.

    Args:
        optimizer: of the stage; None where it has no parameters.
        own: the parameters to move.
        updates: :math:`s`.

    Raises:
        DecouplingError: an optimiser whose direction is not known.

    Source:
        PipeOptim, Guan et al. 2023, arXiv:2312.00839; SpecTrain, Chen et al. 2018,
        arXiv:1809.02839.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for group in [] if optimizer is None else optimizer.param_groups:
            for parameter in (p for p in group["params"] if p in own):
                direction = _direction(optimizer, group, parameter)
                if direction is not None:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.detach() - updates * group["lr"] * direction
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@torch.no_grad()
def _direction(optimizer: Any, group: dict[str, Any], parameter: nn.Parameter) -> Tensor | None:
    """Where the last update has moved a parameter, for a rate of 1; None before the first."""
    kind, state = type(optimizer), optimizer.state.get(parameter) or {}
    if kind not in (SGD, Adam, AdamW) or (kind is SGD and not group["momentum"]):
        raise DecouplingError(
            f"predict_weights= knows where SGD with momentum, Adam and AdamW are going, but not "
            f"{kind.__name__}{' without momentum' * (kind is SGD)}: use one of these, or leave it "
            "out"
        )
    if kind is SGD:
        found: Tensor | None = state.get("momentum_buffer")
    elif "exp_avg" not in state:
        found = None
    else:
        (beta, gamma), step = group["betas"], torch.as_tensor(state["step"]).double()
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        found = (state["exp_avg"] / (1 - beta**step)) / (
            (second / (1 - gamma**step)).sqrt() + group["eps"]
        )
    if found is None:
        return None
    found = -found if group["maximize"] else found
    decays = kind is AdamW or group.get("decoupled_weight_decay")
    return found + group["weight_decay"] * parameter if decays else found
