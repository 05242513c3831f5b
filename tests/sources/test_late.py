"""Sources that wait: late gradients against loops written by hand, corrections, feedback, and
batches under way.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.plan import TensorSpec
from dni_fx.schedules import Calibration, RandomUpdates
from dni_fx.sources import Corrected, Delayed, Feedback, GradientSource, Mix, Prediction

from ..helpers import oracles

CUTS = ["0", "1", "2"]
STASH = partial(Delayed, recompute=False)


class Block(nn.Module):
    """A residual block with batch norm and dropout: buffers and random numbers, used once a batch."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = (
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


def chain(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3)).double()


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trainer_of(gradients: Any, model: nn.Module | None = None, **options: Any) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        chain() if model is None else model, CUTS, example_inputs=(batch(0)[0],), gradients=gradients,
        context=options.pop("context", dni_fx.one_hot(3)), check=False,
    )  # fmt: skip
    return dni_fx.Trainer(decoupled, options.pop("loss", F.cross_entropy), optimizer=sgd, **options)


def train(trainer: dni_fx.Trainer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(step)
        trainer.step(x, target=y)


def state(trainer: dni_fx.Trainer) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in trainer.decoupled.model.state_dict().items()}


# ---------------------------------------------------------------------------------------------- aga


def late_by_hand(
    steps: int, *, replay: bool, shrink: float = 1.0, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Late true gradients without dni_fx: stage k of four is 3 - k steps behind.

    DDG: gradients of the whole model as it was when it saw the batch. Features Replay: every stage
    again, on the input that it had then, with its weights of now, and the gradient that the stage
    behind found one step earlier.
    """
    model = chain(dropout)
    optimizers = [sgd(stage.named_parameters()) for stage in model]
    seen: list[dict[str, Any]] = []
    for step in range(steps):
        x, y = batch(step)
        now = copy.deepcopy(model)
        torch.manual_seed(step)
        inputs, states, h = [], [], x
        for stage in model:
            inputs.append(h.detach())
            states.append(torch.get_rng_state())
            h = stage(h)
        after = torch.get_rng_state()
        seen.append({"inputs": inputs, "rng": states, "y": y, "then": now, "sent": {}})
        for optimizer in optimizers:
            optimizer.zero_grad()
        for k in (3, 2, 1, 0):
            if step < 3 - k:
                continue
            old = seen[step - (3 - k)]
            stage = copy.deepcopy((model if replay else old["then"])[k])
            leaf = old["inputs"][k].clone().requires_grad_()
            torch.set_rng_state(old["rng"][k])
            output = stage(leaf)
            if k == 3:
                F.cross_entropy(output, old["y"]).backward()
            else:
                output.backward(old["sent"][k + 1] * shrink)
            old["sent"][k] = leaf.grad
            for parameter, copied in zip(model[k].parameters(), stage.parameters(), strict=True):
                parameter.grad = copied.grad
        torch.set_rng_state(after)
        for optimizer in optimizers:
            optimizer.step()
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shrink", [1.0, 0.5])
@pytest.mark.parametrize("replay", [True, False], ids=["replay", "stash"])
def test_late_gradients_equal_a_loop_by_hand(replay: bool, shrink: float, dropout: float) -> None:
    trainer = trainer_of(partial(Delayed, recompute=replay, shrink=shrink), chain(dropout))
    train(trainer, 7)
    got, want = state(trainer), late_by_hand(7, replay=replay, shrink=shrink, dropout=dropout)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    other = late_by_hand(7, replay=not replay, shrink=shrink, dropout=dropout)
    assert not torch.allclose(
        got["0.linear.weight"], other["0.linear.weight"], rtol=1e-9
    )  # the oracle can tell


def test_nothing_arrives_before_its_time() -> None:
    trainer = trainer_of("delayed")
    start = state(trainer)
    for step, learnt in enumerate(
        ("3.weight", "2.linear.weight", "1.linear.weight", "0.linear.weight")
    ):
        train(trainer, 1, step)
        now = state(trainer)
        assert not torch.equal(now[learnt], start[learnt])
        before = [f"{2 - step - k}.linear.weight" for k in range(3 - step)]
        assert all(torch.equal(now[n], start[n]) for n in before)


def test_more_steps_of_lag_add_up() -> None:
    trainer = trainer_of(partial(Delayed, steps=2))
    start = state(trainer)
    train(trainer, 6)
    assert torch.equal(state(trainer)["0.linear.weight"], start["0.linear.weight"])
    train(trainer, 1, 6)
    assert not torch.equal(state(trainer)["0.linear.weight"], start["0.linear.weight"])


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_correcting_nothing_is_being_late(recompute: bool) -> None:
    late = trainer_of(partial(Delayed, recompute=recompute))
    corrected = trainer_of(partial(Corrected, source="zero", recompute=recompute))
    for trainer in (late, corrected):
        train(trainer, 6)
    for name, tensor in state(late).items():
        torch.testing.assert_close(state(corrected)[name], tensor, rtol=1e-11, atol=1e-13)


class Fixed(GradientSource):
    """Always the same prediction."""

    message = "none"

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        generator = torch.Generator().manual_seed(1)
        return Prediction(
            tuple(0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
        )


@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_corrections_sum_to_the_true_gradient(recompute: bool) -> None:
    """With weights that hardly move, prediction and correction together are the true gradient."""
    total: dict[str, Tensor] = {}

    def tiny(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters)
        optimizer = torch.optim.SGD(pairs, lr=1e-12)

        def note(*_: Any) -> None:
            for n, p in pairs:
                if p.grad is not None:
                    total[n] = total.get(n, 0) + p.grad

        optimizer.register_step_pre_hook(note)
        return optimizer

    x, y = batch(0)
    decoupled = dni_fx.decouple(
        chain(),
        CUTS,
        example_inputs=(x,),
        gradients=partial(Corrected, source=Fixed, recompute=recompute),
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=tiny)
    trainer.step(x, target=y)
    early = {n: g.clone() for n, g in total.items()}
    assert trainer.drain() == 3
    model = chain()
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(early["0.linear.weight"], total["0.linear.weight"], rtol=1e-3)


# -------------------------------------------------------------------------------------------- mixin


def test_a_share_of_none_is_the_source_alone() -> None:
    alone, mixed = trainer_of("linear"), trainer_of(partial(Mix, source="linear", share=0.0))
    for trainer in (alone, mixed):
        train(trainer, 4)
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(mixed)[name], tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("recompute", [True, False], ids=["replay", "stash"])
def test_a_late_share_of_one_is_being_late(recompute: bool, at_once: bool) -> None:
    late = trainer_of(partial(Delayed, recompute=recompute))
    mixed = trainer_of(
        partial(Mix, source="linear", share=1.0, steps=1, at_once=at_once, recompute=recompute)
    )
    for trainer in (late, mixed):
        train(trainer, 6)
    for name, tensor in state(late).items():
        torch.testing.assert_close(state(mixed)[name], tensor, rtol=1e-11, atol=1e-13)


def test_half_of_nothing_is_half_of_the_gradient() -> None:
    """The source says zero: each cut halves what comes."""
    trainer = trainer_of(partial(Mix, source="zero", share=0.5))
    x, y = batch(0)
    true = trainer.true_gradients(x, target=y)
    seen = {}

    class Probe(Mix):
        def complete(
            self, prediction: Prediction, message: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            seen[len(seen)] = super().complete(prediction, message)[0]
            return (seen[len(seen) - 1],)

    probed = trainer_of(partial(Probe, source="zero", share=0.5))
    probed.step(x, target=y)
    for index, (cut, part) in enumerate(zip(reversed(CUTS), (0.5, 0.25, 0.125), strict=True)):
        torch.testing.assert_close(seen[index], true[cut] * part)


def test_feedback_projects_the_error_of_the_output() -> None:
    trainer = trainer_of("feedback")
    x, y = batch(0)
    model = chain()
    hidden = [x]
    for stage in model:
        hidden.append(stage(hidden[-1].detach()))
    output = hidden[-1].detach().requires_grad_()
    F.cross_entropy(output, y).backward()
    given = output.grad.float() @ trainer.decoupled.sources["0"].matrix_0
    hidden[1].backward(given.double())
    grads: dict[str, Tensor] = {}
    trainer.optimizers["stage_0"].register_step_pre_hook(
        lambda *_: grads.update(
            {n: p.grad.clone() for n, p in trainer.decoupled.model[0].named_parameters()}
        )
    )
    trainer.step(x, target=y)
    for name, parameter in model[0].named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


# ------------------------------------------------------------------------------------------------ b


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
    oracles.assert_bits_equal(state(disturbed), state(undisturbed), "after a failed step")


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
    oracles.assert_bits_equal(state(other), state(trainer), "resumed")


def test_batches_are_let_go() -> None:
    trainer = trainer_of("delayed")
    train(trainer, 12)
    assert len(trainer._under_way) == 3


def test_stages_that_are_left_out_send_nothing() -> None:
    trainer = trainer_of(partial(Corrected, source="linear"), schedule=RandomUpdates(0.5, seed=3))
    train(trainer, 40)
    assert len(trainer._under_way) <= 3
    trainer.drain()
    assert not trainer._under_way


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
    oracles.assert_bits_equal(
        trainer.decoupled.model[3].state_dict(), model[3].state_dict(), "last stage"
    )


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

    model = make().double()
    decoupled = dni_fx.decouple(
        model, cuts, example_inputs=(batch(0)[0],), gradients=gradients, check=False
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=still)
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


@pytest.mark.parametrize("gradients", ["delayed", STASH, "corrected"])
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
    "other", ["delayed", "corrected", partial(Mix, share=1.0), partial(Mix, share=1.0, steps=1)]
)
def test_corrections_beside_other_waiting_sources(other: Any) -> None:
    total, _ = summed(
        {"tanh": partial(Corrected, source=Fixed), "b": other}, ["b"], TwoAtOnce, (8, 8)
    )
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

    decoupled = dni_fx.decouple(
        chain(), CUTS, example_inputs=(batch(0)[0],), gradients="delayed", check=False
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=noting, accumulate=2)
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
    decoupled = dni_fx.decouple(
        model, ["0", "1"], example_inputs=(batch(0)[0],), gradients=STASH, check=False
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
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
    assert len(trainer._under_way) == 2
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
    oracles.assert_bits_equal(state(reused), state(fresh), "one buffer for all batches")


def test_a_late_forward_is_as_the_first_one_was() -> None:
    """Autocast and modes of then, whatever they are when the batch is finished."""
    losses = []
    for finish_in_eval in (False, True):
        x, y = batch(0)
        decoupled = dni_fx.decouple(
            chain(dropout=0.3).float(),
            CUTS,
            example_inputs=(x.float(),),
            gradients="delayed",
            check=False,
        )
        trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            trainer.step(x.float(), target=y)
        trainer.decoupled.train(not finish_in_eval)
        trainer.decoupled.model.train(not finish_in_eval)
        trainer.drain()
        losses.append(state(trainer))
    oracles.assert_bits_equal(losses[1], losses[0], "drained in evaluation mode")


# --------------------------------------------------------------------------------------------------


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
