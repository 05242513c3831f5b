"""Sources across time: one for a state, what they learn, traces."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time
from dni_fx.sources import AcrossTime, Linear, Traces

from .kit import BATCH, WINDOW, Whole, by_steps, sequence, stacked, train_windows, trainer, windows


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
        model,
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.Adam(p, 1e-2),
        gradients=gradients,
        auxiliary=auxiliary,
        metrics_every=1,
    )
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
        model,
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, 0.0),
        factor=0.0,
        metrics_every=1,
        synthesizer_optimizer=lambda p: torch.optim.Adam(p, 1e-2),
    )
    for _ in range(400):
        made.step(x[:3], target=y[:3])
        report = made.step(x[3:], target=y[3:], done=False)
        made.reset()
    assert report.interfaces["next_0"].cosine > 0.99


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_traces_equal_the_weighted_regression_done_offline(decay: float) -> None:
    """The sum of online updates is that of lambda-returns, computed with all windows at hand."""
    torch.manual_seed(0)
    model, (x, y) = nn.LSTMCell(3, 2).double(), sequence(length=9)
    factor = 0.6
    made = decouple_through_time(
        model,
        WINDOW,
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, 0.0),
        factor=factor,
        gradients=functools.partial(Traces, decay=decay),
        synthesizer_optimizer=lambda p: torch.optim.SGD(p, 0.0),
    )
    pairs = windows(x, y)
    made.prepare(pairs[0][0])
    (source,) = {id(s): s for s in made.sources.values()}.values()
    traces = source.source  # type: ignore[union-attr]
    layer = traces.networks[0].layers[0]  # type: ignore[union-attr, index]
    nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    traces.scale.fill_(0.01)
    units = traces.scale.reciprocal().unbind()
    traces.rescale = lambda predicted, message: (message, units)  # units stand still
    total = {"weight": torch.zeros(4, 4).double(), "bias": torch.zeros(4).double()}
    made.decoupled.synthesizers.requires_grad_(True)

    class Summing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for n, p in (("weight", layer.weight), ("bias", layer.bias)):
                total[n] += p.grad if p.grad is not None else 0  # type: ignore[operator]

    made.synthesizer_optimizers["next_0"] = Summing(source.parameters(), 0.0)
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
