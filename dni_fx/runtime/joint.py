"""One call for several optimisers, where that changes no number.

Torch's own optimisers step every parameter by itself. So those that are of one kind and set alike
are stepped as one: for small stages calls cost more than numbers do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

_NO_SETTINGS = ("params", "param_names")
KINDS = {
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW),
    *(torch.optim.Adamax, torch.optim.RMSprop, torch.optim.SGD),
}


class JointStep:
    """Steps optimisers, those that are alike by one call."""

    def __init__(self) -> None:
        self._joint: dict[type[Optimizer], Optimizer] = {}
        self._members: dict[type[Optimizer], list[list[int]]] = {}

    def __call__(self, optimizers: Iterable[Optimizer]) -> None:
        alike: dict[type[Optimizer], dict[Hashable, list[tuple[Optimizer, dict[str, Any]]]]] = {}
        for optimizer in optimizers:
            settings = _settings_of(optimizer)
            if settings is None:
                optimizer.step()
                continue
            sets = alike.setdefault(type(optimizer), {})
            for key, group in zip(settings, optimizer.param_groups, strict=True):
                sets.setdefault(key, []).append((optimizer, group))
        for kind, sets in alike.items():
            self._joint_of(kind, list(sets.values())).step()

    def _joint_of(
        self, kind: type[Optimizer], sets: list[list[tuple[Optimizer, dict[str, Any]]]]
    ) -> Optimizer:
        """The optimiser of one kind's groups, those with the same settings together."""
        members = [[id(x) for o, g in pairs for x in (o, *g["params"])] for pairs in sets]
        if members != self._members.get(kind):
            self._members[kind] = members
            owners = {p: o for pairs in sets for o, g in pairs for p in g["params"]}
            self._joint[kind] = joint = object.__new__(kind)
            vars(joint).update(vars(sets[0][0][0]))
            vars(joint).pop("step", None)
            joint.state = _States(owners)
            joint.param_groups = [{"params": [p for _, g in s for p in g["params"]]} for s in sets]
        joint = self._joint[kind]
        for group, pairs in zip(joint.param_groups, sets, strict=True):
            group.update({n: v for n, v in pairs[0][1].items() if n not in _NO_SETTINGS})
        return joint


class _States(defaultdict[Tensor, Any]):
    """What each parameter's own optimiser knows of it."""

    def __init__(self, owners: Mapping[Tensor, Optimizer]) -> None:
        super().__init__()
        self._owners = owners

    def __missing__(self, parameter: Tensor) -> dict[str, Any]:
        return self._owners[parameter].state[parameter]


def is_plain(optimizer: Optimizer) -> bool:
    """Whether it is torch's own, and stepping it calls nobody else's code."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if hooks or of_torch._global_optimizer_pre_hooks or of_torch._global_optimizer_post_hooks:
        return False
    patched = vars(optimizer).get("step")
    counted = patched is None or hasattr(patched, "_wrapped_by_lr_sched")
    return counted and type(optimizer).__module__.startswith("torch.optim.")


def _settings_of(optimizer: Optimizer) -> list[Hashable] | None:
    """A key for each group's settings; None where it must be stepped by itself."""
    known = vars(optimizer)
    if type(optimizer) not in KINDS or not is_plain(optimizer) or "found_inf" in known:
        return None
    if "step" in known and not known.get("_opt_called"):  # a scheduler asks for the first call
        return None
    found: list[Hashable] = []
    for group in optimizer.param_groups:
        settings = [v for n, v in group.items() if n not in _NO_SETTINGS]
        if any(isinstance(value, Tensor) for value in settings):
            return None
        found.append((*group, *(tuple(v) if isinstance(v, list) else v for v in settings)))
    return found
