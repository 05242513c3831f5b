"""Bad windows, states, models and options: one error, nothing changed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.recurrent import decouple_through_time

from .kit import WINDOW, LSTMStep, Nested, nested_start, ready, sequence, trainer, unchanged


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
        torch.full((4,), torch.nan),
        [True] * 3,
        2,
        "yes",
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

    class Whole(nn.GRUCell):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
            h = x.new_zeros(x.shape[1], 2) if state is None else state
            outputs = [h := super(Whole, self).forward(step, h) for step in x]
            return torch.stack(outputs), h

    said = r"a single step of shape \(4, 3\).*pass unroll=False if it takes whole windows, or pass"
    with pytest.raises(DecouplingError, match=said):
        trainer(Whole(3, 2), {}).step(torch.randn(3, 4, 3))


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
        ({"cuts": "rnn"}, r"cuts='rnn': pass a list of names, cuts=\['rnn'\]"),
        ({"cuts": [1]}, r"cuts=\[1\]: pass a list of names"),
        ({"messages": "out"}, r"messages='out': pass a list of names"),
        ({"context": 3}, "context= must be a callable, or None, but is 3"),
        ({"initial_state": torch.zeros(1)}, "initial_state= must be a callable"),
        ({"unroll": "yes"}, "unroll='yes': expected True, False or None"),
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


def test_what_only_whole_sequences_tell_is_not_offered() -> None:
    """The true gradient at the end of a window depends on all windows after it."""
    made, _, _ = ready()
    for name in ("true_gradients", "diagnose", "diagnose_parameters"):
        assert hasattr(dni_fx.Trainer, name)
        assert not hasattr(made, name)


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


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_sequence_without_a_batch_is_named(batch_first: bool, held: bool) -> None:
    core = nn.LSTM(3, 5, batch_first=batch_first)
    model: nn.Module = nn.Sequential(nn.Linear(3, 3), Outputs(core)) if held else core
    made = trainer(model, {})
    x = torch.randn(WINDOW, 3)
    with pytest.raises(
        DecouplingError, match=r"LSTM was given \(3, 3\), .* x\.unsqueeze"
    ) as caught:
        made.step(x, target=torch.zeros(WINDOW, 5))
    dim = int(str(caught.value).split("unsqueeze(")[1][0])
    batched = x.unsqueeze(dim)  # as it says
    target = torch.zeros(*batched.shape[:2], 5)
    assert made.step(batched, target=target).outputs.shape == target.shape


class Outputs(nn.Module):
    """Of a recurrent module, without its state."""

    def __init__(self, core: nn.LSTM) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x)[0]
