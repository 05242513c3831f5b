"""Stages on threads: against the sequential trainer and backprop, bounds, failures; one source for
each consumer.
"""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import CutPlan
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.parallel.mailbox import ParallelError
from dni_fx.recurrent import decouple_through_time
from dni_fx.schedules import Calibration, RandomUpdates, Schedule, Threads, WarmUp
from dni_fx.sources import SOURCES, Delayed, Each, Linear

from ..helpers import oracles
from ..models.zoo import BY_NAME, seed_generator

CUTS = ["a", "b", "c"]
SECONDS = 20  # a test that takes longer is taken for a deadlock
AT_ONCE = [
    n
    for n in SOURCES
    if n not in ("conv", "exact", "mix") and (n == "feedback" or SOURCES[n].lag is None)
]
AT_ONCE = [n for n in AT_ONCE if n not in ("delayed", "corrected")]


class Skips(nn.Module):
    """Four stages; what the first sends is used in the second and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.c(self.b(h).relu())
        return self.d(torch.cat([k.relu(), h], 1))


class Towers(nn.Module):
    """Two towers and a head; the middle stage sends two values, one of them to both later stages."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(12, 16)
        self.c, self.d = nn.Linear(32, 16), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x).relu()
        joined = self.c(torch.cat([left, right], 1)).relu()
        return self.d(torch.cat([joined, left, right], 1))


MODELS: dict[str, type[nn.Module]] = {"skips": Skips, "towers": Towers}


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    """One thread for each operator; a deadlock fails; whatever a test leaves behind is ended."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s: a deadlock?")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with oracles.one_thread():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        while MADE:
            MADE.pop().close()
    assert stage_threads() == []


MADE: list[dni_fx.Trainer] = []


def stage_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dni_fx")]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 12, generator=generator), torch.randint(
        5, (size,), generator=generator
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def trainer_of(
    schedule: str | Schedule,
    gradients: Any = "linear",
    model: nn.Module | None = None,
    inputs: Any = None,
    **options: Any,
) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        built() if model is None else model, options.pop("cuts", CUTS), example_inputs=(batch(0)[0],),
        gradients=gradients, inputs=inputs, context=dni_fx.one_hot(5), check=False,
    )  # fmt: skip
    loss = options.pop("loss", F.cross_entropy)
    trainer = dni_fx.Trainer(decoupled, loss, optimizer=adam, schedule=schedule, **options)
    MADE.append(trainer)
    return trainer


def train(
    trainer: dni_fx.Trainer, steps: int, first: int = 0, pause: float = 0.0
) -> dni_fx.Trainer:
    for step in range(first, first + steps):
        x, y = batch(step, 5 if step % 3 == 2 else 8)
        trainer.step(x, target=y)
        if pause:
            time.sleep(pause)
    trainer.drain()
    return trainer


def record(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """Weights, buffers, sources and the states of all optimisers."""
    state = trainer.state_dict()
    return copy.deepcopy(
        {n: state[n] for n in ("decoupled", "optimizers", "synthesizer_optimizers", "steps")}
    )


def largest_difference(a: Any, b: Any) -> float:
    left, right = (dict(oracles.named_leaves(x)) for x in (a, b))
    pairs = [
        (v, right[n])
        for n, v in left.items()
        if isinstance(v, Tensor) and v.is_floating_point() and v.numel()
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


def built(model: type[nn.Module] = Skips) -> nn.Module:
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    return model()


def slow(name: str, seconds: float) -> nn.Module:
    """A model one of whose modules takes long."""
    model = built()
    model.get_submodule(name).register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def counts(trainer: dni_fx.Trainer) -> list[int]:
    """Updates of each stage."""
    assert trainer._crew is not None
    return [w.updates for w in trainer._crew.workers.values()]


# ------------------------------------------------------------------------------------ against the s


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "gradients", [*AT_ONCE, "joint:linear", "joint:critic", "each:linear", "each:mlp"]
)
def test_no_staleness_equals_the_sequential_trainer(gradients: str, model: str) -> None:
    schedules = ("sequential", Threads(staleness=0))
    sequential, threads = (
        train(trainer_of(s, gradients, built(MODELS[model])), 8) for s in schedules
    )
    oracles.assert_bits_equal(record(threads), record(sequential), f"{gradients} on threads")


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
    oracles.assert_bits_equal(record(threads), record(sequential), f"{gradients}, {options}")


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
    oracles.assert_bits_equal(record(threads), record(sequential), f"{gradients}, {then}")


@pytest.mark.parametrize("then", SCHEDULES[:3], ids=str)
@pytest.mark.parametrize("gradients", ["linear", "feedback"])
def test_exact_steps_between_steps_on_synthetic_inputs(gradients: str, then: Schedule) -> None:
    """Values that are predicted in one step and waited for in the next come through the same box."""
    sequential, threads = (
        train(trainer_of(schedule, gradients, inputs="mlp"), 9)
        for schedule in (then, Threads(staleness=0, then=then))
    )
    oracles.assert_bits_equal(record(threads), record(sequential), f"{gradients}, {then}")


def test_stages_left_out_keep_what_was_accumulated() -> None:
    then = RandomUpdates(0.5, seed=1)
    sequential, threads = (
        train(trainer_of(schedule, "exact", accumulate=2), 8)
        for schedule in (then, Threads(staleness=0, then=then))
    )
    oracles.assert_bits_equal(
        record(threads), record(sequential), "exact gradients of some stages, accumulated"
    )


@pytest.mark.parametrize("model", MODELS)
def test_mixed_gradients_are_equal_but_for_rounding(model: str) -> None:
    """A value's later consumers answer apart from each other here; their gradients are added in
    another order.
    """
    sequential, threads = (
        train(trainer_of(schedule, "mix", built(MODELS[model])), 8)
        for schedule in ("sequential", Threads(staleness=0))
    )
    assert largest_difference(record(threads), record(sequential)) < 1e-5


@pytest.mark.parametrize("gradients", ["delayed", "corrected"])
def test_late_sources_learn_as_soon_as_the_answer_is_there(gradients: str) -> None:
    """A lag counts steps of the sequential trainer; on threads the answer's own delay takes its
    place.

    With no staleness no answer is late at all: the gradients are backprop's.
    """
    late = train(trainer_of(Threads(staleness=0), gradients, model=built()), 8)
    exact = train(trainer_of("sequential", "exact", model=built()), 8)
    model, want = (t.decoupled.model.state_dict() for t in (late, exact))
    if gradients == "delayed":
        assert largest_difference(model, want) < 1e-6
    assert all(w.updates == 8 for w in late._crew.workers.values())  # type: ignore[union-attr]


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
        assert trainer._crew is not None
        got = trainer._crew.report(trainer.steps)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.outputs, want.outputs)
        assert got.interfaces.keys() == want.interfaces.keys()


def test_metrics_are_requested_once() -> None:
    trainer = train(trainer_of(Threads(staleness=0), metrics_every=1000), 2)
    trainer.request_metrics()
    train(trainer, 1, 2)
    before = dict(trainer._measured)
    train(trainer, 1, 3)
    assert trainer._measured == before


def test_going_on_after_close_and_resuming_are_the_same_run() -> None:
    """In the middle of an accumulated update, too."""
    for schedule in ("sequential", Threads(staleness=0)):
        whole = record(train(trainer_of(schedule, accumulate=2), 6))
        closed = train(trainer_of(schedule, accumulate=2), 3)
        state = copy.deepcopy(closed.state_dict())
        closed.close()
        oracles.assert_bits_equal(
            record(train(closed, 3, 3)), whole, f"{schedule}: closed and gone on"
        )
        resumed = trainer_of(schedule, accumulate=2)
        resumed.load_state_dict(state)
        oracles.assert_bits_equal(record(train(resumed, 3, 3)), whole, f"{schedule}: resumed")


def test_operators_keep_the_number_of_threads() -> None:
    """New threads know nothing of ``torch.set_num_threads`` until somebody says so there; nothing
    is closed here.
    """
    code = """
        import re, torch, dni_fx, torch.nn as nn, torch.nn.functional as F
        torch.set_num_threads(1)
        def loss(output, target):
            found = re.search(r"omp_get_max_threads\\(\\) : (\\d+)", torch.__config__.parallel_info())[1]
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


def run_script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=SECONDS,
        env=os.environ | environment,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------

TREES = [
    "norm_dropout_chain", "conv_norm_chain", "channels_last", "dense", "unet", "two_towers", "fan_out", "transformer",
    "lstm", "checkpoint_reentrant", "dict_output", "frozen_middle", "running_mean", "routing", "weight_norm",
]  # fmt: skip


def on_threads(
    name: str, dtype: torch.dtype, schedule: Schedule, steps: int = 3
) -> dict[str, Tensor]:
    case = BY_NAME[name]
    decoupled = oracles.transform(case, dtype, "exact")
    trainer = dni_fx.Trainer(decoupled, case.loss, optimizer=oracles.adam, schedule=schedule)
    MADE.append(trainer)
    for step in range(steps):
        args, kwargs, target = oracles.draw(case, 4, dtype, step)
        seed_generator(step)
        trainer.step(*args, target=target, **kwargs)
        trainer.drain()  # before the generator is seeded again
    return oracles.state_of(decoupled.model)


@pytest.mark.parametrize("name", TREES)
def test_exact_gradients_equal_backprop(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        want = oracles.backprop_run(BY_NAME[name], dtype, oracles.adam)["step 2"]["state"]
        oracles.assert_bits_equal(
            on_threads(name, dtype, Threads(queue=1)), want, f"{name}, {dtype}"
        )


def test_exact_gradients_can_be_told_from_others() -> None:
    """The negative control: another learning rate, and the same with a source."""
    want = oracles.backprop_run(BY_NAME["dense"], torch.float64, oracles.adam, steps=2)["step 1"][
        "state"
    ]
    with pytest.raises(AssertionError, match="differ"):
        oracles.assert_bits_equal(
            on_threads("dense", torch.float64, Threads(), steps=3), want, "another step"
        )


@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_exact_gradients_do_not_depend_on_the_flow(staleness: int | None) -> None:
    exact = train(trainer_of("sequential", "exact"), 8)
    threads = train(trainer_of(Threads(queue=1, staleness=staleness), "exact"), 8)
    oracles.assert_bits_equal(record(threads)["decoupled"], record(exact)["decoupled"], "exact")


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize(
    "gradients", ["linear", "delayed", "corrected", "critic", "feedback", "each:linear"]
)
def test_a_fixed_staleness_repeats_bit_for_bit(gradients: str, inputs: str | None) -> None:
    first, second = (
        train(trainer_of(Threads(staleness=2), gradients, inputs=inputs), 12) for _ in range(2)
    )
    oracles.assert_bits_equal(record(second), record(first), f"{gradients}, inputs={inputs}")


@pytest.mark.parametrize("where", ["a", "d"])
def test_a_fixed_staleness_repeats_whoever_is_slow(where: str) -> None:
    first = train(trainer_of(Threads(staleness=2), "each:linear"), 10)
    second = train(trainer_of(Threads(staleness=2), "each:linear", slow(where, 0.01)), 10)
    oracles.assert_bits_equal(record(second), record(first), f"{where} is slow")


# --------------------------------------------------------------------------------------------------

FREE = [n for n in SOURCES if n != "conv"] + ["joint:linear", "each:linear"]


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("gradients", FREE)
def test_free_running_ends(gradients: str, inputs: str | None) -> None:
    if gradients == "exact" and inputs:
        pytest.skip("exact gradients need real values")
    for where in ("a", "d"):
        trainer = trainer_of(Threads(queue=2), gradients, slow(where, 0.003), inputs)
        train(trainer, 12)
        updates = counts(trainer)
        assert min(updates) >= 12 if gradients == "corrected" else updates == [12] * 4
        assert all(not w.pending and not w.ahead for w in trainer._crew.workers.values())  # type: ignore[union-attr]
        assert all(bool(p.isfinite().all()) for p in trainer.decoupled.parameters())
        trainer.close()


@pytest.mark.parametrize("then", [Calibration(every=4), WarmUp(3), RandomUpdates(0.5)], ids=str)
@pytest.mark.parametrize("inputs", [None, "mlp"])
def test_free_running_ends_with_any_schedule(inputs: str | None, then: Schedule) -> None:
    for where in ("a", "c"):
        train(trainer_of(Threads(queue=1, then=then), "linear", slow(where, 0.004), inputs), 12)


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("gradients", [n for n in FREE if n not in ("exact", "mix", "feedback")])
def test_dropping_ends(gradients: str, inputs: str | None) -> None:
    """Whatever a slow stage leaves out, nobody waits for it for ever, and nothing stays under way."""
    for where in ("a", "d"):
        trainer = trainer_of(
            Threads(queue=2, policy="drop_oldest"), gradients, slow(where, 0.006), inputs
        )
        train(trainer, 15, pause=0.002)
        train(trainer, 3, 15)
        for worker in trainer._crew.workers.values():  # type: ignore[union-attr]
            assert not worker.pending
            assert not worker.ahead
            assert not any(worker.under_way.values())
            assert not any(worker.backlog.values())
        trainer.close()


@pytest.mark.parametrize("inputs", [None, "mlp"])
def test_dropping_ends_where_stages_are_left_out(inputs: str | None) -> None:
    for where in ("a", "c"):
        schedule = Threads(queue=2, policy="drop_oldest", then=RandomUpdates(0.5))
        train(trainer_of(schedule, "linear", slow(where, 0.006), inputs), 20, pause=0.002)


@pytest.mark.parametrize(
    ("gradients", "then"),
    [("mix", "sequential"), ("feedback", "sequential"), ("exact", "sequential"), ("linear", Calibration(every=2)),
     ("linear", WarmUp(3)), ("linear", WarmUp(0, fade=2))], ids=str,
)  # fmt: skip
def test_who_waits_within_a_step_cannot_be_left_out(gradients: str, then: str | Schedule) -> None:
    error = fails_once(trainer_of(Threads(policy="drop_oldest", then=then), gradients))
    assert "pass policy='wait'" in str(error)


@pytest.mark.parametrize("queue", [1, 3])
@pytest.mark.parametrize("where", ["b", "d"])
def test_the_queue_is_a_bound(queue: int, where: str) -> None:
    """What is under way is looked at from outside all the time."""
    trainer = trainer_of(Threads(queue=queue), model=slow(where, 0.004))
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            crew = trainer._crew
            for worker in crew.workers.values() if crew else ():
                seen.append(
                    max([len(worker.pending), *(len(s) for s in list(worker.under_way.values()))])
                )
                seen.append(len(crew.mail.boxes.get(("job", -1, worker.index), ())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(trainer, 20)
    over.set()
    watcher.join()
    assert len(seen) > 50
    assert 1 <= max(seen) <= queue + 1


def gated(name: str) -> tuple[nn.Module, threading.Event]:
    """A model one of whose modules, in training, waits for a word."""
    model, word = built(), threading.Event()

    def wait(*_: Any) -> None:
        if stage_threads():
            word.wait(SECONDS)

    model.get_submodule(name).register_forward_pre_hook(wait)
    return model, word


def until(ready: Callable[[], bool]) -> bool:
    """Whether something becomes so within a while."""
    end = time.monotonic() + 5
    while not ready() and time.monotonic() < end:
        time.sleep(0.002)
    return ready()


def test_a_stage_that_waits_holds_the_others_back() -> None:
    model, word = gated("d")
    trainer = trainer_of(Threads(queue=2), model=model)
    feeding = threading.Thread(target=train, args=(trainer, 20))
    feeding.start()
    assert until(lambda: trainer._crew is not None and counts(trainer)[0] >= 2)
    time.sleep(0.2)
    held = counts(trainer)
    assert feeding.is_alive()
    assert held[0] <= 2 + 1  # the queue, and what is in work
    assert held[3] == 0
    word.set()
    feeding.join()
    assert counts(trainer) == [20] * 4


def test_a_stage_that_drops_holds_nobody_back() -> None:
    model, word = gated("d")
    trainer = trainer_of(Threads(queue=2, policy="drop_oldest"), model=model)
    for step in range(20):
        x, y = batch(step)
        trainer.step(x, target=y)
        assert until(lambda step=step: counts(trainer)[:3] == [step + 1] * 3)  # type: ignore[misc]
    assert counts(trainer)[3] == 0
    word.set()
    trainer.drain()
    assert 1 <= counts(trainer)[3] <= 2 + 1
    assert trainer._crew is not None
    assert trainer._crew.workers[3].missed == 20 - counts(trainer)[3]


def test_synthetic_inputs_free_a_stage_from_one_before_it() -> None:
    model, word = gated("a")
    trainer = trainer_of(Threads(queue=2, policy="drop_oldest"), "linear", model, "mlp")
    for step in range(20):
        x, y = batch(step)
        trainer.step(x, target=y)
        assert until(lambda step=step: counts(trainer)[1:] == [step + 1] * 3)  # type: ignore[misc]
    assert counts(trainer)[0] == 0
    word.set()
    trainer.drain()
    assert 1 <= counts(trainer)[0] <= 2 + 1


def test_late_answers_can_be_discounted() -> None:
    full, less, none = (
        train(trainer_of(Threads(staleness=s, discount=d)), 10)
        for s, d in ((2, 1.0), (2, 0.5), (0, 0.5))
    )
    assert largest_difference(record(full), record(less)) > 0
    oracles.assert_bits_equal(
        record(none), record(train(trainer_of("sequential"), 10)), "nothing is late"
    )


# --------------------------------------------------------------------------------------------------


class Failing:
    """A hook that raises once, at a call after the first training step has begun: tracing calls
    hooks, too.
    """

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, *_: Any) -> None:
        self.calls += bool(stage_threads())
        if self.calls == self.at:
            self.calls += 1
            raise self.error


def fails(trainer: dni_fx.Trainer, steps: int = 12, **options: Any) -> BaseException:
    """The error that training ends with; the trainer is sound afterwards and goes on."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (looked at by whoever calls)
        train(trainer, steps, **options)
    assert not isinstance(caught.value, TimeoutError)
    assert stage_threads() == []
    wrong = [n for n, p in trainer.decoupled.named_parameters() if not bool(p.isfinite().all())]
    assert wrong == []
    train(trainer, 8, 100)
    wrong = [
        n
        for n, t in trainer.decoupled.state_dict().items()
        if isinstance(t, Tensor) and not t.isfinite().all()
    ]
    assert wrong == []
    return caught.value


@pytest.mark.parametrize(
    "schedule", [Threads(), Threads(staleness=0), Threads(policy="drop_oldest")], ids=str
)
@pytest.mark.parametrize(("name", "stage"), [("a", 0), ("b", 1), ("d", 3)])
def test_a_module_that_fails(name: str, stage: int, schedule: Threads) -> None:
    model = built()
    model.get_submodule(name).register_forward_pre_hook(Failing(RuntimeError("no more"), 4))
    error = fails(trainer_of(schedule, model=model), pause=0.003)
    assert isinstance(error, ParallelError)
    step = r"\d+" if schedule.flow.policy == "drop_oldest" else 4
    assert re.match(rf"stage_{stage}, step {step}: RuntimeError: no more", str(error))
    assert isinstance(error.__cause__, ParallelError | RuntimeError)


@pytest.mark.parametrize("method", ["predict", "fit"])
def test_a_source_that_fails(method: str) -> None:
    fail = Failing(RuntimeError("no more"), 7)

    class Broken(Linear):
        def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
            if method == "predict":
                fail()
            return super().predict(values, context)

        def fit(self, prediction: Any, message: tuple[Tensor, ...]) -> Any:
            if method == "fit":
                fail()
            return super().fit(prediction, message)

    error = fails(trainer_of(Threads(), Broken))
    assert isinstance(error, ParallelError)
    assert re.match(r"stage_\d, step \d+: RuntimeError: no more", str(error))


def test_a_loss_that_fails() -> None:
    fail = Failing(ValueError("no more"), 4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        fail()
        return F.cross_entropy(output, target)

    assert re.match(
        "stage_3, step 4: ValueError: no more", str(fails(trainer_of(Threads(), loss=loss)))
    )


def test_an_optimizer_that_fails() -> None:
    trainer = trainer_of(Threads())
    trainer.optimizers["stage_1"].register_step_pre_hook(Failing(ValueError("no more"), 3))
    assert re.match("stage_1, step 3: ValueError: no more", str(fails(trainer)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_names_its_stage(error: type[BaseException]) -> None:
    model = built()
    model.b.register_forward_pre_hook(Failing(error(), 4))  # type: ignore[union-attr]
    assert re.match(
        rf"stage_1, step 4: {error.__name__}", str(fails(trainer_of(Threads(), model=model)))
    )


def test_a_loss_that_is_no_scalar() -> None:
    error = fails_once(
        trainer_of(Threads(), loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
    )
    assert re.match("stage_3, step 1: the loss must return a tensor with one element", str(error))


def fails_once(trainer: dni_fx.Trainer) -> BaseException:
    with pytest.raises(DecouplingError) as caught:
        train(trainer, 6)
    assert stage_threads() == []
    return caught.value


@pytest.mark.parametrize("inputs", [None, "mlp"])
@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_what_is_not_finite_names_its_stage(staleness: int | None, inputs: str | None) -> None:
    for place in ("x", "loss"):
        bad = batch(3)[1]

        def loss(output: Tensor, target: Tensor, place: str = place, bad: Tensor = bad) -> Tensor:
            value = F.cross_entropy(output, target)
            return value * math.nan if place == "loss" and torch.equal(target, bad) else value

        trainer = trainer_of(Threads(staleness=staleness), "mlp", inputs=inputs, loss=loss)

        def run(trainer: dni_fx.Trainer = trainer, place: str = place) -> None:
            for step in range(10):
                x, y = batch(step)
                trainer.step(x * math.nan if place == "x" and step == 3 else x, target=y)
            trainer.drain()

        with pytest.raises(
            NonFiniteError, match=r"^stage_\d, step 4: .* is NaN; this stage was not updated"
        ):
            run()
        for _ in range(2):  # at once, and after what the failure may have left in the sources
            wrong = [
                n for n, p in trainer.decoupled.named_parameters() if not bool(p.isfinite().all())
            ]
            assert wrong == []
            train(trainer, 8, 100)
        trainer.close()


def test_close_ends_all_threads_wherever_they_are() -> None:
    before = threading.active_count()
    trainer = trainer_of(Threads(), model=slow("b", 0.05))
    for step in range(5):
        x, y = batch(step)
        trainer.step(x, target=y)
    assert len(stage_threads()) == 4
    trainer.close()
    trainer.close()
    assert stage_threads() == []
    assert threading.active_count() == before
    assert trainer.drain() == 0
    train(trainer, 3)
    trainer.close()
    assert threading.active_count() == before


def test_a_script_that_does_not_close_ends_well() -> None:
    """In the middle of its work."""
    code = """
        import torch, dni_fx, torch.nn as nn, torch.nn.functional as F
        model, x = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)), torch.randn(500, 200)
        decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="linear")
        trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=torch.optim.SGD, schedule="threads")
        for _ in range(20):
            trainer.step(x, target=torch.zeros(500, dtype=torch.long))
    """
    done = run_script(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_state_is_taken_when_nothing_is_under_way() -> None:
    trainer = trainer_of(Threads(), model=slow("b", 0.005))
    for step in range(6):
        x, y = batch(step)
        trainer.step(x, target=y)
    state = copy.deepcopy(trainer.state_dict())
    assert counts(trainer) == [6] * 4
    x, y = batch(0)
    trainer.step(x, target=y)
    assert set(trainer.true_gradients(x, target=y)) == {
        i.name for i in trainer.decoupled.interfaces
    }
    trainer.step(x, target=y)
    trainer.load_state_dict(state)
    oracles.assert_bits_equal(record(trainer)["decoupled"], state["decoupled"], "loaded")
    train(trainer, 3)


def test_the_caller_may_write_into_its_batch() -> None:
    sequential, threads = (
        trainer_of("sequential"),
        trainer_of(Threads(staleness=0), model=slow("a", 0.002)),
    )
    for trainer in (sequential, threads):
        for step in range(5):
            x, y = batch(step)
            trainer.step(x, target=y)
            x.fill_(7.0)
            y.fill_(0)
        trainer.drain()
    oracles.assert_bits_equal(record(threads), record(sequential), "overwritten batches")


def test_autocast_of_the_caller_holds_in_the_stages() -> None:
    def cast(schedule: str | Schedule) -> dict[str, Any]:
        trainer = trainer_of(schedule)
        for step in range(6):
            x, y = batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                trainer.step(x, target=y)
        trainer.drain()
        return record(trainer)

    want = cast("sequential")
    oracles.assert_bits_equal(cast(Threads(staleness=0)), want, "under autocast")
    assert largest_difference(want, record(train(trainer_of("sequential"), 6))) > 1e-4


def test_a_model_in_another_mode_is_traced_when_the_threads_rest() -> None:
    class Noisy(Skips):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.training else x)

    def modes(schedule: str | Schedule) -> dict[str, Any]:
        trainer = trainer_of(schedule, model=built(Noisy))
        for training in (True, False, True):
            trainer.decoupled.train(training)
            train(trainer, 3)
        return record(trainer)

    oracles.assert_bits_equal(modes(Threads(staleness=0)), modes("sequential"), "modes")


# --------------------------------------------------------------------------------------------------


class Tied(Skips):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.b.weight


class SharedStatistics(Skips):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        k = self.norm(self.c(self.b(h).relu())).relu()
        return self.d(torch.cat([k, h], 1))


@pytest.mark.parametrize("model", [Tied, SharedStatistics])
def test_what_several_stages_write_to_is_refused(model: type[nn.Module]) -> None:
    trainer = trainer_of(Threads(staleness=0), model=built(model))
    x, y = batch(0)
    with pytest.raises(DecouplingError, match=r"(weight|norm).* is used by several stages"):
        trainer.step(x, target=y)
    assert stage_threads() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue must be a whole number of batches, at least 1, not 0"),
        ({"queue": 1.5}, "queue must be a whole number"),
        ({"queue": True}, "queue must be a whole number"),
        ({"policy": "drop"}, "policy must be 'wait' or 'drop_oldest', not 'drop'"),
        ({"staleness": -1}, "staleness must be a whole number of steps, 0 or more, not -1"),
        ({"staleness": True}, "staleness must be a whole number"),
        ({"staleness": 1, "policy": "drop_oldest"}, "needs policy='wait'"),
        ({"discount": 0}, "discount must be above 0 and at most 1, not 0"),
        ({"discount": 1.5}, "discount must be above 0"),
        ({"discount": "1"}, "discount must be above 0"),
        ({"then": "sequental"}, "unknown schedule 'sequental'; did you mean 'sequential'"),
        ({"then": Threads()}, r"[Tt]hreads"),
        ({"then": "threads"}, r"[Tt]hreads"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        Threads(**options)


def test_threads_are_no_part_of_another_schedule() -> None:
    for make in (partial(WarmUp, 2), partial(Calibration, 3)):
        for then in (Threads(), "threads"):
            with pytest.raises(DecouplingError, match=r"[Tt]hreads"):
                train(trainer_of(make(then=then)), 2)


def test_threads_by_name() -> None:
    trainer = train(trainer_of("threads"), 3)
    assert len(stage_threads()) == 4
    assert isinstance(trainer.schedule, Threads)


def test_windows_are_not_trained_on_threads() -> None:
    options: dict[str, Any] = {"loss": F.mse_loss, "optimizer": adam, "schedule": Threads()}
    with pytest.raises(TypeError, match="unexpected keyword argument 'schedule'"):
        decouple_through_time(nn.LSTM(3, 4), 5, **options)


# ----------------------------------------------------------------------------------------- one sour


def parts_of(trainer: dni_fx.Trainer, interface: str) -> list[Any]:
    source = trainer.decoupled.sources[interface]
    assert isinstance(source, Each)
    return list(source.parts)


class Listening(Linear):
    """Keeps what it was told, and predicts nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: list[tuple[Tensor, ...]] = []

    def fit(self, prediction: Any, message: tuple[Tensor, ...]) -> Any:
        self.heard.append(tuple(m.clone() for m in message))
        return super().fit(prediction, message)


def two_consumers(trainer: dni_fx.Trainer) -> str:
    """The interface that the second stage and the last take."""
    (name,) = [i.name for i in trainer.decoupled.interfaces if len(i.consumers) == 2]
    return name


@pytest.mark.parametrize("schedule", ["sequential", Threads(staleness=0)], ids=str)
def test_each_part_hears_its_own_consumer(schedule: str | Schedule) -> None:
    gradients = {"a": partial(Each, source=Listening, parts=2), "c": "linear"}
    trainer = trainer_of(schedule, gradients, cuts=["a", "c"])
    assert two_consumers(trainer) == "a"
    want = []
    for step in range(3):
        x, y = batch(step)
        want.append(split_by_hand(trainer, x, y))
        trainer.step(x, target=y)
        trainer.drain()
    for place, part in enumerate(parts_of(trainer, "a")):
        assert len(part.heard) == 3
        for (got,), hand in zip(part.heard, want, strict=True):
            oracles.assert_bits_equal(got, hand[place], f"consumer {place}")
    assert not torch.equal(want[2][0], want[2][1])


def split_by_hand(trainer: dni_fx.Trainer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the second stage and the last send back for the first one's value, by autograd."""
    model: Any = trainer.decoupled.model
    saved = [p.grad for p in model.parameters()]
    h = model.a(x).detach()
    middle, skip = (h.clone().requires_grad_() for _ in range(2))
    k = model.c(model.b(middle).relu())
    guess = trainer.decoupled.sources["c"]((k.detach(),), dni_fx.one_hot(5)(y)).gradients
    assert guess is not None
    (first,) = torch.autograd.grad(k, middle, guess[0])
    (last,) = torch.autograd.grad(
        F.cross_entropy(model.d(torch.cat([k.detach().relu(), skip], 1)), y), skip
    )
    for parameter, gradient in zip(model.parameters(), saved, strict=True):
        parameter.grad = gradient
    return first, last


@pytest.mark.parametrize("schedule", [WarmUp(9), Calibration(every=1)], ids=str)
@pytest.mark.parametrize("threads", [False, True], ids=["sequential", "threads"])
def test_in_exact_steps_the_parts_hear_shares_of_the_true_gradient(
    schedule: Schedule, threads: bool
) -> None:
    trainer = trainer_of(
        Threads(staleness=0, then=schedule) if threads else schedule,
        {"a": partial(Each, source=Listening, parts=2), "c": "linear"}, cuts=["a", "c"],
    )  # fmt: skip
    for step in range(3):
        x, y = batch(step)
        true = trainer.true_gradients(x, target=y)
        trainer.step(x, target=y)
        trainer.drain()
        heard = [part.heard[-1][0] for part in parts_of(trainer, "a")]
        torch.testing.assert_close(heard[0] + heard[1], true["a"], rtol=1e-5, atol=1e-8)
        assert all(bool(h.abs().max() > 0) for h in heard)
        assert not torch.allclose(heard[0], true["a"])


def test_each_with_one_consumer_is_the_plain_source() -> None:
    def chain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)
        )

    for schedule in ("sequential", Threads(staleness=0), WarmUp(2), Threads(staleness=2)):
        plain, each = (
            train(trainer_of(schedule, g, chain(), cuts=["0", "2"]), 8)
            for g in ("linear", "each:linear")
        )
        oracles.assert_bits_equal(
            oracles.state_of(each.decoupled.model),
            oracles.state_of(plain.decoupled.model),
            str(schedule),
        )
        for (name, a), (_, b) in zip(
            each.decoupled.synthesizers.state_dict().items(),
            plain.decoupled.synthesizers.state_dict().items(), strict=True,
        ):  # fmt: skip
            oracles.assert_bits_equal(a, b, name)


def test_each_with_several_consumers_differs_from_the_plain_source() -> None:
    plain, each = (train(trainer_of("sequential", g), 8) for g in ("linear", "each:linear"))
    assert (
        largest_difference(each.decoupled.model.state_dict(), plain.decoupled.model.state_dict())
        > 0
    )
    assert len(parts_of(each, two_consumers(each))) == 2


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ("each:local", "must learn from gradients and answer at once.*Local does not"),
        ("each:critic", "Critic does not"),
        ("each:delayed", "Delayed does not"),
        ("each:zero", "Zero does not"),
        ("each:exact", r"[Ee]xact"),
        ("each:liner", "unknown gradient source 'liner'; did you mean 'linear'"),
        ("each:", "unknown gradient source"),
        ("joint:each:linear", "unknown gradient source"),
    ],
)
def test_sources_that_are_not_divided(gradients: str, message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        trainer_of("sequential", gradients)


def test_a_plan_remembers_divided_sources() -> None:
    first = trainer_of("sequential", "each:linear")
    plan = CutPlan.from_json(first.decoupled.plan.to_json())
    decoupled = dni_fx.decouple(
        built(), plan, example_inputs=(batch(0)[0],), context=dni_fx.one_hot(5)
    )
    second = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=adam)
    oracles.assert_bits_equal(record(train(second, 5)), record(train(first, 5)), "from the plan")


def test_a_late_source_keeps_its_graph_beside_later_updates() -> None:
    """DDG on threads: the graph of then with the weights of then, however late the answer."""
    first, second = (
        train(trainer_of(Threads(staleness=s), partial(Delayed, recompute=False)), 10)
        for s in (0, 3)
    )
    exact = train(trainer_of("sequential", "exact"), 10)
    assert (
        largest_difference(first.decoupled.model.state_dict(), exact.decoupled.model.state_dict())
        < 1e-6
    )
    assert (
        largest_difference(second.decoupled.model.state_dict(), exact.decoupled.model.state_dict())
        > 1e-4
    )
