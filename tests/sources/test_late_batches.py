"""Sources that wait: batches under way, and bad input."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.plan import TensorSpec
from dni_fx.schedules import Calibration, RandomUpdates
from dni_fx.sources import Corrected, Delayed, Feedback, Mix

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import sgd
from ..helpers.training import state, train
from .late import Fixed, batch, chain, trainer_of

STASH = partial(Delayed, recompute=False)


CORRECTED = partial(Corrected, source="linear")


@pytest.mark.parametrize(
    "gradients", ["delayed", STASH, CORRECTED, partial(CORRECTED, recompute=False)]
)
def test_a_failed_step_leaves_what_is_under_way(gradients: Any) -> None:
    undisturbed, disturbed = trainer_of(gradients), trainer_of(gradients)
    train(undisturbed, 6)
    train(disturbed, 3)
    x, y = batch(3)
    with pytest.raises(NonFiniteError):
        disturbed.step(torch.full_like(x, torch.nan), target=y)
    train(disturbed, 3, 3)
    assert_bits_equal(state(disturbed), state(undisturbed), "after a failed step")


def test_what_is_under_way_is_finished_before_saving() -> None:
    trainer = trainer_of("delayed")
    train(trainer, 4)
    with pytest.raises(DecouplingError, match="drain"):
        trainer.state_dict()
    assert trainer.drain() == 3
    assert trainer.drain() == 0
    saved = copy.deepcopy(trainer.state_dict())
    other = trainer_of("delayed")
    other.load_state_dict(saved)
    for each in (trainer, other):
        train(each, 3, 4)
    assert_bits_equal(state(other), state(trainer), "resumed")


def test_batches_are_let_go() -> None:
    trainer = trainer_of("delayed")
    train(trainer, 12)
    assert trainer.drain() == 3


def test_stages_that_are_left_out_send_nothing() -> None:
    trainer = trainer_of(partial(Corrected, source="linear"), schedule=RandomUpdates(0.5, seed=3))
    train(trainer, 40)
    assert trainer.drain() <= 3
    assert trainer.drain() == 0


def test_exact_steps_between_late_ones() -> None:
    trainer = trainer_of("delayed", schedule=Calibration(every=3))
    train(trainer, 10)
    trainer.drain()
    assert all(t.isfinite().all() for t in state(trainer).values())


def test_late_beside_immediate_sources() -> None:
    trainer = trainer_of({"0": "delayed", "1": "linear", "2": partial(Corrected, source="local")})
    train(trainer, 8)
    assert set(trainer.synthesizer_optimizers) == {"1", "2"}
    assert all(s.scale.item() > 0 for n, s in trainer.decoupled.sources.items() if n == "1")


def test_the_model_equals_itself_when_all_is_late_by_nothing_new() -> None:
    """One stage behind a single cut: the last stage is never late."""
    trainer = trainer_of("delayed")
    model = chain()
    x, y = batch(0)
    trainer.step(x, target=y)
    F.cross_entropy(model(x), y).backward()
    sgd(model[3].named_parameters()).step()
    assert_bits_equal(trainer.decoupled.model[3].state_dict(), model[3].state_dict(), "last stage")


class Sizes(nn.Module):
    """Another graph for large batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, n) for n in (6, 6, 3))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x).tanh()
        v = self.b(self.norm(u) if len(x) > 4 else u).tanh()
        return self.c(v * u) + self.c(u) if len(x) > 4 else self.c(v + u)


def summed(
    gradients: Any, cuts: list[str], make: Any, sizes: tuple[int, ...]
) -> tuple[dict[str, Tensor], Any]:
    """All gradients of a run whose weights stay, and the trainer."""
    total: dict[str, Tensor] = {}

    def still(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters)
        optimizer = torch.optim.SGD(pairs, lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: total.update(
                {n: total.get(n, 0) + p.grad for n, p in pairs if p.grad is not None}
            )
        )
        return optimizer

    trainer = trainer_of(gradients, make().double(), cuts=cuts, context=None, optimizer=still)
    for step, size in enumerate(sizes):
        x, y = batch(step, size)
        trainer.step(x, target=y)
    trainer.drain()
    return total, trainer


def true_sum(make: Any, sizes: tuple[int, ...]) -> nn.Module:
    model = make().double()
    for step, size in enumerate(sizes):
        x, y = batch(step, size)
        F.cross_entropy(model(x), y).backward()
    return model


@pytest.mark.parametrize("gradients", ["delayed", STASH, partial(Corrected, weight=1.0)])
def test_a_batch_under_way_keeps_its_own_graph(gradients: Any) -> None:
    sizes = (8, 3, 8, 3)
    total, trainer = summed(gradients, ["a", "b"], Sizes, sizes)
    want = true_sum(Sizes, sizes)
    for name, parameter in want.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert trainer.decoupled.model.norm.num_batches_tracked == 2


class TwoAtOnce(nn.Module):
    """Two values cross one cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, n) for n in (6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x).tanh()
        return self.c(self.b(u).tanh() + u)


@pytest.mark.parametrize(
    "other",
    [
        "delayed",
        partial(Corrected, weight=1.0),
        partial(Mix, share=1.0),
        partial(Mix, share=1.0, steps=1),
    ],
)
def test_corrections_beside_other_waiting_sources(other: Any) -> None:
    whole = partial(Corrected, source=Fixed, weight=1.0)
    total, _ = summed({"tanh": whole, "b": other}, ["b"], TwoAtOnce, (8, 8))
    want = true_sum(TwoAtOnce, (8, 8))
    for name, parameter in want.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_draining_in_an_unfinished_update_loses_nothing() -> None:
    seen: dict[str, list[Tensor]] = {}

    def noting(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters)
        optimizer = torch.optim.SGD(pairs, lr=0.0)
        name = pairs[-1][0]
        optimizer.register_step_pre_hook(
            lambda *_: seen.setdefault(name, []).append(
                0 if pairs[-1][1].grad is None else pairs[-1][1].grad.clone()
            )
        )
        return optimizer

    trainer = trainer_of("delayed", optimizer=noting, accumulate=2)
    trainer.step(batch(0)[0], target=batch(0)[1])
    trainer.drain()
    trainer.step(batch(0)[0], target=batch(0)[1])
    trainer.drain()
    model = chain()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    for name, gradients in seen.items():
        torch.testing.assert_close(
            sum(gradients), model.get_parameter(name).grad, rtol=1e-9, atol=1e-12
        )


def test_a_late_batch_that_is_not_finite_stops_training_once() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 6, bias=False), Root()), nn.Linear(6, 6), nn.Linear(6, 3)
    ).double()
    trainer = trainer_of(STASH, model, cuts=["0", "1"])
    failures = []
    for step in range(8):
        x, y = batch(step)
        try:
            trainer.step(x * (step != 2), target=y)
        except NonFiniteError as error:
            failures.append((step, "under way to late sources were dropped" in str(error)))
    assert failures == [(4, True)]
    trainer.drain()


def test_waiting_for_the_error_some_steps() -> None:
    class LateFeedback(Feedback):
        def __init__(self, specs: Any, context: Any = None) -> None:
            super().__init__(specs, context)
            self.lag = 2

    trainer = trainer_of(LateFeedback)
    train(trainer, 5)
    assert trainer.drain() == 2


@pytest.mark.parametrize("gradients", ["delayed", STASH])
def test_the_caller_may_write_into_its_batch_afterwards(gradients: Any) -> None:
    fresh, reused = trainer_of(gradients), trainer_of(gradients)
    train(fresh, 5)
    buffer = torch.empty(8, 6, dtype=torch.float64)
    for step in range(5):
        torch.manual_seed(step)
        x, y = batch(step)
        reused.step(buffer.copy_(x), target=y)
    assert_bits_equal(state(reused), state(fresh), "one buffer for all batches")


def test_a_late_forward_is_as_the_first_one_was() -> None:
    """Autocast and modes of then, whatever they are when the batch is finished."""
    losses = []
    for finish_in_eval in (False, True):
        trainer, (x, y) = trainer_of("delayed", chain(0.3).float()), batch(0, dtype=torch.float32)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            trainer.step(x, target=y)
        trainer.decoupled.train(not finish_in_eval)
        trainer.decoupled.model.train(not finish_in_eval)
        trainer.drain()
        losses.append(state(trainer))
    assert_bits_equal(losses[1], losses[0], "drained in evaluation mode")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Delayed, steps=0), "at least 1"),
        (partial(Delayed, shrink=0), "shrinking"),
        (partial(Corrected, source="delayed"), "predicts at once"),
        (partial(Corrected, source="exact"), "predicts at once"),
        (partial(Mix, share=1.5), "from 0 to 1"),
        (partial(Mix, source="liner"), "did you mean 'linear'"),
        (Feedback, "number of the model's outputs"),
    ],
)
def test_bad_options(make: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        make([TensorSpec((4, 6), torch.float32)])


def test_feedback_for_another_output() -> None:
    trainer = trainer_of(partial(Feedback, outputs=5))
    x, y = batch(0)
    with pytest.raises(DecouplingError, match="made for 5 outputs"):
        trainer.step(x, target=y)


def test_a_stage_that_waits_has_no_step_in_one_piece() -> None:
    stage = trainer_of("delayed").decoupled.stages[0]
    with pytest.raises(DecouplingError, match="waits for a message"):
        stage.step  # noqa: B018
    assert stage.code.count("def forward") == 2
