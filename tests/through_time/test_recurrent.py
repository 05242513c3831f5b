"""Through time: exact windows equal full backpropagation through time, zero ones truncated, and
what lies between.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.graphs.nested import flatten, map_tensors
from dni_fx.recurrent import ThroughTime, decouple_through_time
from dni_fx.sources import AcrossTime, Linear, Prediction, Traces

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
    Case("lstm by layers", lambda: nn.LSTM(3, 2, 2, dropout=0.3), directly, True, {"cuts": ["layer_0"]}),
    Case(
        "whole rnn by layers", lambda: Whole(stacked(nn.RNN, 3)), inside, True,
        {"cuts": ["embed", "core.layer_0", "core.layer_1"]},
    ),
]  # fmt: skip


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


def same(a: dict[str, Tensor], b: dict[str, Tensor], relative: float = 0.0) -> bool:
    assert a.keys() == b.keys()
    if relative == 0:
        return all(torch.equal(a[n], b[n]) for n in a)
    return all(float((a[n] - b[n]).abs().max()) <= relative * float(b[n].abs().max()) for n in a)


@pytest.mark.parametrize("case", CASES + LAYERED, ids=lambda c: c.name)
def test_exact_windows_equal_full_backpropagation_through_time(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().double()
    reference, notes = copy.deepcopy(model), {}
    made = trainer(model, notes, gradients="exact", **case.options)
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
    """The true gradient at the end of every window, hidden and cell side by side; the last is zero."""
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


class Constant(dni_fx.GradientSource):
    """Predicts ones."""

    message = "none"

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        return Prediction(tuple(torch.ones_like(v) for v in values))


def test_samples_end_one_by_one() -> None:
    """What has ended starts anew, sends nothing back, and gets zero as a target; the others go on."""
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
    fresh, _ = by_steps(alone, x[3:6, done], None)
    assert torch.equal(second.outputs[:, done], fresh)
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


# ---- sources -------------------------------------------------------------------------------------


def test_one_source_serves_all_tensors_of_a_state() -> None:
    made = trainer(Whole(stacked(nn.LSTM, 2)).double(), {})
    train_windows(made, *sequence())
    assert len(made.synthesizers) == 1
    source = made.sources["next_hidden"]
    assert source is made.sources["next_cell"]
    assert isinstance(source, AcrossTime)
    assert source.source.specs[0].shape == (BATCH, 2 * 2 * 5)
    assert {i.name: i.feeds for i in made.plan.interfaces} == {
        "next_hidden": "state_hidden", "next_cell": "state_cell",
    }  # fmt: skip


@pytest.mark.parametrize("gradients", ["auto", "linear", "mlp", "stale", Linear])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_windows_are_learnt_from(gradients: Any, auxiliary: bool) -> None:
    torch.manual_seed(0)
    model = Whole(stacked(nn.LSTM, 1))
    made = decouple_through_time(
        model, WINDOW, loss=F.mse_loss, optimizer=lambda p: torch.optim.Adam(p, 1e-2), gradients=gradients,
        auxiliary=auxiliary, metrics_every=1,
    )  # fmt: skip
    x = sequence()[0].float()
    y = x[..., :2].cumsum(0) / 3  # what came before counts
    losses = [sum(float(r.loss) for r in train_windows(made, x, y)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    report = made.step(x[:3], target=y[:3])
    assert set(report.interfaces) == {"next_hidden", "next_cell"}


def test_the_source_learns_the_boundary_gradient_of_a_fixed_model() -> None:
    """Under a frozen model the prediction approaches the true gradient (one window ahead, factor
    0).
    """
    torch.manual_seed(0)
    model, (x, y) = nn.LSTMCell(3, 2).double(), sequence(length=6)
    made = decouple_through_time(
        model, WINDOW, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, 0.0), factor=0.0, metrics_every=1,
        synthesizer_optimizer=lambda p: torch.optim.Adam(p, 1e-2),
    )  # fmt: skip
    for _ in range(400):
        made.step(x[:3], target=y[:3])
        report = made.step(x[3:], target=y[3:], done=False)
        made._state, made._under_way = None, []
    assert report.interfaces["next_0"].cosine > 0.99


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_traces_equal_the_weighted_regression_done_offline(decay: float) -> None:
    """The sum of online updates is that of lambda-returns, computed with all windows at hand."""
    torch.manual_seed(0)
    model, (x, y) = nn.LSTMCell(3, 2).double(), sequence(length=9)
    factor = 0.6
    made = decouple_through_time(
        model, WINDOW, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, 0.0), factor=factor,
        gradients=functools.partial(Traces, decay=decay), synthesizer_optimizer=lambda p: torch.optim.SGD(p, 0.0),
    )  # fmt: skip
    pairs = windows(x, y)
    made.prepare(pairs[0][0])
    (source,) = {id(s): s for s in made.sources.values()}.values()
    traces = source.source  # type: ignore[union-attr]
    layer = traces.networks[0].layers[0]  # type: ignore[union-attr, index]
    nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    traces.scale.fill_(0.01)
    traces._update_scale = lambda targets: None  # units stand still
    total = {"weight": torch.zeros(4, 4).double(), "bias": torch.zeros(4).double()}
    made.decoupled.synthesizers.requires_grad_(True)

    class Summing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for n, p in (("weight", layer.weight), ("bias", layer.bias)):
                total[n] += p.grad if p.grad is not None else 0  # type: ignore[operator]

    made.synthesizer_optimizers = {"next_0": Summing(source.parameters(), 0.0)}
    for k, (a, b) in enumerate(pairs):
        made.step(a, target=b, done=k == len(pairs) - 1)

    # offline: states, predictions, one-window targets and Jacobians of the same sequence
    state: Any = tuple(torch.zeros(BATCH, 2).double() for _ in range(2))
    states, jacobians, locals_ = [], [], []
    for a, b in pairs:
        leaf = torch.cat(state, 1).detach().requires_grad_()
        out, after = by_steps(model, a, tuple(leaf.split(2, 1)))
        joined = torch.cat(after, 1)
        (own,) = torch.autograd.grad(F.mse_loss(out, b), leaf, retain_graph=True)
        rows = [
            torch.autograd.grad(joined[:, i].sum(), leaf, retain_graph=True)[0] for i in range(4)
        ]
        jacobians.append(torch.stack(rows, 1))
        locals_.append(own)
        states.append(joined.detach())
        state = tuple(joined.detach().split(2, 1))
    predict = lambda s: 0.01 * (s @ layer.weight.T + layer.bias).detach()  # type: ignore[operator]  # noqa: E731
    guesses = [predict(s) for s in states[:-1]] + [torch.zeros(BATCH, 4).double()]
    returns: list[Tensor] = [torch.zeros(BATCH, 4).double()]  # the end of the sequence
    for k in reversed(range(len(pairs) - 1)):
        j, own = jacobians[k + 1], locals_[k + 1]
        ahead = (1 - decay) * guesses[k + 1] + decay * returns[0]
        returns.insert(0, own + factor * torch.einsum("bij,bi->bj", j, ahead))
    want = {"weight": torch.zeros(4, 4).double(), "bias": torch.zeros(4).double()}
    for s, g in zip(states, returns, strict=True):
        error = (s @ layer.weight.T + layer.bias).detach() - g / 0.01  # type: ignore[operator]
        want["weight"] += 2 / error.numel() * error.T @ s
        want["bias"] += 2 / error.numel() * error.sum(0)
    for n in total:
        assert torch.allclose(total[n], want[n], rtol=1e-11, atol=1e-13), n


def test_traces_refuse_what_would_not_fit_in_memory() -> None:
    made = trainer(nn.LSTMCell(3, 300), {}, gradients=Traces, loss=lambda out, _: out.sum())
    with pytest.raises(DecouplingError, match="traces of a state of 600 features"):
        made.step(torch.randn(2, 4, 3))


# ---- the state -----------------------------------------------------------------------------------


def test_the_state_is_carried_reported_and_taken() -> None:
    torch.manual_seed(0)
    x, y = sequence()
    for case in CASES + LAYERED:
        model = case.build().double().eval()
        reference = copy.deepcopy(model)
        made = decouple_through_time(
            model,
            WINDOW,
            loss=F.mse_loss,
            optimizer=lambda p: torch.optim.SGD(p, 0.0),
            **case.options,
        )
        state: Any = case.start(BATCH) if case.start else None
        for a, b in windows(x, y):
            report = made.step(a, target=b)
            out, state = case.run(reference, a, state)
            assert torch.equal(report.outputs, out), case.name
            left, right = flatten(report.state), flatten(map_tensors(torch.detach, state))
            assert left[1] == right[1], case.name
            assert all(torch.equal(s, t) for s, t in zip(left[0], right[0], strict=True)), case.name
        again = made.step(
            x[:3], report.state, target=y[:3]
        )  # the carried state itself: the sequence goes on
        assert torch.equal(again.outputs, case.run(reference, x[:3], state)[0])
        start = case.start(BATCH) if case.start else map_tensors(torch.zeros_like, state)
        other = made.step(x[:3], start, target=y[:3])  # another one: a new sequence
        assert torch.equal(other.outputs, case.run(reference, x[:3], start)[0])


def test_batch_first_windows() -> None:
    torch.manual_seed(0)
    x, y = sequence()
    first, second = nn.GRU(3, 2, batch_first=True).double(), nn.GRU(3, 2).double()
    second.load_state_dict(first.state_dict())
    a, b = trainer(first, {}), trainer(second, {})
    for p, q in windows(x, y):
        left = a.step(p.transpose(0, 1), target=q.transpose(0, 1))
        right = b.step(p, target=q)
        assert torch.allclose(left.outputs.transpose(0, 1), right.outputs, rtol=1e-12)
    assert a.sources["next_hidden"].specs[0].batch_dim == 1


def test_a_core_that_the_model_starts_itself() -> None:
    """Zeros made in forward are what is carried anyway; anything else is an error."""

    class Starts(Whole):
        offset = 0.0

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(1, x.shape[1], 5, dtype=x.dtype) + self.offset
            return self.head(self.core(self.embed(x), (zeros, zeros))[0])

    x, y = sequence()
    model = Starts(stacked(nn.LSTM, 1)).double()
    notes: dict[str, Tensor] = {}
    train_windows(trainer(model, notes, gradients="zero"), x, y)
    assert notes
    model.offset = 1.0
    with pytest.raises(DecouplingError, match="starts 'core' from a state of its own"):
        trainer(model, {}).step(x[:3], target=y[:3])


def test_training_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    x, y = sequence(length=12)
    torch.manual_seed(0)
    model = LSTMStep().double()
    made = trainer(model, {})
    for a, b in windows(x[:6], y[:6]):
        made.step(a, target=b)
    with pytest.raises(DecouplingError, match="drain"):
        made.state_dict()
    made.drain()
    saved = copy.deepcopy(made.state_dict())
    want = [made.step(a, target=b).loss for a, b in windows(x[6:], y[6:])]

    torch.manual_seed(1)
    other = trainer(LSTMStep().double(), {})
    other.prepare(x[:3])
    other.load_state_dict(saved)
    got = [other.step(a, target=b).loss for a, b in windows(x[6:], y[6:])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_full_sequences_without_an_end_are_finished_by_drain() -> None:
    torch.manual_seed(0)
    (x, y), notes = sequence(), {}
    model = nn.GRUCell(3, 2).double()
    want = full(CASES[1], copy.deepcopy(model), x, y)
    made = trainer(model, notes, gradients="exact")
    for a, b in windows(x, y):
        made.step(a, target=b)
    assert not notes
    assert made.drain() == 1
    assert same(notes, want)
    assert made.drain() == 0


def test_evaluation_mode_has_a_graph_of_its_own() -> None:
    torch.manual_seed(0)
    x, y = sequence()
    made = trainer(LSTMStep().double(), {})
    made.step(x[:3], target=y[:3], done=True)
    made.model.eval()
    out, _ = by_steps(made.model, x[:3], None)  # without dropout
    assert torch.equal(made.step(x[:3], target=y[:3], done=True).outputs, out)
    made.model.train()
    torch.manual_seed(0)
    out, _ = by_steps(made.model, x[:3], None)
    torch.manual_seed(0)
    assert torch.equal(made.step(x[:3], target=y[:3], done=True).outputs, out)


def test_layers_follow_the_mode_and_share_the_weights() -> None:
    model = nn.LSTM(3, 2, 2, dropout=0.5).double()
    before = dict(model.state_dict())
    made = trainer(model, {}, cuts=["layer_0"])
    x, y = sequence()
    train_windows(made, x, y)
    assert list(model.state_dict()) == list(before)
    assert [n for s in made.stages for n, _ in s.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    model.eval()
    first = made.step(x[:3], target=y[:3], done=True).loss
    for group in (g for o in made.optimizers.values() for g in o.param_groups):
        group["lr"] = 0.0
    second = made.step(x[:3], target=y[:3], done=True)
    third = made.step(x[:3], target=y[:3], done=True)
    assert torch.equal(second.loss, third.loss)  # no dropout
    assert first.isfinite()


# ---- bad input -----------------------------------------------------------------------------------


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


def test_bad_windows() -> None:
    made, x, y = ready()
    unchanged(made, lambda: made.step(x[:5], target=y[:5]), "5 time steps.*window=3")
    unchanged(
        made,
        lambda: made.step(x[:3, :2], target=y[:3, :2]),
        r"batch of 2|batch 2 needs \(1, 2, 2\)",
    )
    unchanged(made, lambda: made.step(x[:0], target=y[:0]), "is empty")
    unchanged(made, lambda: made.step(x[0, 0], target=y[0, 0]), "must be a tensor")
    unchanged(made, lambda: made.step("x"), "must be a tensor")
    made.step(x[:3], target=y[:3], done=True)
    made.step(x[:3, :2], target=y[:3, :2])  # where all have ended the batch may change
    made.reset()
    made.step(x[:2, :3], target=y[:2, :3])


@pytest.mark.parametrize(
    "done",
    [
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(4, 1, dtype=torch.bool),
        torch.zeros(4),
        [True] * 4,
        1,
    ],
)
def test_bad_done(done: Any) -> None:
    made, x, y = ready()
    unchanged(
        made, lambda: made.step(x[:3], target=y[:3], done=done), r"done must be .* shape \(4,\)"
    )


def test_bad_states() -> None:
    made, x, y = ready()
    good = made.state
    unchanged(
        made,
        lambda: made.step(x[:3], (good, good), target=y[:3]),
        "state of a GRU must be one tensor",
    )
    unchanged(made, lambda: made.step(x[:3], good[:, :2], target=y[:3]), r"needs \(1, 4, 2\)")
    unchanged(made, lambda: made.step(x[:3], good.float(), target=y[:3]), "float32")

    nested = trainer(Nested().double(), {}, initial_state=nested_start)
    nested.step(x[:3], target=y[:3])
    state = dict(nested.state)
    del state["time"]
    unchanged(nested, lambda: nested.step(x[:3], state, target=y[:3]), "another structure")


def test_a_state_that_changes_in_the_window() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.layer(x), (state[0], self.layer(x))

    start = lambda batch: (torch.zeros(batch, 2),)  # noqa: E731
    made = trainer(Grows(), {}, initial_state=start)
    with pytest.raises(DecouplingError, match="another structure"):
        made.step(torch.randn(3, 4, 3), target=torch.randn(3, 4, 2))

    class Widens(Grows):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.layer(x), (torch.cat((state[0], state[0]), 1),)

    made = trainer(Widens(), {}, initial_state=start)
    with pytest.raises(DecouplingError, match="'0' of the state changes in a window"):
        made.step(torch.randn(3, 4, 3), target=torch.randn(3, 4, 2))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.LSTM(3, 2, bidirectional=True), "bidirectional"),
        (lambda: nn.Linear(3, 2), "holds no nn.LSTM"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "holds no nn.LSTM"),
    ],
)
def test_models_that_cannot_be_carried(build: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(DecouplingError, match=match):
        trainer(build(), {})


def test_models_whose_start_is_unknown() -> None:
    made = trainer(Nested().double(), {})
    with pytest.raises(DecouplingError, match="initial_state="):
        made.step(sequence()[0][:3])

    class Ones(LSTMStep):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return super().forward(x, (torch.ones(len(x), 5),) * 2 if state is None else state)

    with pytest.raises(DecouplingError, match="does not start from zeros"):
        trainer(Ones(), {}).step(torch.randn(3, 4, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"factor": -1}, "factor=-1"),
        ({"gradients": "critic", "context": lambda y: y[0]}, "cannot serve the state"),
        ({"gradients": "delayed"}, "cannot serve the state"),
        ({"gradients": "linaer"}, "linear"),
        ({"gradients": {"next_hiden": "zero"}}, "next_hidden"),
        ({"cuts": ["layer_7"]}, "layer_7"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    options = {
        "window": 3,
        "loss": F.mse_loss,
        "optimizer": lambda p: torch.optim.SGD(p, 0.1),
        **options,
    }
    x, y = sequence()
    with pytest.raises(DecouplingError, match=match):
        decouple_through_time(nn.GRU(3, 2, 2).double(), **options).step(x[:3], target=y[:3])


def test_nan_is_caught_before_anything_is_updated() -> None:
    made, x, y = ready()
    bad = x[3:6].clone()
    bad[1, 2, 0] = torch.nan
    unchanged(made, lambda: made.step(bad, target=y[3:6]), "is NaN", NonFiniteError)
    made.step(x[3:6], target=y[3:6])


def test_what_only_whole_sequences_tell_is_refused() -> None:
    made, x, y = ready()
    for tell in (made.true_gradients, made.diagnose, made.diagnose_parameters):
        with pytest.raises(DecouplingError, match="all windows after it"):
            tell(x, target=y)


def test_nothing_of_a_window_outlives_the_next() -> None:
    """As many tensors are alive after a long sequence as after a short one."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    made = trainer(
        nn.LSTM(3, 2), {}
    )  # the source's hidden layer is what once kept its own graph alive
    x, y = (t.float() for t in sequence(length=3))
    for _ in range(5):
        made.step(x, target=y)
    before = alive()
    for _ in range(20):
        made.step(x, target=y)
    assert alive() <= before


# ---- found by review -----------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], ["layer_0"]])
@pytest.mark.parametrize("pass_on", [lambda s: s, lambda s: map_tensors(torch.detach, s)])
def test_a_state_that_is_passed_on_is_the_carried_one(
    cuts: list[str], pass_on: Callable[[Any], Any]
) -> None:
    x, y = sequence(length=9)
    found = []
    for passes in (False, True):
        torch.manual_seed(0)
        made = trainer(nn.LSTM(3, 2, 2).double(), {}, cuts=cuts, metrics_every=1)
        state = None
        for a, b in windows(x, y):
            report = made.step(a, state, target=b)
            state = pass_on(report.state) if passes else None
        found.append([p.clone() for p in made.decoupled.parameters()])
        assert not math.isnan(
            report.interfaces[made.plan.interfaces[0].name].relative_error
        )  # some gradient came back
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_a_state_that_was_written_to_is_refused() -> None:
    made, x, y = ready()
    report = made.step(x[3:6], target=y[3:6])
    report.state.zero_()
    with pytest.raises(DecouplingError, match="written to in place"):
        made.step(x[:3], report.state, target=y[:3])
    made.reset()
    made.step(x[:3], target=y[:3])


class Ends(nn.Module):
    """Classifies by the state that its core returns."""

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.core, self.head = kind(3, 2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.core(x)
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class Twice(nn.LSTM):
    """Has a forward of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        y, state = super().forward(x, hx)
        return 2 * y, state


def hooked() -> nn.Module:
    model = Whole(stacked(nn.LSTM, 2))
    model.core.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 2, outputs[1]))
    return model


@pytest.mark.parametrize(
    ("build", "cut"),
    [
        (Ends, "core.layer_0"),
        (lambda: Ends(nn.GRU), "core.layer_0"),
        (lambda: Whole(lambda: Twice(4, 5, 2)), "core.layer_0"),
        (hooked, "core.layer_0"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(3, 2, 2), "weight_hh_l0"),
            "layer_0",
        ),
    ],
)
def test_layers_that_would_compute_something_else_are_refused(
    build: Callable[[], nn.Module], cut: str
) -> None:
    x, y = sequence()
    with pytest.raises(DecouplingError, match=r"does not compute what it did|re-made weights"):
        trainer(build().double(), {}, cuts=[cut], loss=lambda out, y: out.sum()).step(
            x[:3], target=y[:3]
        )


def test_a_new_sequence_ends_the_exact_one_before() -> None:
    torch.manual_seed(0)
    x, y = sequence(length=9)
    model, notes = nn.GRUCell(3, 2).double(), {}
    reference = copy.deepcopy(model)
    made = trainer(model, notes, gradients="exact")
    made.step(x[:3], target=y[:3])
    made.step(x[3:6], torch.zeros(4, 2).double(), target=y[3:6])
    out, _ = by_steps(reference, x[:3], None)
    F.mse_loss(out, y[:3]).backward()
    assert same(notes, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
    made.step(x[6:], target=y[6:], done=True)


@pytest.mark.parametrize("at", [1, 2])
def test_exact_sequences_survive_a_failed_window(at: int) -> None:
    """As if it had never been: before the last window, and in it."""
    x, y = sequence(length=9)
    found = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = Buffered().double()
        made = trainer(model, {}, gradients="exact")
        for k, (a, b) in enumerate(windows(x, y)):
            if fails and k == at:
                with pytest.raises(NonFiniteError):
                    made.step(a * torch.nan, target=b, done=k == 2)
                with pytest.raises(RuntimeError):
                    made.step(a, target=b[:, :1, :1].expand(2, 3, 5), done=k == 2)
            made.step(a, target=b, done=k == 2)
        found.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


class Buffered(nn.Module):
    """Its graph holds a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 2)
        self.register_buffer("scale", torch.ones(2) * 0.5)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state = self.cell(x, state)
        return state * self.scale, state


def test_exact_windows_with_a_buffer_and_a_shorter_last_one() -> None:
    x, y = sequence()
    made = trainer(Buffered().double(), {}, gradients="exact")
    train_windows(made, x, y)  # the last is traced anew, and checked, while two are held


def test_the_callers_tensor_may_be_used_again() -> None:
    x, y = sequence()
    found = []
    for reuse in (False, True):
        torch.manual_seed(0)
        notes: dict[str, Tensor] = {}
        made = trainer(nn.GRUCell(3, 2).double(), notes, gradients="exact")
        place = torch.empty(3, BATCH, 3, dtype=torch.float64)
        for k, (a, b) in enumerate(windows(x[:6], y[:6])):
            made.step(place.copy_(a) if reuse else a, target=b, done=k == 1)
        found.append(dict(notes))
    assert same(*found)


def test_learnt_starts_are_refused() -> None:
    class Learnt(Whole):
        def __init__(self) -> None:
            super().__init__(lambda: nn.GRU(4, 5))
            self.start = nn.Parameter(torch.zeros(1, 1, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(
                self.core(self.embed(x), self.start.expand(1, x.shape[1], 5).contiguous())[0]
            )

    x, y = sequence()
    with pytest.raises(DecouplingError, match="learnt or not zero"):
        trainer(Learnt().double(), {}).step(x[:3], target=y[:3])


def test_autocast_keeps_the_type_of_the_state() -> None:
    made = trainer(LSTMStep(), {})
    x, y = (t.float() for t in sequence())
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in windows(x, y):
            report = made.step(a, target=b)
    assert all(t.dtype == torch.float32 for t in report.state)


def test_the_auxiliary_target_of_an_ended_sample_is_zero() -> None:
    torch.manual_seed(0)
    made = trainer(nn.GRUCell(3, 2).double(), {}, auxiliary=True, gradients=Spy)
    x, y = sequence()
    made.step(x[:3], target=y[:3])
    done = torch.tensor([True, False, True, False])
    made.step(x[3:6], target=y[3:6], done=done)
    made.step(x[:3], target=y[:3], done=True)
    (source,) = {id(s): s for s in made.sources.values()}.values()
    targets = source.source.targets  # type: ignore[union-attr]
    assert not targets[1][done].any()
    assert targets[1][~done].any()
    assert not targets[2].any()


class Spy(Constant):
    """Predicts ones and notes its targets."""

    message = "gradient"

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.targets: list[Tensor] = []

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None:
        self.targets.append(message[0].clone())


def test_no_update_comes_while_windows_are_held() -> None:
    x, y = sequence()
    made = trainer(nn.GRUCell(3, 2).double(), {}, gradients="exact", accumulate=2)
    train_windows(made, x, y)  # three windows, the first of an update
    unchanged(made, lambda: made.step(x[:3], target=y[:3]), "accumulate= counts windows")
    even = trainer(nn.GRUCell(3, 2).double(), {}, gradients="exact", accumulate=2)
    for _ in range(2):
        train_windows(even, x[:6], y[:6])
