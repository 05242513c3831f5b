"""Whatever fails on a thread names its stage and step, and the trainer goes on or ends."""

from __future__ import annotations

import copy
import math
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dni_fx
from dni_fx.errors import NonFiniteError
from dni_fx.parallel.mailbox import ParallelError
from dni_fx.schedules import Schedule, Threads
from dni_fx.sources import Linear

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, largest_difference, record
from ..models.small import SKIPS, Skips
from .kit import counts, fails_once, run_script, slow, stage_threads, train, trainer_of


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
    model = SKIPS.build()
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
    model = SKIPS.build()
    model.b.register_forward_pre_hook(Failing(error(), 4))  # type: ignore[union-attr]
    assert re.match(
        rf"stage_1, step 4: {error.__name__}", str(fails(trainer_of(Threads(), model=model)))
    )


def test_a_loss_that_is_no_scalar() -> None:
    error = fails_once(
        trainer_of(Threads(), loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
    )
    assert re.match("stage_3, step 1: the loss must return a tensor with one element", str(error))


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
        model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))
        x = torch.randn(500, 200)
        decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="linear")
        sgd = torch.optim.SGD
        trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd, schedule="threads")
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
    assert_bits_equal(record(trainer)["decoupled"], state["decoupled"], "loaded")
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
    assert_bits_equal(record(threads), record(sequential), "overwritten batches")


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
    assert_bits_equal(cast(Threads(staleness=0)), want, "under autocast")
    assert largest_difference(want, record(train(trainer_of("sequential"), 6))) > 1e-4


def test_a_model_in_another_mode_is_traced_when_the_threads_rest() -> None:
    class Noisy(Skips):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.training else x)

    def modes(schedule: str | Schedule) -> dict[str, Any]:
        trainer = trainer_of(schedule, case=replace(SKIPS, make=Noisy))
        for training in (True, False, True):
            trainer.decoupled.train(training)
            train(trainer, 3)
        return record(trainer)

    assert_bits_equal(modes(Threads(staleness=0)), modes("sequential"), "modes")
