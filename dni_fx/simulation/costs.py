"""A plan's costs, or one error that says how to get them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..errors import DecouplingError
from ..plan import CutPlan, StageCost


def checked_costs(plan: Any) -> list[StageCost]:
    """The costs of every stage.

    Raises:
        DecouplingError: no plan, or one without costs, or costs that are no times.
    """
    if not isinstance(plan, CutPlan):
        raise DecouplingError(
            "simulate takes a plan of dni_fx.plan_cuts, or decoupled.plan, not a "
            f"{type(plan).__name__}"
        )
    names = ", ".join(map(repr, plan.cuts[:3])) + ", ..." * (len(plan.cuts) > 3)
    where = f"stages={len(plan.cuts) + 1}" if plan.assignment else f"cuts=[{names}]"
    again = f'make it again with dni_fx.plan_cuts(model, example_inputs, {where}, costs="measured")'
    if plan.report is None:
        raise DecouplingError(f"this plan holds names only, since it was read from JSON: {again}")
    costs = {stage.name: stage.cost for stage in plan.stages}
    found = [cost for cost in costs.values() if cost is not None]
    if len(found) < len(costs):
        without = ", ".join([name for name, cost in costs.items() if cost is None][:5])
        without = without if found else "all of them"
        raise DecouplingError(f"stages of this plan have no costs ({without}): {again}")
    wrong = [
        f"{stage}.cost.{n} is {v!r}"
        for stage, cost in costs.items()
        for n, v in vars(cost).items()
        if not 0 <= number(v) < math.inf
    ]
    if not wrong and not sum(c.forward + c.backward for c in found) > 0:
        wrong = ["all are 0 seconds"]
    if wrong:
        raise DecouplingError(
            f"costs must be finite numbers, 0 or more, not all 0: {'; '.join(wrong[:5])}; {again}"
        )
    return found


def number(value: Any) -> float:
    """The value, or nan where it is no number: false in every comparison."""
    return float(value) if type(value) is not bool and isinstance(value, Real) else math.nan
