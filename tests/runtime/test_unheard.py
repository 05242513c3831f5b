"""Gradients that nobody hears of are not computed, and nothing else changes by that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import dni_fx
from dni_fx.passes.cut import expecting

HEADS = ["local", "critic", "distill"]


class Again(nn.Module):
    """Its block gets no gradient at all where its input asks for none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[assignment]
        return found.relu()


def _chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def _images() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4, 4))


def _batch(shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(8, *shape, generator=draws), torch.randint(4, (8,), generator=draws)


def _trainer(model: nn.Module, source: str, shape: tuple[int, ...], every: int) -> Any:
    torch.manual_seed(2)
    decoupled = dni_fx.decouple(
        copy.deepcopy(model),
        cuts=["0", "1", "2"],
        example_inputs=(_batch(shape)[0],),
        gradients=source,
        context=dni_fx.one_hot(4),
    )
    return dni_fx.Trainer(
        decoupled,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-3),
        metrics_every=every,
    )


def _trained(trainer: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    for seed in range(6):
        x, y = _batch(shape, seed)
        trainer.step(x, target=y)
    return dict(trainer.decoupled.state_dict())


def _products(trainer: Any, shape: tuple[int, ...]) -> int:
    """Of matrices, without a bias, in the second step."""
    x, y = _batch(shape)
    trainer.step(x, target=y)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.step(x, target=y)
    return sum(event.name == "aten::mm" for event in found.events())


@pytest.mark.parametrize("source", HEADS)
@pytest.mark.parametrize(("make", "shape"), [(_chain, (16,)), (_images, (4, 8, 8))])
def test_heads_train_bit_for_bit_without_gradients_of_inputs(
    source: str, make: Any, shape: tuple[int, ...]
) -> None:
    model = make()
    every = _trained(_trainer(model, source, shape, 1), shape)
    seldom = _trained(_trainer(model, source, shape, 1000), shape)
    assert all(torch.equal(seldom[n], t) for n, t in every.items())
    assert any(not torch.equal(seldom[n], t) for n, t in model.state_dict(prefix="model.").items())


@pytest.mark.parametrize(("source", "less"), [*((s, True) for s in HEADS), ("linear", False)])
def test_less_is_computed_where_nobody_hears(source: str, less: bool) -> None:
    every, seldom = (_products(_trainer(_chain(), source, (16,), n), (16,)) for n in (1, 1000))
    assert every - seldom == (3 if less else 0)  # one for each stage but the first


def test_what_needs_a_gradient_of_its_input_to_learn_gets_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    again = nn.Sequential(Again(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(16, 16), again, nn.Linear(16, 16), nn.Linear(16, 4))
    every = _trained(_trainer(model, "local", (16,), 1), (16,))
    seldom = _trained(_trainer(model, "local", (16,), 1000), (16,))
    assert all(torch.equal(seldom[n], t) for n, t in every.items())
    # Control: taken for one of torch's own, it is not trained.
    monkeypatch.setattr(expecting, "_may_ask", lambda trace, node: False)
    with pytest.warns(UserWarning, match="Gradients will be None"):
        lost = _trained(_trainer(model, "local", (16,), 1000), (16,))
    assert any(not torch.equal(lost[n], t) for n, t in every.items())


def test_a_last_stage_that_is_frozen_still_has_a_loss_to_pull_back() -> None:
    model = _chain()
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    every = _trained(_trainer(model, "local", (16,), 1), (16,))
    seldom = _trained(_trainer(model, "local", (16,), 1000), (16,))
    assert all(torch.equal(seldom[n], t) for n, t in every.items())
