"""SGD, Adam and AdamW as functions of tensors, so that they can be part of a graph.

Step for step the algorithms of ``torch.optim``; rates are inputs, so that a scheduler needs no new
graph, all other settings are numbers in the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..joint import is_plain

KINDS = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
}
_OFF = ("amsgrad", "maximize", "capturable", "differentiable")
_FREE = ("params", "param_names", "lr", "initial_lr", "foreach", "fused", "swap_lr")


class UnsettledError(Exception):
    """An optimiser has not stepped some parameter yet."""


@dataclass(frozen=True)
class Update:
    """One parameter's update.

    Attributes:
        optimizer, group: the user's, and which of its groups.
        parameter: what is updated.
        settings: the group's, without the rate.
        states: its state's tensors, in the order of :data:`KINDS`; fewer where there are none.
    """

    optimizer: torch.optim.Optimizer
    group: int
    parameter: nn.Parameter
    settings: dict[str, Any]
    states: tuple[Tensor, ...]

    def holds(self) -> bool:
        """Whether the optimiser would still do this."""
        known = self.optimizer.state.get(self.parameter, {})
        names = KINDS[type(self.optimizer)] if self.states else ()
        return all(known.get(n) is t for n, t in zip(names, self.states, strict=True))

    def __call__(
        self, weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...], rate: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new weight and the new states, of the old ones.

        Args:
            weight, gradient, states: as they are.
            rate: float64, ``()``.
        """
        step = _sgd if isinstance(self.optimizer, torch.optim.SGD) else _adam
        return step(weight, gradient, states, rate, self.settings)


def find_updates(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Collection[nn.Parameter]
) -> list[Update] | str:
    """What the optimisers do to each of the parameters, or why that is not known.

    Raises:
        UnsettledError: a parameter has no state yet; a step of its optimiser makes it.
    """
    found, wanted = [], set(parameters)
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if type(optimizer) not in KINDS:
            return f"{name} is none of SGD, Adam and AdamW"
        if not is_plain(optimizer):
            return f"an optimiser ({name}) has hooks or a step of its own"
        for index, group in enumerate(optimizer.param_groups):
            settings = {n: v for n, v in group.items() if n not in _FREE}
            on = [n for n in _OFF if settings.get(n)]
            if on or any(isinstance(v, Tensor) for v in group.values()):
                return f"{name} with {on[0] if on else 'settings that are tensors'}"
            found += [
                Update(optimizer, index, p, settings, _states_of(optimizer, p, settings))
                for p in group["params"]
                if p in wanted
            ]
    return found


def settings_of(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], list[int]]]:
    """What must not change for updates to hold, by group: settings, and whose."""
    groups = optimizer.param_groups
    return [
        ({n: v for n, v in group.items() if n not in _FREE}, [id(p) for p in group["params"]])
        for group in groups
    ]


def _states_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    names = KINDS[type(optimizer)] if settings.get("momentum", 1) else ()
    known = optimizer.state.get(parameter, {})
    if any(known.get(name) is None for name in names):
        raise UnsettledError
    return tuple(known[name] for name in names)


def _sgd(
    weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...], rate: Tensor, how: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if how["weight_decay"]:
        gradient = gradient.add(weight, alpha=how["weight_decay"])
    if how["momentum"]:
        buffer = states[0].mul(how["momentum"]).add(gradient, alpha=1 - how["dampening"])
        states = (buffer,)
        gradient = gradient.add(buffer, alpha=how["momentum"]) if how["nesterov"] else buffer
    return weight - gradient * rate.to(weight.dtype), states


def _adam(
    weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...], rate: Tensor, how: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    first, second, count = states
    (beta1, beta2), decay = how["betas"], how["weight_decay"]
    count = count + 1
    if decay and how["decoupled_weight_decay"]:
        weight = weight * (1 - rate * decay).to(weight.dtype)
    elif decay:
        gradient = gradient.add(weight, alpha=decay)
    first = first.lerp(gradient, 1 - beta1)
    second = (second * beta2).addcmul(gradient, gradient, value=1 - beta2)
    steps = count.double()  # single precision is too coarse for 1 - beta ** step
    size = (rate / (1 - beta1**steps)).to(weight.dtype)
    root = (1 - beta2**steps).sqrt().to(weight.dtype)
    return weight - size * first / (second.sqrt() / root + how["eps"]), (first, second, count)
