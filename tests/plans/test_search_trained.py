"""What is found is trained exactly."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.passes.cut.cutting import find_flow
from dni_fx.passes.search import closures, source_costs
from dni_fx.passes.trace.tracing import trace_calls
from dni_fx.plan import CutPlan

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from ..models.cases import Case, named_leaves
from ..models.zoo import BY_NAME, ZOO
from .searches import X, plan


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    """Every tensor, by name, to a tolerance relative to its largest value."""
    left, right = dict(named_leaves(got)), dict(named_leaves(wanted))
    assert left.keys() == right.keys()
    for path, expected in right.items():
        found = left[path]
        if isinstance(expected, torch.Tensor) and expected.is_floating_point() and expected.numel():
            scale = max(1.0, float(expected.abs().nan_to_num().max()))
            torch.testing.assert_close(
                found, expected, rtol=0, atol=tolerance * scale, equal_nan=True, msg=path
            )
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), path


def runs_of(case: Case, found: CutPlan | None) -> tuple[Any, Any]:
    """One step in exact mode under a plan, and the same by backprop; the case itself where there is
    no plan.
    """
    options: dict[str, Any] = {"steps": 1, "batch": 3}
    wanted = oracles.backprop_run(case, torch.float64, sgd, **options)
    model: Any = case.build(torch.float64)
    args, kwargs, _ = oracles.draw(case, 3, torch.float64, 0)
    decoupled = dni_fx.decouple(
        model,
        found or list(case.cuts),
        example_inputs=args,
        example_kwargs=kwargs,
        gradients="exact",
        check=False,
    )
    return oracles.exact_run(case, torch.float64, sgd, decoupled=decoupled, **options), wanted


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_found_cuts_train_as_backpropagation_does(case: Case) -> None:
    """Bit for bit where stages are contiguous in program order."""
    args, kwargs, _ = oracles.draw(case, 3, torch.float64, 0)
    found = dni_fx.plan_cuts(
        case.build(torch.float64),
        args,
        example_kwargs=kwargs,
        stages=3,
        costs="analytic",
        gradients="zero",
    )
    got, wanted = runs_of(case, replace(found, gradients=()))
    if found.assignment:
        assert_close(got["step 0"], wanted["step 0"], 1e-12)
    else:
        assert_bits_equal(got["step 0"], wanted["step 0"], case.name)


def random_assignment(model: nn.Module, args: Any, kwargs: Any, rng: random.Random) -> CutPlan:
    """Two stages: a random closed set of units, and the rest."""
    trace = trace_calls(model, args, kwargs)
    flow = find_flow(trace)
    units = closures.find_units(flow)
    done, count = 0, rng.randint(1, max(1, len(units.masks) - 1))
    for _ in range(count):
        ready = [u for u, b in enumerate(units.before) if not done >> u & 1 and not b & ~done]
        done |= 1 << rng.choice(ready)
    inside = closures.nodes_of(units, done)
    stages = [
        (n.name, 1 - (inside >> p & 1)) for p, n in enumerate(flow.nodes) if flow.is_computed(n)
    ]
    return CutPlan(
        type(model).__name__,
        trace.digest,
        ("anywhere",),
        (),
        tuple(sorted(stages, key=lambda s: s[1])),
    )


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_any_closed_set_of_units_may_be_cut(case: Case, seed: int) -> None:
    """Interleaved stages: outputs, gradients, buffers and weights agree with backpropagation to
    1e-12 in float64.
    """
    args, kwargs, _ = oracles.draw(case, 3, torch.float64, 0)
    found = random_assignment(case.build(torch.float64), args, kwargs, random.Random(seed))
    got, wanted = runs_of(case, found)
    assert_close(got["step 0"], wanted["step 0"], 1e-12)


def test_sets_that_part_written_memory_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: every node a unit of its own, so that a write and a reader of the same
    memory are parted.
    """

    def careless(flow: Any) -> closures.Units:
        nodes = [n for n in flow.nodes if flow.is_computed(n)]
        number = {n: i for i, n in enumerate(nodes)}
        before = tuple(
            sum(1 << number[i] for i in set(n.all_input_nodes) if i in number) for n in nodes
        )
        return closures.Units(tuple(1 << flow.index[n] for n in nodes), before, ())

    monkeypatch.setattr(closures, "find_units", careless)
    wrong = 0
    for name, seed in itertools.product(
        ("read_after_mutation", "mutate_through_view", "setitem_after_cut"), range(8)
    ):
        case = BY_NAME[name]
        args, kwargs, _ = oracles.draw(case, 3, torch.float64, 0)
        found = random_assignment(case.build(torch.float64), args, kwargs, random.Random(seed))
        try:
            got, wanted = runs_of(case, found)
            assert_close(got["step 0"], wanted["step 0"], 1e-12)
        except (AssertionError, RuntimeError, ValueError):
            wrong += 1
    assert wrong


def test_a_value_that_its_source_cannot_take_costs_too_much_to_cut_at() -> None:
    class Picky(dni_fx.sources.Zero):
        def predict(self, values: Any, context: Any = None) -> Any:
            if values[0].shape[1] == 5:
                raise RuntimeError("no")
            return super().predict(values, context)

    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise([8, 8, 5, 8])))
    assert plan(model, stages=2, costs="measured", gradients=Picky).cuts == ("0",)
    flow = find_flow(trace_calls(model, (X,), {}))
    names = [n.name for n in flow.nodes if flow.is_computed(n)]
    prices = source_costs.measure_sources(flow, lambda _: Picky, None)
    assert prices[names[0]][0] < source_costs.UNSERVED
    assert prices[names[1]][0] == source_costs.UNSERVED
