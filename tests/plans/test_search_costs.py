"""What stages cost and how well their cuts can be learnt, as the search reckons it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.graphs.pipeline import trace_model
from dni_fx.passes.cut.cutting import find_cuts, find_flow, legal_positions
from dni_fx.passes.search import costing, probes, source_costs
from dni_fx.passes.search.chains import Wishes
from dni_fx.passes.search.searching import search_cuts
from dni_fx.passes.trace.tracing import trace_calls
from dni_fx.sources import EACH, JOINT, SOURCES

from ..helpers import oracles
from ..models.cases import Case
from ..models.zoo import ZOO
from .searches import Towers, X, chain, plan, search_of


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm's old form
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_every_model_of_the_zoo_can_be_weighed(case: Case) -> None:
    """Measured and analytic costs: no node fails, and the model keeps every bit."""
    model = case.build(torch.float32)
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    for costs in ("measured", "analytic"):
        found = dni_fx.plan_cuts(model, args, example_kwargs=kwargs, stages=3, costs=costs)
        assert found.report is not None
        for stage in found.stages:
            assert stage.cost is not None
            assert stage.cost.forward > 0
        assert search_of(found).slowest >= search_of(found).bound * (1 - 1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_measured_costs_know_the_dear_layer() -> None:
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Linear(16, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 16)
    )
    x = torch.randn(64, 16)
    flow = find_flow(trace_calls(model, (x,), {}))
    costs = costing.measure_costs(flow, (x,), {}, {})
    names = [n.name for n in flow.nodes if flow.is_computed(n)]
    assert max(names, key=lambda n: costs.forward[n]) == names[2]
    assert max(names, key=lambda n: costs.backward[n]) == names[2]
    assert costs.parameter_bytes[names[2]] == 4 * 4 * (2048 * 2048 + 2048)
    assert costs.activation_bytes[names[1]] == 64 * 2048 * 4  # kept by its user


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"conv"}))  # which takes maps alone
def test_whatever_serves_a_value_has_a_cost(name: str) -> None:
    """Each source alone, for a boundary, and for each consumer, where it may be asked for so."""
    served = 0
    for option in (name, f"{JOINT}{name}", f"{EACH}{name}"):
        for costs in ("analytic", "measured"):
            asked = {"gradients": option, "costs": costs, "context": dni_fx.one_hot(3)}
            refusal = ""
            try:
                found = dni_fx.plan_cuts(chain(3), (X,), stages=2, **asked)
            except DecouplingError as error:
                refusal = str(error)
            if refusal:
                assert option.startswith(EACH), option
                assert "for each consumer" in refusal
                continue
            served += 1
            for stage in found.stages:
                assert stage.cost is not None
                assert stage.cost.sources < 1, (option, costs)
    assert served >= 4


def test_analytic_costs_count_attention() -> None:
    """The counter of torch has no formula for the CPU's attention and counts it as nothing."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            return F.scaled_dot_product_attention(h, h, h)

    x = torch.randn(2, 4, 512, 64)
    flow = find_flow(trace_calls(Attention(), (x,), {}))
    costs = costing.estimate_costs(flow, (x,), {}, {})
    attention = next(n.name for n in flow.nodes if "attention" in n.name)
    flops = 2 * 2 * 2 * 4 * 512 * 512 * 64
    assert costs.forward[attention] == pytest.approx(
        flops / probes.FLOPS_PER_SECOND * 1e9, rel=0.01
    )
    assert costs.backward[attention] > 2 * costs.forward[attention]


def test_a_plan_is_equal_in_every_process() -> None:
    """Nothing is asked for but stages."""
    code = (
        "import torch, dni_fx; from tests.plans.searches import Towers, X;"
        "torch.manual_seed(3);"
        "plan = dni_fx.plan_cuts(Towers(), (torch.randn(6, 8),), stages=3);"
        "print(plan.to_json(), plan)"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(texts) == 1


PLANNED = ZOO[:: max(1, len(ZOO) // 20)][:20]


def planned(seeds: tuple[str, ...], costs: str) -> list[dict[str, str]]:
    """The plans of twenty models as text, from one process for each hash seed, all at once: the
    machine is busy.
    """
    command = [sys.executable, "-m", __name__, costs]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in seeds
    ]
    texts = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(seeds)
    return [json.loads(text.splitlines()[-1]) for text in texts]


def print_plans(costs: str) -> None:
    """Nothing is asked for but stages, where costs are analytic."""
    found = {}
    for case in PLANNED:
        torch.manual_seed(3)
        model = case.build(torch.float32)
        args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
        more = {} if costs == "analytic" else {"costs": costs}
        plan = dni_fx.plan_cuts(model, args, example_kwargs=kwargs, stages=3, **more)
        found[case.name] = f"{plan.to_json()}\n{plan}"
    print(json.dumps(found))


@pytest.mark.matrix
def test_plans_are_equal_in_every_process() -> None:
    """Three processes, two hash seeds, twenty models."""
    first, *others = planned(("0", "1", "1"), "analytic")
    assert len(first) == 20
    assert first == others[0] == others[1]


@pytest.mark.matrix
def test_measured_costs_differ_from_process_to_process() -> None:
    """Negative control: the texts tell plans apart."""
    first, second = planned(("0", "0"), "measured")
    assert first.keys() == second.keys()
    assert first != second


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_analytic_plans_are_nearly_as_fast_as_measured_ones() -> None:
    """Both judged by what was measured: of a sample of the zoo half lose at most 5 %."""
    ratios = []
    for case in ZOO[::4]:
        args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
        flow = find_flow(trace_model(case.build(torch.float32), args, kwargs))
        legal = legal_positions(flow)
        wishes = Wishes(min(3, len(legal) + 1), allowed=legal, in_order=True)
        auto = lambda _: "auto"  # noqa: E731
        sources = source_costs.estimate_sources(flow, auto, None)
        guessed = costing.estimate_costs(flow, args, kwargs, sources)
        sources = source_costs.measure_sources(flow, auto, None)
        measured = costing.measure_costs(flow, args, kwargs, sources)
        cuts = tuple(find_cuts(flow, search_cuts(flow, guessed, wishes).cuts))
        only = replace(wishes, allowed=cuts, required=cuts)
        slowest = [search_cuts(flow, measured, w).search for w in (only, wishes)]
        ratios.append(slowest[0].slowest / slowest[1].slowest)  # type: ignore[union-attr]
    assert statistics.median(ratios) <= 1.05


def test_given_costs_of_a_module_are_spread_over_its_nodes() -> None:
    found = plan(
        Towers(), stages=2, costs={"left": 4.0, "right": 4.0}, gradients="zero", bandwidth=1e12
    )
    assert [round(s.cost.forward + s.cost.backward, 3) for s in found.stages if s.cost] == [
        4.0,
        4.0,
    ]
    pairs = plan(chain(2), stages=2, costs={"0": (1.0, 2.0), "1": (1.0, 2.0)}, gradients="zero")
    assert [(s.cost.forward, s.cost.backward) for s in pairs.stages if s.cost] == [(1.0, 2.0)] * 2


def test_learnability_sees_where_gradients_can_be_explained() -> None:
    """Before the head a linear source with labels explains nearly all; through random signs it
    cannot.
    """

    class Scrambled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.mid, self.last, self.head = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            h = torch.sin(50 * self.mid(h))
            return self.head(self.last(h))

    torch.manual_seed(0)
    batches = [(torch.randn(64, 8), torch.randint(8, (64,))) for _ in range(8)]
    options: dict[str, Any] = {
        "stages": 2, "objective": "learnability", "batches": batches, "context": dni_fx.one_hot(8),
        "loss": lambda o, t: F.mse_loss(o, F.one_hot(t, 8).float()), "gradients": "linear",
        "costs": dict.fromkeys(("inp", "mid", "last", "head"), 1.0),
    }  # fmt: skip
    model = Scrambled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = dni_fx.plan_cuts(model, (batches[0][0],), **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (share,) = search_of(found).explained.values()
    assert share > 0.5
    assert "explains" in next(iter(search_of(found).reasons.values()))
    nothing = dni_fx.plan_cuts(model, (batches[0][0],), **{**options, "gradients": "zero"})
    assert list(search_of(nothing).explained.values()) == [0.0]


@pytest.mark.parametrize("gradients", ["exact", "joint:exact"])
def test_learnability_of_what_predicts_nothing_is_refused(gradients: str) -> None:
    batches = [(X, torch.zeros(6, dtype=torch.long))] * 2
    asked = {"objective": "learnability", "batches": batches, "loss": F.cross_entropy}
    with pytest.raises(DecouplingError, match="objective='learnability' asks how well"):
        plan(chain(3), stages=2, gradients=gradients, **asked)


def test_learnability_needs_batches_to_judge_by() -> None:
    with pytest.raises(DecouplingError, match="two batches"):
        plan(chain(), stages=2, objective="learnability", batches=[(X, X)], loss=F.mse_loss)


if __name__ == "__main__":
    print_plans(sys.argv[1])
