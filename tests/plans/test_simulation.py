"""Predicted schedules against an event simulator that knows only who waits for whom."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import CutPlan, Interface, PlanReport, StageCost, StageReport, TensorSpec
from dni_fx.simulation import ScheduleReport, Simulation, simulate

PIPELINES = ("GPipe", "1F1B", "zero-bubble")
Links = dict[tuple[int, int], int]  # bytes by (producer, consumer)


def make_plan(
    costs: list[StageCost], links: Links | None = None, parameters: Sequence[int] = (10,)
) -> CutPlan:
    """A plan with these costs; a chain without bytes where no links are given."""
    links = {(k, k + 1): 0 for k in range(len(costs) - 1)} if links is None else links
    stages = [
        StageReport(f"stage_{k}", 1, parameters[k % len(parameters)], None, cost=c)
        for k, c in enumerate(costs)
    ]
    interfaces = [
        Interface(f"v{k}_{to}", TensorSpec((size,), torch.uint8), k, (to,))
        for (k, to), size in links.items()
    ]
    cuts = tuple(f"layer{k}" for k in range(len(costs) - 1))
    return CutPlan(
        "Net", "0" * 16, cuts, report=PlanReport("trace", tuple(stages), tuple(interfaces))
    )


def random_costs(rng: random.Random, count: int, spread: float = 20.0) -> list[StageCost]:
    """Stages whose forwards and backwards differ by up to so many times."""

    def seconds() -> float:
        return spread ** rng.random()

    return [
        StageCost(seconds(), seconds(), rng.uniform(0, 5), rng.uniform(0, 5)) for _ in range(count)
    ]


def balanced(
    count: int, forward: float = 1.0, backward: float = 2.0, **rest: Any
) -> list[StageCost]:
    return [StageCost(forward, backward, **rest)] * count


# The oracle: a device does its list in order, an action waits for its messages, a link is a device
# too. --------------


class Events:
    """Longest-path times of actions, each on one device in the order of its list."""

    def __init__(self) -> None:
        self.order: dict[Any, list[Any]] = defaultdict(list)  # actions by device
        self.seconds: dict[Any, float] = {}
        self.waits: dict[Any, list[tuple[Any, float]]] = defaultdict(
            list
        )  # (action, delay after its end)

    def add(self, device: Any, action: Any, seconds: float, *waits: tuple[Any, float]) -> None:
        self.order[device].append(action)
        self.seconds[action] = seconds
        self.waits[action] += waits

    def run(self) -> dict[Any, float]:
        """When each action ends."""
        end: dict[Any, float] = {}
        free = dict.fromkeys(self.order, 0.0)
        todo = {device: list(reversed(actions)) for device, actions in self.order.items()}
        while any(todo.values()):
            stuck = True
            for device, actions in todo.items():
                while actions and all(a in end for a, _ in self.waits[actions[-1]]):
                    action = actions.pop()
                    ready = max((end[a] + delay for a, delay in self.waits[action]), default=0.0)
                    free[device] = end[action] = max(free[device], ready) + self.seconds[action]
                    stuck = False
            assert not stuck, "deadlock"
        return end


def turns(schedule: str, depth: int, deep: int, m: int) -> list[tuple[str, int]]:
    """What a stage does, in order: F forward, I input gradients, W weight gradients."""
    ahead = m if schedule == "GPipe" else min(deep - depth, m)
    late = {"GPipe": 0, "1F1B": 0, "zero-bubble": depth}[schedule]
    order = [("F", j) for j in range(ahead)]
    for j in range(m):
        order.append(("I", j))
        order += [("W", j - late)] if j >= late else []
        order += [("F", j + ahead)] if j + ahead < m else []
    return order + [("W", j) for j in range(max(0, m - late), m)]


def run_pipeline(
    plan: CutPlan, schedule: str, m: int, latency: float = 0.0, bandwidth: float = math.inf, speeds: Any = None,
    order: Callable[[str, int, int, int], list[tuple[str, int]]] = turns,
) -> float:  # fmt: skip
    """Seconds from the first forward to the last update; every message goes straight to the stage
    that uses it.
    """
    events, links = Events(), {(i.producer, i.consumers[0]): i.spec.nbytes for i in plan.interfaces}
    depth: dict[int, int] = {}
    for k in range(len(plan.stages)):
        depth[k] = max((depth[u] + 1 for u, to in links if to == k), default=0)
    deep = max(depth.values()) + 1
    for k, stage in enumerate(plan.stages):
        cost, speed = stage.cost, 1.0 if speeds is None else speeds[k]
        assert cost is not None
        weight = cost.backward / 2 if stage.parameters and schedule == "zero-bubble" else 0.0
        takes = {"F": cost.forward, "I": cost.backward - weight, "W": weight}
        for kind, j in order(schedule, depth[k], deep, m):
            waits = {
                "F": [(("down", u, k, j), latency) for u, to in links if to == k],
                "I": [
                    (("F", k, j), 0.0),
                    *((("up", k, to, j), latency) for u, to in links if u == k),
                ],
                "W": [(("I", k, j), 0.0)],
            }[kind]
            events.add(k, (kind, k, j), takes[kind] / speed / m, *waits)
        events.add(k, ("update", k), cost.update / speed)
    for (u, to), size in links.items():
        for j in range(m):
            events.add(
                ("down", u, to), ("down", u, to, j), size / bandwidth / m, (("F", u, j), 0.0)
            )
            events.add(("up", u, to), ("up", u, to, j), size / bandwidth / m, (("I", to, j), 0.0))
    return max(events.run().values())


def run_decoupled(
    plan: CutPlan, batches: int, latency: float = 0.0, bandwidth: float = math.inf
) -> float:
    """Seconds for so many batches: a stage waits for its inputs only, and trains without asking
    anyone.
    """
    events, links = Events(), {(i.producer, i.consumers[0]): i.spec.nbytes for i in plan.interfaces}
    for k, stage in enumerate(plan.stages):
        cost = stage.cost
        assert cost is not None
        for n in range(batches):
            waits = [(("down", u, k, n), latency) for u, to in links if to == k]
            events.add(k, ("F", k, n), cost.forward, *waits)
            events.add(k, ("rest", k, n), cost.backward + cost.update + cost.sources)
            for u, to in links:
                if u == k:
                    events.add(
                        ("down", u, to),
                        ("down", u, to, n),
                        links[u, to] / bandwidth,
                        (("F", k, n), 0.0),
                    )
    return max(events.run().values())


def random_graph(rng: random.Random, count: int) -> Links:
    """Stages that are no chain: skips and towers."""
    links = {(rng.randrange(k), k): rng.randrange(1000) for k in range(1, count)}
    for _ in range(rng.randrange(count)):
        k, to = sorted(rng.sample(range(count), 2))
        links[k, to] = rng.randrange(1000)
    return links


# Pipelines.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("seed", range(40))
def test_pipelines_of_unequal_stages_are_exact(name: str, seed: int) -> None:
    rng = random.Random(seed)
    count, m = rng.randint(1, 9), rng.randint(1, 14)
    costs = random_costs(rng, count, rng.choice([1.0, 3.0, 50.0]))
    links = {(k, k + 1): rng.choice([0, 20, 500, 5000]) for k in range(count - 1)}
    plan = make_plan(costs, links, parameters=rng.choices([0, 5], k=count))
    speeds = [rng.uniform(0.5, 2) for _ in costs]
    for latency in (0.0, rng.uniform(0, 4)):
        for bandwidth in (math.inf, rng.uniform(20, 2000)):
            told = simulate(
                plan, micro_batches=m, latency=latency, bandwidth=bandwidth, speeds=speeds
            )[name].seconds
            assert told == pytest.approx(
                run_pipeline(plan, name, m, latency, bandwidth, speeds), rel=1e-9
            )


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("seed", range(40))
def test_pipelines_of_other_graphs_are_never_too_fast(name: str, seed: int) -> None:
    rng = random.Random(seed)
    count, m = rng.randint(3, 9), rng.randint(1, 10)
    plan = make_plan(
        random_costs(rng, count, 3.0), random_graph(rng, count), rng.choices([0, 5], k=count)
    )
    for latency, bandwidth in ((0.0, math.inf), (0.3, 500.0), (0.0, 50.0)):
        told = simulate(plan, micro_batches=m, latency=latency, bandwidth=bandwidth)[name]
        found = run_pipeline(plan, name, m, latency, bandwidth)
        assert found <= told.seconds * (1 + 1e-9)
        assert max(told.utilisation) <= 1 + 1e-9
        assert told.seconds <= 2 * found  # and not idly so


@pytest.mark.parametrize("name", PIPELINES)
def test_a_heavy_skip_counts(name: str) -> None:
    plan = make_plan(balanced(4), {(0, 1): 1, (1, 2): 1, (2, 3): 1, (0, 3): 900})
    told = simulate(plan, micro_batches=6, bandwidth=100.0)[name].seconds
    assert run_pipeline(plan, name, 6, bandwidth=100.0) <= told * (1 + 1e-9)


@pytest.mark.parametrize("name", PIPELINES)
def test_towers_run_side_by_side(name: str) -> None:
    towers = {(0, 1): 7, (1, 4): 7, (2, 3): 7, (3, 4): 7}
    plan = make_plan(balanced(5), towers)
    told = simulate(plan, micro_batches=6, latency=0.1, bandwidth=100.0)[name].seconds
    assert told == pytest.approx(run_pipeline(plan, name, 6, 0.1, 100.0))
    chain = make_plan(balanced(5), {(k, k + 1): 7 for k in range(4)})
    assert told < simulate(chain, micro_batches=6, latency=0.1, bandwidth=100.0)[name].seconds


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (4, 8), (8, 8), (4, 32), (16, 16)])
def test_textbook_forms_of_balanced_stages(p: int, m: int) -> None:
    f, b, u = 1.5, 3.0, 0.25
    told = simulate(make_plan(balanced(p, f * m, b * m, update=u)), micro_batches=m)
    assert told["GPipe"].seconds == pytest.approx((m + p - 1) * (f + b) + u)
    assert told["1F1B"].seconds == pytest.approx((m + p - 1) * (f + b) + u)
    # Qi et al. 2023, table 1: a bubble of (p - 1)(F + B - W), their B without the weight part.
    assert told["zero-bubble"].seconds == pytest.approx(
        m * (f + b) + (p - 1) * (f + b / 2 - b / 2) + u
    )
    assert told["decoupled"].seconds == pytest.approx(m * (f + b) + u)
    assert told["one process"].seconds == pytest.approx(p * (m * (f + b) + u))


def test_four_equal_stages_and_eight_micro_batches() -> None:
    # F = I = W = 1: bubbles of 9, 9, 3 and 0 in a step of 24, worked out by hand.
    told = simulate(make_plan(balanced(4, 8.0, 16.0)))
    assert [round(told[n].seconds, 9) for n in (*PIPELINES, "decoupled")] == [33, 33, 27, 24]


def test_strict_1f1b_suffers_where_forward_and_backward_are_unequal_at_different_stages() -> None:
    # The usual estimate, sum + (m - 1) max, is far too fast here, so it is not what simulate may
    # return.
    costs = [StageCost(160.0, 16.0), StageCost(16.0, 160.0), *balanced(8, 1.0, 1.0)]
    m, plan = 16, make_plan(costs)
    estimate = sum(c.forward + c.backward for c in costs) / m + (m - 1) * 11.0
    found = run_pipeline(plan, "1F1B", m)
    assert simulate(plan, micro_batches=m)["1F1B"].seconds == pytest.approx(found)
    assert found > 1.3 * estimate


@pytest.mark.parametrize("name", PIPELINES)
def test_the_oracle_tells_schedules_apart(name: str) -> None:
    # Negative control: another order of the same work, or one stage 1 % slower, is not taken for
    # the right one.
    costs = random_costs(random.Random(3), 5)
    links = {(k, k + 1): 100 for k in range(4)}
    told = simulate(make_plan(costs, links), micro_batches=7, latency=0.5, bandwidth=200.0)[
        name
    ].seconds

    def other(schedule: str, depth: int, deep: int, m: int) -> list[tuple[str, int]]:
        return turns("GPipe" if schedule != "GPipe" else "1F1B", depth, deep, m)

    slower = [
        dataclasses.replace(c, forward=c.forward * 1.01, backward=c.backward * 1.01) for c in costs
    ]
    for plan, order in ((make_plan(costs, links), other), (make_plan(slower, links), turns)):
        found = run_pipeline(plan, name, 7, 0.5, 200.0, order=order)
        assert found != pytest.approx(told, rel=1e-4)


# Decoupled training.
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_decoupled_step_is_the_slope_and_fill_the_offset(seed: int) -> None:
    rng = random.Random(seed)
    count, batches = rng.randint(1, 8), 30
    links = (
        random_graph(rng, count)
        if rng.random() < 0.5
        else {(k, k + 1): rng.randrange(999) for k in range(count - 1)}
    )
    plan = make_plan(random_costs(rng, count), links)
    latency, bandwidth = rng.choice([(0.0, math.inf), (rng.uniform(0, 90), rng.uniform(20, 2000))])
    told = simulate(plan, latency=latency, bandwidth=bandwidth)
    step = told["decoupled"].seconds
    short, long = (run_decoupled(plan, n, latency, bandwidth) for n in (batches, 2 * batches))
    assert long - short <= batches * step * (1 + 1e-9)
    assert batches * step <= long * (1 + 1e-9)
    assert long <= (told.fill + 2 * batches * step + max(links.values(), default=0) / bandwidth) * (
        1 + 1e-9
    )
    # Once the slowest has caught up with all before it, the slope is the step itself.
    far = [run_decoupled(plan, n, latency, bandwidth) for n in (200, 201)]
    assert far[1] - far[0] == pytest.approx(step)


def test_fill_of_equal_stages_is_paid_once() -> None:
    plan = make_plan(
        balanced(4, 1.0, 2.0, update=0.5, sources=0.5), {(k, k + 1): 10 for k in range(3)}
    )
    told = simulate(plan, latency=0.25, bandwidth=40.0)
    assert told["decoupled"].seconds == 4.0
    assert told.fill == 3 * (1.0 + 0.25 + 0.25)
    for batches in (1, 5):
        assert run_decoupled(plan, batches, 0.25, 40.0) == pytest.approx(told.fill + 4.0 * batches)
    assert "4,500.00 ms more, once" in told["decoupled"].note


def test_latency_is_hidden_from_decoupled_stages_only_and_makes_targets_late() -> None:
    plan = make_plan(balanced(4))
    near, far = simulate(plan), simulate(plan, latency=3.0)
    assert far["decoupled"].seconds == near["decoupled"].seconds
    assert all(far[n].seconds > near[n].seconds + 6 * 3.0 - 1e-9 for n in PIPELINES)
    assert "about 1 step late" in near["decoupled"].note
    assert "about 3 steps late" in far["decoupled"].note


def test_a_narrow_link_bounds_the_decoupled_step() -> None:
    plan = make_plan(balanced(3), {(0, 1): 100, (1, 2): 600})
    told = simulate(plan, bandwidth=100.0)
    assert told["decoupled"].seconds == 6.0
    assert told["decoupled"].utilisation == (0.5, 0.5, 0.5)
    assert told.limit == "the link from stage_1 to stage_2"
    assert "the link from stage_1 to stage_2 takes longer still" in told.sentence
    # Two values between the same stages share their link.
    both = dataclasses.replace(plan.report, interfaces=(*plan.interfaces, plan.interfaces[1]))
    assert (
        simulate(dataclasses.replace(plan, report=both), bandwidth=100.0)["decoupled"].seconds
        == 12.0
    )


# Devices.
# -----------------------------------------------------------------------------------------------------------


def test_speeds_divide_each_stage_and_one_process_has_the_fastest_device() -> None:
    costs = [StageCost(2.0, 4.0), StageCost(1.0, 2.0)]
    told = simulate(make_plan(costs[::-1]), speeds=[1, 2], micro_batches=1)
    assert told["decoupled"].seconds == 3.0
    assert told["1F1B"].seconds == 6.0
    assert told["one process"].seconds == 4.5
    assert told["decoupled"].speedup == 1.5
    assert told.sentence.startswith("2 devices: ")


def test_utilisation_is_the_busy_share() -> None:
    costs = [StageCost(1.0, 2.0, update=1.0, sources=4.0), StageCost(1.0, 1.0)]
    told = simulate(make_plan(costs), micro_batches=2)
    assert told["decoupled"].utilisation == (1.0, 0.25)
    assert told["one process"].utilisation == (1.0,)
    for name in PIPELINES:
        row = told[name]
        assert row.utilisation == pytest.approx((4.0 / row.seconds, 2.0 / row.seconds))
        assert row.speedup == pytest.approx(6.0 / row.seconds)


def test_peak_memory_of_each_schedule() -> None:
    costs = balanced(4, parameter_bytes=1000, activation_bytes=800, source_bytes=50)
    told = simulate(make_plan(costs), micro_batches=8)
    assert told["one process"].memory == (4 * 1800,)
    assert told["GPipe"].memory == (1800,) * 4
    assert told["1F1B"].memory == (1400, 1300, 1200, 1100)
    assert told["zero-bubble"].memory == (1400,) * 4
    assert told["decoupled"].memory == (1850,) * 4
    assert simulate(make_plan(costs), micro_batches=3)["1F1B"].memory == (1800, 1800, 1534, 1267)


@pytest.mark.parametrize(
    ("name", "p", "m"), [(n, p, m) for n in PIPELINES for p, m in ((4, 8), (5, 3), (3, 3))]
)
def test_micro_batches_held_are_those_of_the_order(name: str, p: int, m: int) -> None:
    costs = balanced(p, activation_bytes=m)
    for depth, said in enumerate(simulate(make_plan(costs), micro_batches=m)[name].memory):
        held = most = 0
        for kind, _ in turns(name, depth, p, m):
            held += {"F": 1, "I": 0, "W": -1}[kind]
            most = max(most, held)
        assert said == most


# What it says.
# ------------------------------------------------------------------------------------------------------


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


# What it refuses.
# ---------------------------------------------------------------------------------------------------


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DecouplingError) as caught:
        call()
    text = str(caught.value)
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in: {text}"


def test_plans_without_costs_name_the_next_step() -> None:
    plan = make_plan(balanced(6))
    again = "dni_fx.plan_cuts(model, example_inputs, cuts=['layer0', 'layer1', 'layer2', ...], costs=\"measured\")"
    refused(lambda: simulate(CutPlan.from_json(plan.to_json())), "read from JSON", again)
    bare = [dataclasses.replace(s, cost=None) for s in plan.stages]
    report = dataclasses.replace(plan.report, stages=tuple(bare))
    refused(
        lambda: simulate(dataclasses.replace(plan, report=report)),
        "have no costs (all of them)",
        again,
    )
    report = dataclasses.replace(plan.report, stages=(*plan.stages[:5], bare[5]))
    refused(
        lambda: simulate(dataclasses.replace(plan, report=report)), "have no costs (stage_5)", again
    )
    free = CutPlan(
        "Net", "0" * 16, ("a", "b"), assignment=(("x", 0), ("y", 1), ("z", 2))
    )  # names of cuts do not make it
    refused(lambda: simulate(free), "plan_cuts(model, example_inputs, stages=3, ")
    refused(lambda: simulate(json), "decoupled.plan, not a module")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("where", ["forward", "sources", "activation_bytes"])
def test_bad_costs_name_their_stage(where: str, wrong: Any) -> None:
    costs = [*balanced(2), dataclasses.replace(balanced(1)[0], **{where: wrong})]
    refused(lambda: simulate(make_plan(costs)), f"stage_2.cost.{where} is {wrong!r}", "plan_cuts")


def test_nothing_to_compare() -> None:
    refused(
        lambda: simulate(make_plan([StageCost(0.0, 0.0)] * 2)), "all are 0 seconds", "plan_cuts"
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
        lambda: simulate(make_plan(balanced(2)), **{option: wrong}),
        f"{option}={wrong!r}",
        "expected",
    )


@pytest.mark.parametrize("speeds", [[], [1.0], [1, 1, 1]])
def test_speeds_of_the_wrong_length(speeds: list[float]) -> None:
    refused(
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
