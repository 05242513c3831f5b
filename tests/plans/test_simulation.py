"""Predicted schedules against an event simulator that knows only who waits for whom."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from dni_fx.plan import CutPlan, StageCost
from dni_fx.simulation import simulate

from .events import PIPELINES, balanced, make_plan, random_costs, random_graph


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
    plan: CutPlan,
    schedule: str,
    m: int,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    speeds: Any = None,
    order: Callable[[str, int, int, int], list[tuple[str, int]]] = turns,
) -> float:
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


@pytest.mark.matrix
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


@pytest.mark.matrix
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


@pytest.mark.matrix
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
