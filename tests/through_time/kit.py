"""Recurrent models with the loop over their steps written out, windows of a sequence, and notes of
gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.recurrent import ThroughTime, decouple_through_time
from dni_fx.sources import Prediction

WINDOW, BATCH, LENGTH = 3, 4, 8  # the last window is shorter


class LSTMStep(nn.Module):
    """One step with a cell, a head and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.head = nn.LSTMCell(3, 5), nn.Dropout(0.3), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, cell = self.cell(x, state)
        return self.head(self.drop(hidden)), (hidden, cell)


class Nested(nn.Module):
    """A cell of one's own with a nested state, an integer in it, and recurrent weights used twice a
    step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = (
            nn.Linear(3, 4),
            nn.Linear(4, 4, bias=False),
            nn.LayerNorm(4),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden = torch.tanh(self.inner(x) + self.norm(self.outer(self.outer(state["hidden"]))))
        slow = 0.9 * state["slow"][0] + 0.1 * hidden * hidden
        return self.head(hidden + slow), {
            "hidden": hidden,
            "slow": [slow],
            "time": state["time"] + 1,
        }


def nested_start(batch: int) -> Any:
    zeros = torch.zeros(batch, 4, dtype=torch.float64)
    return {"hidden": zeros + 0.3, "slow": [zeros], "time": torch.zeros((), dtype=torch.int64)}


class Whole(nn.Module):
    """Embedding, core and head; the state stays inside."""

    def __init__(self, core: Callable[[], nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Linear(3, 4), core(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.core(self.embed(x))
        return self.head(y)


class Explicit(Whole):
    """The same, its state an argument."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        y, state = self.core(self.embed(x), state)
        return self.head(y), state


def by_steps(model: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    ys = []
    for t in x:
        if isinstance(model, nn.RNNCellBase):
            state = model(t, state)
            ys.append(state[0] if isinstance(state, tuple) else state)
        else:
            y, state = model(t, state)
            ys.append(y)
    return torch.stack(ys), state


def inside(model: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    y, state = model.core(model.embed(x), state)
    return model.head(y), state


def directly(model: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    y, state = model(x, state)
    return y, state


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    run: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]
    fused: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    start: Callable[[int], Any] | None = None


def stacked(kind: Any, layers: int, **options: Any) -> Callable[[], Any]:
    return functools.partial(kind, 4, 5, layers, dropout=0.2 if layers > 1 else 0.0, **options)


CASES = [
    Case("lstm cell", lambda: nn.LSTMCell(3, 2), by_steps),
    Case("gru cell", lambda: nn.GRUCell(3, 2), by_steps),
    Case("rnn cell", lambda: nn.RNNCell(3, 2), by_steps),
    Case("a step with dropout", LSTMStep, by_steps),
    Case(
        "nested state",
        Nested,
        by_steps,
        options={"initial_state": nested_start},
        start=nested_start,
    ),
    Case("lstm", lambda: nn.LSTM(3, 2), directly, fused=True),
    Case("stacked gru", lambda: nn.GRU(3, 2, 2), directly, fused=True),
    Case("whole lstm", lambda: Whole(stacked(nn.LSTM, 1)), inside, fused=True),
    Case("whole stacked gru", lambda: Whole(stacked(nn.GRU, 2)), inside, fused=True),
    Case("explicit rnn", lambda: Explicit(stacked(nn.RNN, 1)), directly, fused=True),
    Case("projected lstm", lambda: nn.LSTM(3, 5, proj_size=2), directly, fused=True),
]


LAYERED = [
    Case(
        "lstm by layers",
        lambda: nn.LSTM(3, 2, 2, dropout=0.3),
        directly,
        True,
        {"cuts": ["layer_0"]},
    ),
    Case(
        "whole rnn by layers",
        lambda: Whole(stacked(nn.RNN, 3)),
        inside,
        True,
        {"cuts": ["embed", "core.layer_0", "core.layer_1"]},
    ),
]


class Noting(torch.optim.SGD):
    """Notes the gradients that it steps with."""

    def __init__(self, params: Any, notes: dict[str, Tensor], lr: float = 0.1) -> None:
        self.notes = notes
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self.notes[name] = p.grad.clone()
        return super().step(closure)


def sequence(seed: int = 0, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    return draw(length, BATCH, 3), draw(length, BATCH, 2)


def windows(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(WINDOW), y.split(WINDOW), strict=True))


def trainer(model: nn.Module, notes: dict[str, Tensor], **options: Any) -> ThroughTime:
    options.setdefault("loss", F.mse_loss)
    return decouple_through_time(
        model, WINDOW, optimizer=lambda params: Noting(params, notes), **options
    )


def train_windows(made: ThroughTime, x: Tensor, y: Tensor) -> list[Any]:
    pairs = windows(x, y)
    return [made.step(a, target=b, done=k == len(pairs) - 1) for k, (a, b) in enumerate(pairs)]


def full(case: Case, model: nn.Module, x: Tensor, y: Tensor, lr: float = 0.1) -> dict[str, Tensor]:
    """Backpropagation through the whole sequence at once, and an update."""
    for p in model.parameters():
        p.grad = None
    state = case.start(BATCH) if case.start else None
    total: Any = 0
    for a, b in windows(x, y):
        out, state = case.run(model, a, state)
        total = total + F.mse_loss(out, b)
    total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr).step()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor], relative: float = 0.0) -> bool:
    assert a.keys() == b.keys()
    if relative == 0:
        return all(torch.equal(a[n], b[n]) for n in a)
    return all(float((a[n] - b[n]).abs().max()) <= relative * float(b[n].abs().max()) for n in a)


class Constant(dni_fx.GradientSource):
    """Predicts ones."""

    message = "none"

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        return Prediction(tuple(torch.ones_like(v) for v in values))


def ready(**options: Any) -> tuple[ThroughTime, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = sequence()
    made = trainer(nn.GRU(3, 2).double(), {}, **options)
    made.step(x[:3], target=y[:3])
    return made, x, y


def unchanged(
    made: ThroughTime, call: Callable[[], Any], match: str, error: type[Exception] = DecouplingError
) -> None:
    before = {n: t.clone() for n, t in made.decoupled.state_dict().items() if isinstance(t, Tensor)}
    steps = made.steps
    with pytest.raises(error, match=match):
        call()
    after = {n: t for n, t in made.decoupled.state_dict().items() if isinstance(t, Tensor)}
    assert made.steps == steps
    assert all(torch.equal(before[n], after[n]) for n in before)
