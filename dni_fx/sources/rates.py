"""The optimiser that a source has where the user names none: Adam, at a rate for its kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .regression import Pointwise, Regression
from .through_time import AcrossTime

RATE = 1e-3  # Adam's own
AFFINE = 3e-2  # of affine synthesizers that see a context


def default_optimizer(
    source: nn.Module, learnt: Sequence[tuple[str, nn.Parameter]]
) -> torch.optim.Adam:
    """Adam, by 0.03 for affine regressions that see a context (``"linear"``, and ``"auto"`` where
    it is that), by 0.001 for all else, and between windows.

    A regression's targets have unit size whatever the task, and an affine map starts at zero: what
    it has to learn is of one scale everywhere, and changes with every update of the stages behind,
    so that it must be fast. The rates were chosen by ``benchmarks/rates.py``; the page "Results"
    has the tables.

    Args:
        source: of gradients or of inputs.
        learnt: its parameters, by name.
    """
    regressions = [m for m in source.modules() if isinstance(m, Regression)]
    if any(isinstance(m, AcrossTime) for m in source.modules()):
        regressions = []
    fast = {
        parameter
        for network in (m for regression in regressions for m in regression.modules())
        if isinstance(network, Pointwise) and len(network.layers) == 1 and network.context_features
        for parameter in network.parameters()
    }
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in learnt:
        groups.setdefault(AFFINE if parameter in fast else RATE, []).append((name, parameter))
    return torch.optim.Adam([{"params": pairs, "lr": rate} for rate, pairs in groups.items()])
