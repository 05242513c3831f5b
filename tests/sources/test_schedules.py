"""Schedules: what every step does, the statistics of random updates, and that a mode hangs on the
step alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
from fractions import Fraction

import pytest
import torch

from dni_fx.errors import DecouplingError
from dni_fx.schedules import (
    Calibration,
    Mode,
    RandomUpdates,
    Schedule,
    Sequential,
    WarmUp,
    make_schedule,
)

EVERY_KIND = [
    Sequential(),
    RandomUpdates(0.5, seed=3),
    RandomUpdates({0: 0.5, "stage_2": 0.1}),
    Calibration(every=3, exact_from=40, then="random"),
    WarmUp(5, fade=4, then=Calibration(every=7, then=RandomUpdates(0.5))),
]


def shares(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.mode(step, 3).true_share for step in range(steps)]


def draws(schedule: Schedule, steps: int, stages: int) -> torch.Tensor:
    """(steps, stages) of zeros and ones."""
    result = torch.zeros(steps, stages, dtype=torch.float64)
    for step in range(steps):
        result[step, list(schedule.mode(step, stages).active)] = 1.0
    return result


def largest_deviation(drawn: torch.Tensor, p: float, lags: int = 5) -> float:
    """In standard deviations: of frequencies, and of correlations between any two stages up to some
    steps apart.
    """
    x = (drawn - p) / math.sqrt(p * (1 - p))
    frequencies = x.sum(0) / math.sqrt(len(x))
    found = [frequencies.abs().max()]
    for lag in range(lags + 1):
        products = x[lag:].T @ x[: len(x) - lag] / math.sqrt(len(x) - lag)
        if lag == 0:
            products.fill_diagonal_(0)
        found.append(products.abs().max())
    return float(max(found))


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "seed"), [(0.2, 0), (0.2, 1), (0.5, 0), (0.05, 7), (0.9, -1)])
def test_random_updates_have_their_frequency_and_are_independent(p: float, seed: int) -> None:
    # About 200 standard normal numbers: one beyond 4.5 has a chance of 1 in 700.
    assert largest_deviation(draws(RandomUpdates(p, seed), 20_000, 6), p) < 4.5


class OneDrawForAll(RandomUpdates):
    def _draw(self, step: int, stage: int) -> float:
        return super()._draw(step, 0)


class OneDrawForTwoSteps(RandomUpdates):
    def _draw(self, step: int, stage: int) -> float:
        return super()._draw(step // 2, stage)


class RunningAcross(RandomUpdates):
    def _draw(self, step: int, stage: int) -> float:
        return super()._draw(step + stage, 0)


class Biased(RandomUpdates):
    def _draw(self, step: int, stage: int) -> float:
        return 0.95 * super()._draw(step, stage)


@pytest.mark.parametrize("broken", [OneDrawForAll, OneDrawForTwoSteps, RunningAcross, Biased])
def test_dependent_draws_would_be_noticed(broken: type[RandomUpdates]) -> None:
    assert largest_deviation(draws(broken(0.2), 20_000, 6), 0.2) > 4.5


def test_seeds_and_stages_draw_apart() -> None:
    first, second = draws(RandomUpdates(0.5, 0), 4000, 2), draws(RandomUpdates(0.5, 1), 4000, 2)
    agreement = (first == second).double().mean(0)
    assert ((agreement - 0.5).abs() < 4.5 * 0.5 / math.sqrt(4000)).all()
    more_stages = draws(RandomUpdates(0.5, 0), 100, 5)
    assert torch.equal(
        more_stages[:, :2], first[:100]
    )  # a stage's draws do not hang on how many follow it


def test_probabilities_by_stage() -> None:
    drawn = draws(RandomUpdates({0: 0.5, "stage_2": 0.1, "stage_3": 0}), 5000, 5)
    expected = torch.tensor([0.5, 1.0, 0.1, 0.0, 1.0], dtype=torch.float64)
    spread = 4.5 * (expected * (1 - expected) / 5000).sqrt()
    assert ((drawn.mean(0) - expected).abs() <= spread).all()

    mapping = {0: 0.5}
    schedule = RandomUpdates(mapping)
    mapping[0] = 1.0
    assert schedule == RandomUpdates({"stage_0": 0.5})
    with pytest.raises(DecouplingError, match="names stage 5, but there are 2 stages, 0 to 1"):
        RandomUpdates({"stage_5": 0.5}).mode(0, 2)


def test_certain_updates() -> None:
    assert RandomUpdates(1).mode(0, 3) == Mode(active=(0, 1, 2))
    assert RandomUpdates(0.0).mode(0, 3) == Mode(active=())


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_a_mode_depends_on_the_step_alone(schedule: Schedule) -> None:
    modes = [schedule.mode(step, 4) for step in range(60)]
    for other in (schedule, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        random.seed(5)
        torch.manual_seed(5)
        assert [other.mode(step, 4) for step in reversed(range(60))] == modes[::-1]
    assert modes[17:] == [
        copy.copy(schedule).mode(step, 4) for step in range(17, 60)
    ]  # a resumed run


def test_global_random_numbers_are_left_alone() -> None:
    before, torch_before = random.getstate(), torch.get_rng_state()
    draws(RandomUpdates(0.3), 10, 3)
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


# --------------------------------------------------------------------------------------------- exac


def test_sequential_is_all_stages_decoupled() -> None:
    assert {Sequential().mode(step, 3) for step in range(5)} == {Mode(0.0, None)}


def test_calibration_is_exact_at_every_nth_step_and_in_the_tail() -> None:
    assert shares(Calibration(every=3), 9) == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert shares(Calibration(every=3, exact_from=4), 6) == [0, 0, 1, 0, 1, 1]
    assert shares(Calibration(every=None, exact_from=2), 4) == [0, 0, 1, 1]
    assert shares(Calibration(every=1), 3) == [1, 1, 1]
    assert shares(Calibration(), 20) == ([0] * 9 + [1]) * 2
    assert Calibration(every=2, then="random").mode(1, 3) == Mode(1.0, None)


def test_warm_up_then_falls_in_a_straight_line() -> None:
    assert shares(WarmUp(3), 5) == [1, 1, 1, 0, 0]
    assert shares(WarmUp(2, fade=3), 7) == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert shares(WarmUp(0, fade=1), 2) == [0.5, 0]
    line = shares(WarmUp(4, fade=9), 15)[3:14]
    assert line == pytest.approx([float(Fraction(10 - k, 10)) for k in range(11)])


def test_schedules_compose_by_the_number_of_the_step() -> None:
    schedule = WarmUp(2, fade=1, then=Calibration(every=4, then=RandomUpdates(0.5, seed=2)))
    modes = [schedule.mode(step, 3) for step in range(9)]
    assert [mode.true_share for mode in modes] == [1, 1, 0.5, 1, 0, 0, 0, 1, 0]
    for step in (4, 5, 6, 8):
        assert modes[step] == RandomUpdates(0.5, seed=2).mode(step, 3)
    assert all(modes[step].active is None for step in (0, 1, 2, 3, 7))


# --------------------------------------------------------------------------------------------------


def test_schedules_by_name() -> None:
    assert make_schedule("sequential") == Sequential()
    assert make_schedule("random") == RandomUpdates(0.2, seed=0)
    assert make_schedule(own := WarmUp(3)) is own
    assert WarmUp(3, then="random").then == RandomUpdates()

    class Own(Schedule):
        def mode(self, step: int, stages: int) -> Mode:
            return Mode(active=(step % stages,))

    assert Calibration(every=2, then=Own()).mode(4, 3) == Mode(active=(1,))


def test_schedules_are_frozen_hashable_and_print_how_they_are_made() -> None:
    for schedule in EVERY_KIND:
        assert eval(repr(schedule)) == schedule
        assert hash(schedule) == hash(copy.deepcopy(schedule))
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.seed = 1
    text = "WarmUp(steps=5, fade=0, then=Calibration(every=7, exact_from=None, then=Sequential()))"
    assert str(WarmUp(5, then=Calibration(7))) == text


BAD = [
    (
        lambda: make_schedule("sequental"),
        "unknown schedule 'sequental'; did you mean 'sequential'?",
    ),
    (
        lambda: make_schedule("calibration"),
        r"Known: 'sequential', 'random', 'threads', or a Schedule object, such as Calibration",
    ),
    (
        lambda: make_schedule(WarmUp),
        r"got the class WarmUp as schedule; pass an object, WarmUp\(\.\.\.\)",
    ),
    (lambda: make_schedule(3), "a schedule is a name or a Schedule, but got 3"),
    (lambda: make_schedule([]), r"a schedule is a name or a Schedule, but got \[\]"),
    (lambda: WarmUp(3, then="nothing"), "unknown schedule 'nothing'"),
    (lambda: Calibration(then=None), "a schedule is a name or a Schedule, but got None"),
    (lambda: RandomUpdates(1.5), "probability must be a number from 0 to 1, but got 1.5"),
    (lambda: RandomUpdates(-0.1), "from 0 to 1"),
    (lambda: RandomUpdates(math.nan), "from 0 to 1, but got nan"),
    (lambda: RandomUpdates("often"), "from 0 to 1, but got 'often'"),
    (lambda: RandomUpdates(True), "from 0 to 1, but got True"),
    (
        lambda: RandomUpdates({1: 2.0}),
        "the probability of stage 1 must be a number from 0 to 1, but got 2.0",
    ),
    (
        lambda: RandomUpdates({"stage_x": 0.5}),
        "needs stages as keys, such as 0 or 'stage_0', but got 'stage_x'",
    ),
    (lambda: RandomUpdates({-1: 0.5}), "but got -1"),
    (lambda: RandomUpdates({1: 0.5, "stage_1": 0.5}), "stage 1 twice"),
    (lambda: RandomUpdates(0.5, seed=0.5), "a seed must be a whole number, but got 0.5"),
    (lambda: Calibration(every=0), "every must be a whole number, 1 or more, but got 0"),
    (lambda: Calibration(every=2.5), "every must be a whole number, 1 or more, but got 2.5"),
    (
        lambda: Calibration(exact_from=-1),
        "exact_from must be a whole number, 0 or more, but got -1",
    ),
    (lambda: Calibration(every=None), "no exact steps"),
    (lambda: WarmUp(-1), "steps must be a whole number, 0 or more, but got -1"),
    (lambda: WarmUp(True), "steps must be a whole number"),
    (lambda: WarmUp(1, fade=-2), "fade must be a whole number, 0 or more, but got -2"),
    (lambda: Mode(1.1), "true_share must be a number from 0 to 1, but got 1.1"),
    (lambda: Mode(active=(0, -1)), "active holds indices of stages"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_errors(make, message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        make()


def test_a_schedule_must_say_its_mode() -> None:
    with pytest.raises(NotImplementedError, match="Schedule must implement mode"):
        Schedule().mode(0, 1)
