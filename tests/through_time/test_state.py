"""The state between windows: carried, reported, taken, saved, and never changed behind anybody's
back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.graphs.nested import flatten, map_tensors
from dni_fx.recurrent import decouple_through_time
from dni_fx.sources import Prediction

from .kit import (
    BATCH,
    CASES,
    LAYERED,
    WINDOW,
    Constant,
    LSTMStep,
    Whole,
    by_steps,
    full,
    ready,
    same,
    sequence,
    stacked,
    train_windows,
    trainer,
    unchanged,
    windows,
)


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
