"""Batches of every size, batches of nan, and the drop-in as a part of something larger."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dni_fx.errors import PlanMismatchError

from ..helpers.training import ONE_HOT, batch, decoupled_of
from ..models.small import CHAIN, Chain
from .kit import decoupled_chain, loop, made, same, state


@pytest.mark.parametrize("gradients", ["linear", "local", "stale", "mlp", "zero"])
def test_batches_of_other_sizes(gradients: str) -> None:
    m = made(gradients)
    for step, size in enumerate((8, 5, 16, 2, 8)):
        loop(m, 1, step, size=size)
    assert all(p.isfinite().all() for p in m.parameters())
    with pytest.raises(PlanMismatchError, match="empty batch"):
        m(torch.zeros(0, 6))


@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_a_batch_of_one(gradients: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    m: Any = decoupled_of(gradients, model=model, cuts=["1", "3"]).as_module()
    loop(m, 2)
    loop(m, 1, size=1)
    assert m[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("gradients", ["linear", "mlp", "local", "stale", "zero"])
def test_a_batch_of_nan_spoils_no_source(gradients: str) -> None:
    m = made(gradients)
    loop(m, 2)
    before = {n: t for n, t in state(m).items() if n.startswith("sources.")}
    stale = copy.deepcopy(m.synthesizer_state_dict())
    x, y = batch(3)
    m.zero_grad()
    with m.context(y):
        F.cross_entropy(m(x * torch.nan), y).backward()
    assert m[3].weight.grad.isnan().any()  # as without cuts: the loop decides
    after = state(m)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    for name, value in stale["synthesizers"].items():
        if not isinstance(value, Tensor):
            now = m.synthesizer_state_dict()["synthesizers"][name]
            assert all(map(torch.equal, now["messages"], value["messages"]))


def test_dropout_is_reproducible() -> None:
    a, b = made(dropout=0.4), made(dropout=0.4)
    loop(a, 3)
    loop(b, 3)
    assert same(state(a), state(b))
    plain = Chain(0.4)
    plain.load_state_dict(a.state_dict())
    torch.manual_seed(5)
    first = plain(batch(0)[0])
    torch.manual_seed(5)
    with a.context(batch(0)[1]):
        assert torch.equal(a(batch(0)[0]), first)  # sources draw no random numbers


def test_learning_is_worth_it() -> None:
    m = made("local")
    x, y = batch(0, 64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(m.parameters(), 0.02)
    losses = []
    for _ in range(60):
        with m.context(y):
            loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_inputs_that_need_gradients() -> None:
    """What the module sends back before itself is what the first source says, and what the last
    stage knows.
    """
    torch.manual_seed(0)
    first = nn.Linear(6, 6)
    m, (x, y) = made("local"), batch(0)
    with m.context(y):
        F.cross_entropy(m(first(x)), y).backward()
    assert first.weight.grad is not None
    assert first.weight.grad.any()
    m, decoupled = made("local"), decoupled_chain("local")
    leaf, trainer_leaf = (x.clone().requires_grad_() for _ in range(2))
    with m.context(y):
        F.cross_entropy(m(leaf), y).backward()
    decoupled.stages[0].step(decoupled.bind(trainer_leaf), ONE_HOT(y))
    assert torch.equal(leaf.grad, trainer_leaf.grad)


def test_exact_sends_back_true_gradients() -> None:
    m, plain, (x, y) = made("exact"), CHAIN.build(), batch(0)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(m(a), y).backward()
    F.cross_entropy(plain(b), y).backward()
    assert torch.equal(a.grad, b.grad)


class Wrapped(nn.Module):
    """A module behind an activation checkpoint, or not."""

    def __init__(self, inner: nn.Module, memory: bool) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.memory else self.inner(x)  # type: ignore[return-value]


def test_activation_checkpointing_inside_a_stage() -> None:
    found = []
    for memory in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(
                Wrapped(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)), memory)
                for _ in range(3)
            ),
            nn.Linear(6, 3),
        )
        m: Any = decoupled_chain("local", model=model).as_module()
        loop(m, 3)
        found.append(list(m.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
