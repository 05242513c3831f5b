"""Exact windows equal full backpropagation through time, zero ones truncated, and what lies
between.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.graphs.nested import map_tensors
from dni_fx.recurrent import ThroughTime, decouple_through_time
from dni_fx.sources import EXACT, AcrossTime, Prediction

from .kit import (
    BATCH,
    CASES,
    LAYERED,
    WINDOW,
    Case,
    Constant,
    Noting,
    by_steps,
    full,
    same,
    sequence,
    train_windows,
    trainer,
    windows,
)


def truncated(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The hand-written loop: detach between windows, update after each. Gradients of the last."""
    state, found = case.start(BATCH) if case.start else None, {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for a, b in windows(x, y):
        optimizer.zero_grad()
        out, state = case.run(model, a, state)
        F.mse_loss(out, b).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        state = map_tensors(torch.detach, state)
    return found


@pytest.mark.parametrize("gradients", EXACT)
@pytest.mark.parametrize("case", CASES + LAYERED, ids=lambda c: c.name)
def test_exact_windows_equal_full_backpropagation_through_time(case: Case, gradients: str) -> None:
    torch.manual_seed(0)
    model = case.build().double()
    reference, notes = copy.deepcopy(model), {}
    made = trainer(model, notes, gradients=gradients, **case.options)
    for update in range(2):
        x, y = sequence(update)
        torch.manual_seed(update)
        want = full(case, reference, x, y)
        torch.manual_seed(update)
        notes.clear()
        train_windows(made, x, y)
        assert same(notes, want, 1e-12 if case.fused else 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_zero_windows_equal_truncated_backpropagation_through_time(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().double()
    reference, notes = copy.deepcopy(model), {}
    made = trainer(model, notes, gradients="zero", **case.options)
    for update in range(2):
        x, y = sequence(update)
        torch.manual_seed(update)
        want = truncated(case, reference, x, y)
        torch.manual_seed(update)
        train_windows(made, x, y)
        assert same(notes, want)
        assert all(
            torch.equal(p, q)
            for p, q in zip(model.parameters(), reference.parameters(), strict=True)
        )


def test_the_oracles_see_a_lost_gradient_between_windows() -> None:
    """Negative control: full and truncated gradients differ, so neither oracle passes by itself."""
    torch.manual_seed(0)
    case, (x, y) = CASES[0], sequence()
    model = case.build().double()
    want, notes = full(case, copy.deepcopy(model), x, y, lr=0.0), {}
    made = decouple_through_time(
        copy.deepcopy(model),
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: Noting(p, notes, 0.0),
        gradients="zero",
    )
    total: dict[str, Tensor] = {}
    for k, (a, b) in enumerate(windows(x, y)):
        made.step(a, target=b, done=k == 2)
        for n, g in notes.items():
            total[n] = total.get(n, 0) + g
    assert not same(total, want, 1e-3)


class Told(dni_fx.GradientSource):
    """Predicts what it is told."""

    message = "gradient"

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.answers: list[Tensor] = []
        self.targets: list[Tensor] = []

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        return Prediction((self.answers.pop(0),))

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None:
        self.targets.append(message[0].clone())


def boundary_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The true gradient at the end of every window, hidden and cell side by side; the last is
    zero.
    """
    state: Any = tuple(torch.zeros(BATCH, 2, dtype=torch.float64) for _ in range(2))
    passed = []
    for a, b in windows(x, y):
        start = tuple(
            s.detach().requires_grad_() for s in state
        )  # the cell is upstream of the hidden state
        out, state = by_steps(model, a, start)
        passed.append((start, state, F.mse_loss(out, b)))
    found = [torch.zeros(BATCH, 4, dtype=torch.float64)]
    for start, end, loss in reversed(passed[1:]):
        roots, gradients = (loss, *end), (torch.ones_like(loss), *found[0].split(2, 1))
        found.insert(0, torch.cat(torch.autograd.grad(roots, start, gradients), 1))
    return found


def told(made: ThroughTime) -> Told:
    (source,) = {id(s): s for s in made.sources.values()}.values()
    assert isinstance(source, AcrossTime)
    assert isinstance(source.source, Told)
    return source.source


def test_the_true_gradient_as_a_prediction_gives_full_gradients_and_is_its_own_target() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.LSTMCell(3, 2).double(), sequence()
    true = boundary_gradients(model, x, y)
    want, notes = full(CASES[0], copy.deepcopy(model), x, y), {}
    made = decouple_through_time(
        model,
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: Noting(p, notes, 0.0),
        gradients=Told,
        factor=1.0,
    )
    total: dict[str, Tensor] = {}
    for k, (a, b) in enumerate(windows(x, y)):
        if k == 0:
            made.prepare(a)
            told(made).answers = [g.clone() for g in true]
        made.step(a, target=b, done=k == 2)
        for n, g in notes.items():
            total[n] = total.get(n, 0) + g
    assert same(total, want, 1e-12)
    assert len(told(made).targets) == 3
    for target, gradient in zip(told(made).targets, true, strict=True):
        assert torch.allclose(target, gradient, rtol=1e-12, atol=1e-15)
    assert torch.equal(told(made).targets[-1], torch.zeros_like(true[-1]))  # the terminal target


def test_the_next_window_is_one_consumer() -> None:
    """One source for each consumer is one at the end of a window."""
    found = []
    for gradients in ("linear", "each:linear"):
        torch.manual_seed(0)
        made = trainer(CASES[0].build().double(), {}, gradients=gradients, **CASES[0].options)
        for update in range(2):
            train_windows(made, *sequence(update))
        found.append({n: p.detach().clone() for n, p in made.decoupled.named_parameters()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())


def test_the_factor_is_on_use_only() -> None:
    x, y = sequence()
    gradients = {}
    for factor in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        notes: dict[str, Tensor] = {}
        made = trainer(nn.GRUCell(3, 2).double(), notes, gradients=Constant, factor=factor)
        made.step(*windows(x, y)[0][:1], target=windows(x, y)[0][1])
        gradients[factor] = notes["weight_hh"]
    none, half, whole = gradients[0.0], gradients[0.5], gradients[1.0]
    assert torch.allclose(half - none, (whole - none) / 2, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(whole, none)


def test_samples_end_one_by_one() -> None:
    """What has ended starts anew, sends nothing back, and gets zero as a target; the others go
    on.
    """
    torch.manual_seed(0)
    (x, y), notes = sequence(length=9), {}
    done = torch.tensor([True, False, False, True])
    model = nn.GRUCell(3, 2).double()
    alone = copy.deepcopy(model)
    made = decouple_through_time(
        model, WINDOW, loss=F.mse_loss, optimizer=lambda p: Noting(p, notes, 0.0), metrics_every=1
    )
    first = made.step(x[:3], target=y[:3], done=done)
    assert torch.equal(first.state[done], torch.zeros(2, 2, dtype=torch.float64))
    assert not (first.state[~done] == 0).any()
    second = made.step(x[3:6], target=y[3:6])
    fresh, _ = by_steps(alone, x[3:6], None)  # the whole batch: its size may decide the last bit
    assert torch.equal(second.outputs[:, done], fresh[:, done])
    assert not torch.equal(second.outputs[:, ~done], fresh[:, ~done])
    assert second.interfaces["next_0"].reference == "bootstrapped"


def test_gradients_of_ended_samples_do_not_cross() -> None:
    """With exact gradients the two halves of a batch are two sequences for one sample and one for
    the other.
    """
    torch.manual_seed(0)
    x, y = sequence(length=6)
    model, notes = nn.GRUCell(3, 2).double(), {}
    reference = copy.deepcopy(model)
    done = torch.tensor([True, False, False, True])
    made = trainer(model, notes, gradients="exact")
    made.step(x[:3], target=y[:3], done=done)
    made.step(x[3:], target=y[3:], done=True)
    out, state = by_steps(reference, x[:3], None)
    loss = F.mse_loss(out, y[:3])
    state = torch.where(done[:, None], torch.zeros_like(state), state)
    out, _ = by_steps(reference, x[3:], state)
    (loss + F.mse_loss(out, y[3:])).backward()
    assert same(notes, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
