"""What a simulation says, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from typing import Any

import pytest
import torch

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import CutPlan, StageCost
from dni_fx.simulation import ScheduleReport, Simulation, simulate

from ..helpers.refusing import refused
from .events import PIPELINES, balanced, make_plan, random_costs, random_graph


def test_the_sentence_where_cutting_pays() -> None:
    costs = [StageCost(1.0, 2.0, sources=0.3)] * 3 + [StageCost(1.0, 2.3)]
    text = simulate(make_plan(costs)).sentence
    assert text.startswith(
        "4 equal devices: decoupled 3.7 x one device; 1F1B with 8 micro-batches 2.8 x. "
    )
    assert (
        "slowest stage is stage_0: 3,300.00 ms of work; the whole model on one device takes "
        "12,300.00 ms." in text
    )
    assert text.endswith("compare time to loss, not steps.")
    assert "does not pay" not in text
    assert "its gradients are true" not in text


def test_the_sentence_where_cutting_does_not_pay() -> None:
    heavy = [StageCost(0.01, 0.02, sources=0.1), StageCost(5.0, 10.0, sources=0.2)]
    told = simulate(make_plan(heavy, {(0, 1): 1000}), bandwidth=500.0, latency=1e-3)
    assert told["decoupled"].speedup < 1
    assert all(told[n].speedup < 1 for n in PIPELINES)
    assert told.sentence.startswith(
        "cutting does not pay here: on 2 equal devices, decoupled 0.99 x one device; "
    )
    assert "slowest stage is stage_1" in told.sentence


def test_the_sentence_where_only_true_gradients_pay() -> None:
    told = simulate(make_plan(balanced(4, sources=12.0)), micro_batches=16)
    assert told.sentence.startswith(
        "decoupling does not pay here: on 4 equal devices, decoupled 0.80 x one device; "
    )
    assert "zero-bubble is as fast or faster (3.8 x) and its gradients are true." in told.sentence


def test_one_stage_and_one_micro_batch() -> None:
    told = simulate(make_plan([StageCost(1.0, 2.0)]), micro_batches=1)
    assert [r.seconds for r in told.schedules] == [3.0] * 5
    assert told.sentence.startswith(
        "cutting does not pay here: on 1 device, decoupled 1.00 x one device; 1F1B with 1 "
    )
    assert "1 micro-batch 1.00 x" in told.sentence


def test_prints_an_aligned_table_and_the_sentence() -> None:
    told = simulate(make_plan([StageCost(1e-5, 2e-5), StageCost(0.5, 1.0)]), micro_batches=4)
    table, _, sentence = str(told).partition("\n\n")
    lines = table.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "one process",
        "GPipe",
        "1F1B",
        "zero-bubble",
        "decoupled",
    ]
    assert set(lines[1]) == {"-", " "}
    assert (
        len({line.find(" ", line.find(".") + 1) for line in lines[2:]}) == 1
    )  # milliseconds end in one column
    assert sentence == told.sentence
    with pytest.raises(KeyError, match="no schedule 'PipeDream'; there are one process, GPipe"):
        told["PipeDream"]


def test_frozen_and_repeatable() -> None:
    plan = make_plan(balanced(3))
    told = simulate(plan)
    assert isinstance(told, Simulation)
    assert isinstance(told["1F1B"], ScheduleReport)
    assert told == dni_fx.simulate(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.fill = 0.0  # type: ignore[misc]


def test_defaults_of_torch_do_not_matter() -> None:
    plan = make_plan(random_costs(random.Random(1), 5), random_graph(random.Random(1), 5))
    told = simulate(plan, latency=0.1, bandwidth=100.0)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert simulate(plan, latency=0.1, bandwidth=100.0) == told
    finally:
        torch.set_default_dtype(torch.float32)


def test_many_stages_take_near_linear_time() -> None:
    rng = random.Random(0)
    taken = {}
    for count in (1_000, 10_000):
        links = {(k, k + 1): rng.randrange(1, 1000) for k in range(count - 1)}
        links |= {(k, count - 1 - k): 5 for k in range(count // 2 - 1)}  # as a U-Net has them
        plan = make_plan(random_costs(rng, count), links)
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            told = simulate(plan, micro_batches=32, latency=1e-3, bandwidth=1e3)
            best = min(best, time.process_time() - start)
        taken[count] = best
        assert all(math.isfinite(r.seconds) for r in told.schedules)
    assert (
        taken[10_000] < 25 * taken[1_000] + 0.5
    )  # ten times as many; the rest is room for a busy machine


def test_plans_without_costs_name_the_next_step() -> None:
    plan = make_plan(balanced(6))
    again = (
        "dni_fx.plan_cuts(model, example_inputs, cuts=['layer0', 'layer1', 'layer2', ...], "
        'costs="measured")'
    )
    refused(
        DecouplingError,
        lambda: simulate(CutPlan.from_json(plan.to_json())),
        "read from JSON",
        again,
    )
    bare = [dataclasses.replace(s, cost=None) for s in plan.stages]
    report = dataclasses.replace(plan.report, stages=tuple(bare))
    refused(
        DecouplingError,
        lambda: simulate(dataclasses.replace(plan, report=report)),
        "have no costs (all of them)",
        again,
    )
    report = dataclasses.replace(plan.report, stages=(*plan.stages[:5], bare[5]))
    refused(
        DecouplingError,
        lambda: simulate(dataclasses.replace(plan, report=report)),
        "have no costs (stage_5)",
        again,
    )
    free = CutPlan(
        "Net", "0" * 16, ("a", "b"), assignment=(("x", 0), ("y", 1), ("z", 2))
    )  # names of cuts do not make it
    refused(DecouplingError, lambda: simulate(free), "plan_cuts(model, example_inputs, stages=3, ")
    refused(DecouplingError, lambda: simulate(json), "decoupled.plan, not a module")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("where", ["forward", "sources", "activation_bytes"])
def test_bad_costs_name_their_stage(where: str, wrong: Any) -> None:
    costs = [*balanced(2), dataclasses.replace(balanced(1)[0], **{where: wrong})]
    refused(
        DecouplingError,
        lambda: simulate(make_plan(costs)),
        f"stage_2.cost.{where} is {wrong!r}",
        "plan_cuts",
    )


def test_nothing_to_compare() -> None:
    refused(
        DecouplingError,
        lambda: simulate(make_plan([StageCost(0.0, 0.0)] * 2)),
        "all are 0 seconds",
        "plan_cuts",
    )


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("micro_batches", v) for v in (0, -1, 2.0, True, "8", None)]
    + [("latency", v) for v in (-1e-9, math.nan, math.inf, "0", None)]
    + [("bandwidth", v) for v in (0, -1.0, math.nan, "1e10", None)]
    + [
        ("speeds", v)
        for v in (
            [1.0, 0.0],
            [1, -1],
            [1, math.nan],
            [1, math.inf],
            ["1", "2"],
            "12",
            1.0,
            [True, 1],
        )
    ],
)
def test_bad_numbers(option: str, wrong: Any) -> None:
    refused(
        DecouplingError,
        lambda: simulate(make_plan(balanced(2)), **{option: wrong}),
        f"{option}={wrong!r}",
        "expected",
    )


@pytest.mark.parametrize("speeds", [[], [1.0], [1, 1, 1]])
def test_speeds_of_the_wrong_length(speeds: list[float]) -> None:
    refused(
        DecouplingError,
        lambda: simulate(make_plan(balanced(2)), speeds=speeds),
        f"has {len(speeds)} numbers",
        "2 stages",
    )


def test_sources_that_wait_are_said_to() -> None:
    plan = make_plan(balanced(2, sources=0.5))
    rows = {}
    for kind in ("linear", "mix", "joint:feedback", "delayed"):
        chosen = tuple((i.name, kind) for i in plan.interfaces)
        rows[kind] = simulate(dataclasses.replace(plan, gradients=chosen), bandwidth=math.inf)[
            "decoupled"
        ]
    assert "as mix do" in rows["mix"].note
    assert "as feedback do" in rows["joint:feedback"].note
    assert "do not wait" not in rows["linear"].note
    assert rows["delayed"].seconds == pytest.approx(rows["linear"].seconds + 1.0)  # a forward more
