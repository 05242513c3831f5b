"""Plans that are found: what users ask for, and stages off the program order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.errors import CutError, DecouplingError
from dni_fx.passes.cut.cutting import find_flow
from dni_fx.passes.search import closures
from dni_fx.passes.trace.tracing import trace_calls
from dni_fx.plan import CutPlan

from .searches import X, chain, plan, search_of


class Mixed(nn.Module):
    """Branches that take turns in program order, so that positions cut both."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.b = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = right = x
        for a, b in zip(self.a, self.b, strict=True):
            left, right = a(left).relu(), b(right).relu()
        return self.head(torch.cat([left, right], 1))


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_layers_are_cut_equally(stages: int) -> None:
    costs = {str(i): 1.0 for i in range(8)}
    found = plan(chain(), stages=stages, costs=costs, gradients="zero", bandwidth=1e12)
    assert [s.nodes for s in found.stages] == [8 // stages] * stages
    assert search_of(found).slowest == pytest.approx(8 / stages)
    assert search_of(found).gap == pytest.approx(0, abs=1e-6)
    assert search_of(found).exact == "all partitions"


def test_the_cost_of_sources_moves_the_cuts() -> None:
    model = nn.Sequential(
        nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8), nn.Linear(8, 512), nn.Linear(512, 8)
    )
    free = plan(model, torch.randn(256, 8), stages=2, gradients="zero")
    paid = plan(model, torch.randn(256, 8), stages=2, gradients="mlp")
    assert paid.cuts == ("2",)  # the narrow value, whose synthesizer is cheap
    assert search_of(paid).slowest > search_of(free).slowest


class Residual(nn.Module):
    """A block whose inside is best cut, with two values crossing there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).relu() * 2)


def blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *(Residual() for _ in range(3)), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("inner", "wish", "cuts"),
    [
        (0.03, {}, {"2.a", "2.b"}),
        (0.03, {"within": "anything"}, {"relu_1"}),
        (0.10, {}, {"relu_1"}),
        (0.10, {"within": "modules"}, {"2.a", "2.b"}),
        (0.10, {"max_values": 1}, {"0", "1", "2", "3"}),
        (0.10, {"within": "modules", "max_values": 1}, {"0", "1", "2", "3"}),
        (0.10, {"within": "modules", "must_cut": ["relu_1"]}, {"relu_1"}),
    ],
)
def test_cuts_where_modules_end_or_few_values_cross(
    inner: float, wish: dict[str, Any], cuts: set[str]
) -> None:
    """Best is to cut between two nodes that end no module: 3 % or 9 % better than beside them."""
    costs = {"2.a": 1.0, "relu_1": inner, "mul_1": inner, "2.b": 1.0}
    options: dict[str, Any] = {"stages": 2, "gradients": "zero", "bandwidth": 1e15}
    (found,) = plan(blocks(), X[:, :6], costs=costs, **options, **wish).cuts
    assert found in cuts


def test_places_where_modules_end_are_listed() -> None:
    every = dni_fx.list_cut_points(blocks(), (X[:, :6],))
    ends = dni_fx.list_cut_points(blocks(), (X[:, :6],), within="modules")
    assert [p.name for p in ends] == [
        "0",
        "1.a",
        "1.b",
        "1",
        "2.a",
        "2.b",
        "2",
        "3.a",
        "3.b",
        "3",
        "4",
    ]
    assert {p.name for p in every} - {p.name for p in ends} == {
        *("relu", "mul", "relu_1", "mul_1", "relu_2", "mul_2")
    }


def test_speeds_give_the_faster_stage_more() -> None:
    costs = {str(i): 1.0 for i in range(8)}
    found = plan(chain(), speeds=[3.0, 1.0], costs=costs, gradients="zero", bandwidth=1e12)
    assert [s.nodes for s in found.stages] == [6, 2]


def test_memory_and_the_fewest_stages_under_a_cap() -> None:
    model = chain(8, 64)
    x = torch.randn(4, 64)
    whole = plan(model, x, stages=1, gradients="zero").stages[0].cost
    assert whole is not None
    halves = plan(model, x, stages=2, gradients="zero", objective="memory")
    sizes = [s.cost.nbytes for s in halves.stages if s.cost is not None]
    assert max(sizes) < 0.6 * whole.nbytes
    few = plan(model, x, gradients="zero", objective="memory", memory_cap=0.4 * whole.nbytes)
    assert len(few.stages) == 3
    capped = plan(model, x, stages=4, gradients="zero", memory_cap=0.4 * whole.nbytes)
    assert all(s.cost is not None and s.cost.nbytes <= 0.4 * whole.nbytes for s in capped.stages)
    with pytest.raises(
        CutError, match=r"memory_cap=.* cannot be kept with 2 stages: the stage from .* too many"
    ):
        plan(model, x, stages=2, gradients="zero", memory_cap=0.3 * whole.nbytes)


def test_traffic_takes_the_narrow_place() -> None:
    model = nn.Sequential(
        *(nn.Linear(a, b) for a, b in itertools.pairwise([8, 8, 8, 8, 2, 8, 8, 8, 8]))
    )
    costs = {str(i): 1.0 if i not in (3, 4) else 0.98 for i in range(8)}
    costs["3"] = 1.05
    found = plan(
        model, stages=2, costs=costs, gradients="zero", objective="traffic", bandwidth=1e12
    )
    assert found.cuts == ("3",)


def test_wishes_are_kept() -> None:
    model = chain()
    assert plan(model, stages=3, must_cut=["0"]).cuts[0] == "0"
    best = plan(model, stages=2).cuts[0]
    assert plan(model, stages=2, never_cut=[best]).cuts[0] != best
    together = plan(model, stages=2, keep_together=[("1", "6")])
    assert together.cuts[0] in ("0", "6")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"must_cut": ["nope"]}, ["must_cut", "nope"]),
        ({"never_cut": ["nope"]}, ["never_cut", "nope"]),
        ({"within": "module"}, ["within='module'", "did you mean 'modules'?"]),
        ({"max_values": 0}, ["max_values=0", "at least 1"]),
        (
            {"within": "modules", "never_cut": [str(i) for i in range(7)]},
            ["within='modules'", "leave no place", "after '0', cross 1"],
        ),
        ({"keep_together": ["nope"]}, ["keep_together", "nope"]),
        ({"must_cut": ["3"], "keep_together": [("1", "6")]}, ["must_cut", "'3'", "keep_together"]),
        ({"must_cut": ["3"], "never_cut": ["3"]}, ["must_cut and never_cut", "'3'"]),
        ({"must_cut": ["1", "3"], "stages": 2}, ["must_cut names 2 cuts", "stages=2"]),
        ({"must_cut": ["7"]}, ["must_cut", "'7'", "nothing is computed after it"]),
        ({"objective": "througput"}, ["objective='througput'", "'throughput'"]),
        ({"objective": "learnability"}, ["batches=", "loss="]),
        ({"costs": "guessed"}, ["costs='guessed'", "'measured'"]),
        ({"costs": {"nope": 1.0}}, ["costs=", "nope"]),
        ({"costs": {"0": -1.0}}, ["not negative"]),
        ({"bandwidth": 0}, ["bandwidth=0"]),
        ({"memory_cap": -1}, ["memory_cap=-1"]),
        ({"speeds": [1.0, 0.0]}, ["speeds=", "0.0"]),
        ({"speeds": [1.0, 1.0], "stages": 3}, ["speeds=", "stages=3"]),
        ({"speeds": [1.0] * 20}, ["speeds= names 20 stages"]),
        ({"must_cut": "3"}, ["must_cut='3'", "list"]),
        ({"must_cut": 3}, ["must_cut=3", "list"]),
        ({"never_cut": [("1", "3")]}, ["never_cut=[('1', '3')]", "list of names"]),
        ({"keep_together": [3]}, ["keep_together=[3]", "list of names"]),
        ({"speeds": 2}, ["speeds=2", "list of numbers"]),
    ],
)
def test_wishes_that_cannot_be_met(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DecouplingError) as caught:
        plan(chain(), **options)
    assert [w for w in words if w not in str(caught.value)] == []


def test_plans_need_inputs_and_say_when_there_are_fewer_stages() -> None:
    with pytest.raises(DecouplingError, match="example_inputs"):
        dni_fx.plan_cuts(chain())
    found = plan(chain(3), stages=9)
    assert found.report is not None
    assert any("3 stages instead of 9" in n for n in found.report.notes)


def test_example_inputs_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        x = torch.randn(6, 8)
    with pytest.raises(DecouplingError, match="inference mode"):
        plan(chain(), x, stages=2)


def test_parameters_used_in_two_places_can_be_kept_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(8, 8), chain(4), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.middle(self.first(x))
            return self.last(F.linear(h, self.first.weight.t()))

    found = plan(Tied(), stages=2, keep_together=["first.weight"])
    assert found.cuts[0] not in ("first", "middle.0", "middle.1", "middle.2")
    with pytest.raises(
        CutError, match=r"must_cut: 'middle.1' lies between nodes that keep_together"
    ):
        plan(Tied(), stages=2, keep_together=["first.weight"], must_cut=["middle.1"])


def free_plan(gradients: str = "zero") -> tuple[Mixed, CutPlan]:
    """Two branches in turns: with dear transfers, each branch a stage is better than any
    position.
    """
    torch.manual_seed(0)
    model = Mixed()
    costs = {f"{n}.{i}": 1.0 for n in "ab" for i in range(4)}
    return model, plan(model, stages=2, costs=costs, gradients=gradients, bandwidth=1e3)


def test_branches_become_stages_where_positions_cut_both() -> None:
    _, found = free_plan()
    assert found.assignment
    assert search_of(found).exact == "all partitions"
    assert len(found.interfaces) == 1
    assert any("not contiguous" in n for n in found.report.notes if found.report)  # type: ignore[union-attr]


def test_exact_mode_keeps_program_order() -> None:
    """There it equals backpropagation bit for bit, and not within rounding only."""
    _, found = free_plan("exact")
    assert not found.assignment
    assert len(found.stages) == 2
    assert search_of(found).exact == "program order"


def test_a_free_plan_trains_like_backpropagation() -> None:
    """Stages that are interleaved in program order: gradients agree to 1e-12 in float64."""
    model, found = free_plan()
    model.double()
    x, target = X.double(), torch.tensor([0, 1, 2, 0, 1, 2])
    stored = CutPlan.from_json(found.to_json())
    assert stored == found
    decoupled = dni_fx.decouple(model, stored, example_inputs=(x,), gradients="exact")
    assert len(decoupled.stages) == 2
    assert not set(decoupled.stages[0].module.graph.nodes) & set(
        decoupled.stages[1].module.graph.nodes
    )
    torch.testing.assert_close(decoupled(x), model(x), rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(F.cross_entropy(model(x), target), list(model.parameters()))
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.0)
    )
    trainer.step(x, target=target)
    for expected, parameter in zip(wanted, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)
    decoupled.eval()
    torch.testing.assert_close(decoupled(x[:2]), model(x[:2]), rtol=0, atol=1e-12)


def test_a_stored_free_plan_is_checked() -> None:
    _, found = free_plan()
    content = json.loads(found.to_json())
    for broken in ([], content["stages"][:1], [[1], [2]]):
        if broken:
            with pytest.raises(DecouplingError, match="'stages'"):
                CutPlan.from_json(json.dumps({**content, "stages": broken}))


def test_nodes_that_must_not_be_parted_are_one_unit() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.rnn, self.head = (
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.GRU(4, 4),
                nn.Linear(4, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            part = h[:, :2]
            part.mul_(2)
            out, state = self.rnn(F.dropout(h, 0.1, self.training))
            return self.head(out + state + F.dropout(self.b(x), 0.1, self.training))

    flow = find_flow(trace_calls(Writes(), (torch.randn(3, 4),), {}))
    units = closures.find_units(flow)
    names = [{n.name for i, n in enumerate(flow.nodes) if m >> i & 1} for m in units.masks]
    written = next(g for g in names if "a" in g)
    assert any("mul" in n for n in written)
    assert len(next(g for g in names if "rnn" in g)) == 3  # with the members of its result
    drawn = [i for i, g in enumerate(names) if any("dropout" in n for n in g)]
    assert drawn == sorted(drawn)
    assert len(drawn) == 2
    assert units.before[drawn[1]] >> drawn[0] & 1  # random numbers are drawn in program order
