"""What ``"auto"`` stands for at a value: the fullest form within a quarter of its stage's time.

Both are reckoned from operations and bytes, so that the same model has the same sources everywhere.
Of a source only its arithmetic counts: the calls that it makes are the same in every form, and on
small values they are nearly all of its time, of which no form would save anything.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import DecouplingError
from ...plan import TensorSpec
from ...sources import auto_forms, make_source
from ..cut.cutting import Flow
from .costing import ADAM_NANOSECONDS, Costs
from .probes import BYTES_PER_SECOND, FLOPS_PER_SECOND, Walk

AUTO = "auto"
SHARE = 0.25  # of a stage's time, for all of its sources together
_EQUAL = 1.1  # where no form fits, the fullest that costs so many times the cheapest


@dataclass(frozen=True)
class Sized:
    """What stands for ``"auto"`` at one value.

    Attributes:
        option: ``"auto"`` itself where its full form fits, else the name of a cheaper one.
        share: of the stage's time that it takes.
        full: the same of the full form.
        fits: whether it takes no more than its part of a quarter.
    """

    option: str
    share: float
    full: float
    fits: bool


def stage_times(costs: Costs, stage_of: Mapping[fx.Node, int]) -> dict[int, int]:
    """Nanoseconds of every stage without its sources: forward, backward, update."""
    times: dict[int, int] = {}
    for node, stage in stage_of.items():
        tables = (costs.forward, costs.backward, costs.update)
        times[stage] = times.get(stage, 0) + sum(table.get(node.name, 0) for table in tables)
    return times


class Enough:
    """Tells which nodes are weighed: none of stages that take so long already that full forms fit.

    Args:
        stage_of: stage of every computed node.
        sent: by stage, the values that its sources serve.
        context: what these see besides.
    """

    def __init__(
        self,
        stage_of: Mapping[fx.Node, int],
        sent: Mapping[int, Sequence[TensorSpec]],
        context: TensorSpec | None,
    ) -> None:
        self._stage_of = stage_of
        self._left = {
            stage: sum(_work(AUTO, spec, context) for spec in specs) / SHARE
            for stage, specs in sent.items()
        }
        self._last: fx.Node | None = None

    def __call__(self, node: fx.Node, walk: Walk) -> bool:
        """Whether it is weighed."""
        if self._last is not None:
            name = self._last.name
            taken = walk.forward.get(name, 0) + walk.backward.get(name, 0)
            self._left[self._stage_of[self._last]] -= taken
        wanted = self._left.get(self._stage_of.get(node, -1), 0.0) > 0
        self._last = node if wanted else None
        return wanted


def even_share(flow: Flow, costs: Costs, stages: int) -> float:
    """Nanoseconds of each of so many stages, were they all alike; before there are any."""
    alike = {node: 0 for node in flow.nodes if flow.is_computed(node)}
    return sum(stage_times(costs, alike).values()) / stages


def size_sources(
    specs: Sequence[TensorSpec], context: TensorSpec | None, stage: float
) -> list[Sized]:
    """What stands for ``"auto"`` at values that one stage sends, which share the quarter by what
    their full forms cost.

    Args:
        specs: the values.
        context: what their sources see besides.
        stage: nanoseconds of the stage.
    """
    full = [_work(AUTO, spec, context) for spec in specs]
    whole, stage = max(sum(full), 1e-9), max(stage, 1e-9)
    found = []
    for spec, most in zip(specs, full, strict=True):
        budget = SHARE * stage * most / whole
        forms = [AUTO, *auto_forms(spec, context)]
        chosen = next((f for f in forms if _work(f, spec, context) <= budget), None)
        fits = chosen is not None
        if chosen is None:
            works = [_work(form, spec, context) for form in forms]
            chosen = next(f for f, w in zip(forms, works, strict=True) if w <= _EQUAL * min(works))
        share = _work(chosen, spec, context) / stage
        found.append(Sized(chosen, share, most / stage, fits))
    return found


@functools.lru_cache(maxsize=4096)
def _work(option: str, spec: TensorSpec, context: TensorSpec | None) -> float:
    """Nanoseconds of one prediction, regression and update, calls left out; 0 for what cannot be
    made, which is refused later, with its place.
    """
    try:
        with torch.device("meta"):
            source = make_source(option, (spec,), context)
        operations = source.flops()
    except DecouplingError:
        return 0.0
    learnt = sum(p.numel() for p in source.parameters())
    weights = sum(p.nbytes for p in source.parameters())
    # a prediction, and twice that for the gradients of its weights and of what is between them
    moved = 3 * (2 * spec.nbytes + weights)
    seconds = max(3 * operations / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND)
    return seconds * 1e9 + ADAM_NANOSECONDS * learnt


def remarks(sized: Mapping[str, Sized], kinds: Mapping[str, str]) -> list[str]:
    """What a plan says where ``"auto"`` is not the full form, or costs more than it should.

    Args:
        sized: by interface.
        kinds: the names of the full forms, by interface.
    """
    lines = []
    for interface, found in sized.items():
        full, taken = repr(kinds[interface]), f"{found.share:.0%} of its stage's time"
        line = f"source at {interface!r}: {found.option!r} takes {taken}"
        if found.option != AUTO:
            line += f"; {full} would take {found.full:.0%}"
        elif not found.fits:
            line = f"source at {interface!r}: {full} takes {taken}"
        if not found.fits:
            line += "; no form takes a quarter or less"
        if found.option != AUTO or not found.fits:
            lines.append(line)
    return lines
