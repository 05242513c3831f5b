"""Threads that wait for each other equal the sequential trainer bit for bit, and repeat themselves;
for every source and model: ``tests/matrix/``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Calibration, RandomUpdates, Schedule, Threads, WarmUp

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, largest_difference, record
from ..models.cases import seed_generator
from ..models.small import Skips
from .kit import run_script, slow, train, trainer_of


def test_staleness_can_be_seen() -> None:
    """The negative control of the oracle above."""
    sequential, late = (train(trainer_of(s), 8) for s in ("sequential", Threads(staleness=1)))
    assert largest_difference(record(late), record(sequential)) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip_norm": 0.1},
        {"inputs": "mlp"},
        {"inputs": "mlp", "accumulate": 2, "clip_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("gradients", ["linear", "critic", "feedback", "each:linear"])
def test_options_are_those_of_the_sequential_trainer(
    gradients: str, options: dict[str, Any]
) -> None:
    sequential, threads = (
        train(trainer_of(schedule, gradients, **options), 8)
        for schedule in ("sequential", Threads(staleness=0))
    )
    assert_bits_equal(record(threads), record(sequential), f"{gradients}, {options}")


SCHEDULES = [
    WarmUp(3), WarmUp(2, fade=3), Calibration(every=3), RandomUpdates(0.5, seed=1),
    Calibration(every=3, then=RandomUpdates(0.5, seed=1)),
]  # fmt: skip


@pytest.mark.parametrize("then", SCHEDULES, ids=str)
@pytest.mark.parametrize("gradients", ["linear", "local", "feedback", "each:linear"])
def test_schedules_within_threads(gradients: str, then: Schedule) -> None:
    sequential, threads = (
        train(trainer_of(schedule, gradients), 9)
        for schedule in (then, Threads(staleness=0, then=then))
    )
    assert_bits_equal(record(threads), record(sequential), f"{gradients}, {then}")


@pytest.mark.parametrize("then", SCHEDULES[:3], ids=str)
@pytest.mark.parametrize("gradients", ["linear", "feedback"])
def test_exact_steps_between_steps_on_synthetic_inputs(gradients: str, then: Schedule) -> None:
    """Values that are predicted in one step and waited for in the next come through the same
    box.
    """
    sequential, threads = (
        train(trainer_of(schedule, gradients, inputs="mlp"), 9)
        for schedule in (then, Threads(staleness=0, then=then))
    )
    assert_bits_equal(record(threads), record(sequential), f"{gradients}, {then}")


def test_stages_left_out_keep_what_was_accumulated() -> None:
    then = RandomUpdates(0.5, seed=1)
    sequential, threads = (
        train(trainer_of(schedule, "exact", accumulate=2), 8)
        for schedule in (then, Threads(staleness=0, then=then))
    )
    assert_bits_equal(
        record(threads), record(sequential), "exact gradients of some stages, accumulated"
    )


@pytest.mark.parametrize("gradients", ["delayed", "corrected"])
def test_late_sources_learn_as_soon_as_the_answer_is_there(gradients: str) -> None:
    """A lag counts steps of the sequential trainer; on threads the answer's own delay takes its
    place.

    With no staleness no answer is late at all: the gradients are backprop's.
    """
    late = train(trainer_of(Threads(staleness=0), gradients), 8)
    exact = train(trainer_of("sequential", "exact"), 8)
    model, want = (t.decoupled.model.state_dict() for t in (late, exact))
    if gradients == "delayed":
        assert largest_difference(model, want) < 1e-6
    assert all(w.learner.updates == 8 for w in late.threads.workers.values())  # type: ignore[union-attr]


class Shortcut(Skips):
    """In evaluation mode what the first stage sends has another name."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) if self.training else self.a[1](self.a[0](x))
        k = self.c(self.b(h).relu())
        return self.d(torch.cat([k.relu(), h], 1))


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("gradients", ["linear", "joint:linear", "each:linear"])
@pytest.mark.parametrize("kind", [dni_fx.Trainer, distributed.Trainer])
def test_sources_learn_where_a_graph_has_other_names(
    kind: Any, gradients: str, inputs: str | None
) -> None:
    threads: dict[str, Any] = {"schedule": Threads(staleness=0)}
    options = threads if kind is dni_fx.Trainer else {"kind": kind, "staleness": 0}
    trainers = []
    for how in ({}, options):
        seed_generator(0)
        trainer = trainer_of(
            gradients=gradients, model=Shortcut(), cuts=["b", "c"], inputs=inputs, **how
        )
        train(trainer, 2)
        names = {i.name for i in trainer.decoupled.graphs.variant.split.interfaces}
        trainer.decoupled.model.eval()
        train(trainer, 3)
        assert {i.name for i in trainer.decoupled.graphs.variant.split.interfaces} != names
        trainers.append(trainer)
    got, want = (t.decoupled.state_dict() for t in trainers)
    assert_bits_equal(got, want, f"{gradients}, {inputs}")


def test_a_source_without_an_optimiser_is_told() -> None:
    trainer = train(trainer_of(Threads(staleness=0)), 1)
    del trainer.synthesizer_optimizers["a"]
    with pytest.raises(DecouplingError, match="stage_0, step 2: the source at 'a' has learnt, but"):
        train(trainer, 1)


def test_reports_come_from_the_last_stage() -> None:
    trainer, sequential = (
        trainer_of(Threads(staleness=0), metrics_every=2),
        trainer_of("sequential", metrics_every=2),
    )
    x, y = batch(0)
    assert math.isnan(trainer_of(Threads(), model=slow("a", 0.05)).step(x, target=y).loss)
    for step in range(4):
        x, y = batch(step)
        trainer.step(x, target=y)
        want = sequential.step(x, target=y)
        trainer.drain()
        assert trainer.threads is not None
        got = trainer.threads.report(trainer.steps)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.outputs, want.outputs)
        assert got.interfaces.keys() == want.interfaces.keys()


def test_metrics_are_requested_once() -> None:
    trainer = train(trainer_of(Threads(staleness=0), metrics_every=1000), 2)
    trainer.request_metrics()
    train(trainer, 1, 2)
    before = dict(trainer.metrics.found)
    train(trainer, 1, 3)
    assert trainer.metrics.found == before


def test_going_on_after_close_and_resuming_are_the_same_run() -> None:
    """In the middle of an accumulated update, too."""
    for schedule in ("sequential", Threads(staleness=0)):
        whole = record(train(trainer_of(schedule, accumulate=2), 6))
        closed = train(trainer_of(schedule, accumulate=2), 3)
        state = copy.deepcopy(closed.state_dict())
        closed.close()
        assert_bits_equal(record(train(closed, 3, 3)), whole, f"{schedule}: closed and gone on")
        resumed = trainer_of(schedule, accumulate=2)
        resumed.load_state_dict(state)
        assert_bits_equal(record(train(resumed, 3, 3)), whole, f"{schedule}: resumed")


def test_operators_keep_the_number_of_threads() -> None:
    """New threads know nothing of ``torch.set_num_threads`` until somebody says so there; nothing
    is closed here.
    """
    code = """
        import re, torch, dni_fx, torch.nn as nn, torch.nn.functional as F
        torch.set_num_threads(1)
        def loss(output, target):
            pattern = r"omp_get_max_threads\\(\\) : (\\d+)"
            found = re.search(pattern, torch.__config__.parallel_info())[1]
            assert found == "1", found
            return F.cross_entropy(output, target)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)
        decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="zero")
        trainer = dni_fx.Trainer(decoupled, loss, optimizer=torch.optim.SGD, schedule="threads")
        trainer.step(x, target=torch.zeros(5, dtype=torch.long))
        trainer.drain()
    """
    done = run_script(code, OMP_NUM_THREADS="3")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize(
    "gradients", ["linear", "delayed", "corrected", "critic", "feedback", "each:linear"]
)
def test_a_fixed_staleness_repeats_bit_for_bit(gradients: str, inputs: str | None) -> None:
    first, second = (
        train(trainer_of(Threads(staleness=2), gradients, inputs=inputs), 12) for _ in range(2)
    )
    assert_bits_equal(record(second), record(first), f"{gradients}, inputs={inputs}")


@pytest.mark.parametrize("where", ["a", "d"])
def test_a_fixed_staleness_repeats_whoever_is_slow(where: str) -> None:
    first = train(trainer_of(Threads(staleness=2), "each:linear"), 10)
    second = train(trainer_of(Threads(staleness=2), "each:linear", slow(where, 0.01)), 10)
    assert_bits_equal(record(second), record(first), f"{where} is slow")
