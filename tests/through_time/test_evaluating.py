"""A recurrent model judged on held-out windows: its state is carried, training is left alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time

from .kit import BATCH, CASES, LAYERED, WINDOW, Case, sequence, windows

X, Y = sequence(seed=1)


def made_of(case: Case, model: nn.Module, **options: Any) -> Any:
    return decouple_through_time(
        model,
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        **(case.options | options),
    )


def by_hand(case: Case, model: nn.Module) -> float:
    """Two sequences, each from a new state."""
    model = copy.deepcopy(model).eval()
    found = []
    for x, y in ((X, Y), (Y.new_zeros(X.shape), Y)):
        out, _ = case.run(model, x, case.start(BATCH) if case.start else None)
        found.append(F.mse_loss(out, y))
    return torch.stack(found).detach().mean().item()


def held_out(fresh: bool = False) -> list[tuple[Tensor, Tensor, bool]]:
    pieces = [windows(X, Y), windows(torch.zeros_like(X), Y)]
    return [(x, y, fresh or k == len(p) - 1) for p in pieces for k, (x, y) in enumerate(p)]


@pytest.mark.parametrize("case", CASES + LAYERED, ids=lambda case: case.name)
def test_the_state_is_carried_and_ends_with_its_sequence(case: Case) -> None:
    torch.manual_seed(0)
    made = made_of(case, case.build().double())
    x, y = sequence()
    made.step(x[:WINDOW], target=y[:WINDOW])
    made.drain()
    want = by_hand(case, made.model)
    assert made.evaluate(held_out()) == pytest.approx(want, rel=1e-6)
    whole = [(X, Y, True), (torch.zeros_like(X), Y, True)]  # longer than a window
    assert made.evaluate(whole) == pytest.approx(want, rel=1e-6)
    assert made.evaluate(held_out(fresh=True)) != pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("gradients", ["auto", "exact"])
def test_training_goes_on_from_its_own_state(gradients: str) -> None:
    """In the middle of a sequence, between windows that are held for exact gradients, too."""
    looking, straight, anew = (
        trained(gradients, look, apart) for look, apart in ((1, 0), (0, 0), (0, 1))
    )
    assert all(torch.equal(looking[n], straight[n]) for n in straight)
    assert not all(torch.equal(anew[n], straight[n]) for n in straight)  # without its own state


def trained(gradients: str, look: int, apart: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = made_of(LAYERED[0], LAYERED[0].build().double(), gradients=gradients)
    for k, (x, y) in enumerate(windows(*sequence())):
        made.step(x, target=y, done=k == 2 or apart == 1)
        if look:
            made.evaluate(held_out())
            assert made.model.training
    return dict(made.model.state_dict())


@pytest.mark.parametrize(
    "done",
    [
        [False, True, False, True],
        np.array([False, True, False, True]),
        np.array([0, 1, 0, 1]),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([0.0, 1.0, 0.0, 1.0]),
    ],
    ids=["list", "numpy", "numpy 0 and 1", "0 and 1", "float"],
)
def test_done_in_every_form(done: Any) -> None:
    assert_same_as(torch.tensor([False, True, False, True]), done)


@pytest.mark.parametrize("done", [np.True_, np.array(True), torch.tensor(True), torch.tensor(1), 1])
def test_done_for_all_at_once(done: Any) -> None:
    assert_same_as(True, done)
    assert_same_as(False, 1 - torch.as_tensor(done).int())


def assert_same_as(plain: Any, done: Any) -> None:
    x, y = sequence()
    found = []
    for each in (plain, done, None if plain is True else True):
        torch.manual_seed(0)
        made = made_of(CASES[5], nn.LSTM(3, 2).double())
        loader = [(x[:3], y[:3], each), {"x_window": x[3:6], "target": y[3:6]}]
        made.fit(loader, progress=False)
        found.append((made.state, made.evaluate(loader)))
    (a, first), (b, second), (c, third) = found
    assert first == second != third
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a, c, strict=True))


def test_other_windows_are_refused() -> None:
    made = made_of(CASES[5], nn.LSTM(3, 2).double())
    for loader, says in [
        ([(X, Y, Y)], r"done must be True or False .* shape \(4,\)"),
        ([(X, Y, 2)], "done must be"),
        ([(X, Y, "yes")], "done must be .* got 'yes'"),
        ([(X[0, 0], Y)], "a window must be a tensor"),
        ([(X, Y), (X[:, :2], Y[:, :2])], "a window of batch 2 needs"),
        ([], "no batch"),
    ]:
        with pytest.raises(DecouplingError, match=says):
            made.evaluate(loader)
