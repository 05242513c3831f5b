"""What forward leaves in a helper object and makes anew in every call, as policies of reinforcement
learning do with their distribution.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.trace import tracing
from dni_fx.passes.trace.overwritten import Overwritten

from ..helpers.comparing import assert_bits_equal


class Maker:
    """Keeps what it has made last."""

    def __init__(self) -> None:
        self.made: Any = None

    def anew(self, mean: Tensor) -> Tensor:
        self.made = torch.distributions.Normal(mean, torch.ones_like(mean))
        return self.made.log_prob(torch.zeros_like(mean))

    def mixed(self, mean: Tensor) -> Tensor:
        before = mean if self.made is None else self.made.loc.detach()
        self.made = torch.distributions.Normal(mean, torch.ones_like(mean))
        return mean + before

    def asked(self, mean: Tensor) -> Tensor:
        """Of what is there only whether there is anything."""
        known, self.made = self.made is not None, mean * 2
        return mean * 2 if known else mean


class Policy(nn.Module):
    """A network with a helper at its end."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.a, self.b, self.maker, self.act = nn.Linear(6, 8), nn.Linear(8, 3), Maker(), act

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.maker, self.act)(self.b(torch.tanh(self.a(x))))


def policy(act: str) -> Policy:
    torch.manual_seed(0)
    return Policy(act)


def batches() -> list[Tensor]:
    return list(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)))


def cut(model: nn.Module, x: Tensor) -> dni_fx.Decoupled:
    return dni_fx.decouple(model, ["a"], example_inputs=(x,), gradients="exact")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


@pytest.mark.parametrize("called", [False, True])
def test_calls_in_between_neither_matter_nor_cost_traces(
    called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    original = tracing.record

    def record(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    model, plain = policy("anew"), policy("anew")
    first, *others = batches()
    if called:
        model(first)
    stages = cut(model, first)
    if called:
        assert "'made' of a helper object" in str(stages.plan)
    trainer, optimizer = dni_fx.Trainer(stages, F.mse_loss, optimizer=sgd), sgd(plain.parameters())
    for number, x in enumerate(others):
        if number == 1:
            monkeypatch.setattr(tracing, "record", record)
        model(x)  # as one collects what to learn from
        out = trainer.step(x, target=torch.zeros(5, 3)).outputs
        want = plain(x)
        optimizer.zero_grad()
        F.mse_loss(want, torch.zeros(5, 3)).backward()
        optimizer.step()
        assert_bits_equal(out, want, f"output {number}")
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bits_equal(one, other, "weights")
    assert count == 0


@pytest.mark.parametrize("act", ["mixed", "asked"])
def test_what_is_read_first_is_refused(act: str) -> None:
    model, x = policy(act), batches()[0]
    with pytest.raises(dni_fx.DecouplingError, match="forward changes 'made'"):
        cut(model, x)
    assert model.maker.made is None


def test_what_is_read_first_is_refused_after_a_call_too() -> None:
    model, x = policy("mixed"), batches()[0]
    model(x)
    kept = model.maker.made
    with pytest.raises(dni_fx.DecouplingError, match="forward changes 'made'"):
        cut(model, x)
    assert model.maker.made is kept


def test_another_type_there_is_another_graph() -> None:
    model, x = policy("asked"), batches()[0]
    model(x)
    stages = cut(model, x)
    assert_bits_equal(stages(x), model(x), "with something there")
    model.maker.made = None
    with pytest.raises(dni_fx.DecouplingError, match="forward changes 'made'"):
        stages(x)


def test_control_believed_it_is_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Overwritten, "hide", lambda self: None)
    model, (x, y, *_) = policy("mixed"), batches()
    model(x)
    stages = cut(model, x)
    model.maker.made = torch.distributions.Normal(y[:, :3], torch.ones(5, 3))
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(stages(x), model(x), "output")
