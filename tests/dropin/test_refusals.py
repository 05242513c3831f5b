"""What the drop-in refuses, with the next step in the error; and that a step keeps no memory."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import Corrected, GradientSource, Mix, Prediction

from ..helpers.optimisers import sgd
from ..helpers.training import batch, decoupled_of
from ..models.small import SKIPS, Chain
from .kit import Mean, decoupled_chain, loop, made, same, state


class Listens(Mean):
    message = "gradient+loss"


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ("delayed", "Delayed.*waits"),
        ("critic", "Critic.*loss"),
        ("sobolev", "Sobolev.*loss"),
        ("distill", "Distill.*logits"),
        ("feedback", "Feedback.*error"),
        ("corrected", "Corrected.*waits"),
        (partial(Mix, source="linear"), "Mix.*waits"),
        (partial(Corrected, source="linear"), "Corrected.*waits"),
        (Listens, "Listens.*loss"),
    ],
)
def test_sources_that_are_refused(gradients: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        made(gradients)
    late = decoupled_chain(gradients, example_inputs=None).as_module()  # traced at the first call
    with pytest.raises(DecouplingError, match=words):
        late(batch(0)[0])


def test_an_optimiser_of_others_parameters_is_refused() -> None:
    """As by a trainer: it would step them once for every source."""
    decoupled = decoupled_chain("linear")
    m = decoupled.as_module(lambda _: torch.optim.SGD(decoupled.model.parameters(), 0.1))
    with pytest.raises(DecouplingError, match="synthesizer_optimizer= returned an optimiser for"):
        m(batch(0)[0])


def test_other_refusals() -> None:
    with pytest.raises(DecouplingError, match="leave out inputs="):
        decoupled_chain("linear", inputs="linear").as_module()
    with pytest.raises(DecouplingError, match="for each of 2 consumers"):
        decoupled_of("each:linear", SKIPS).as_module()
    for unit in (0, -1.0, float("nan"), "1", lambda: None):
        m = made(unit=unit)
        with pytest.raises(DecouplingError, match="unit="), m.context(batch(0)[1]):
            m(batch(0)[0])
    m = made(synthesizer_optimizer=lambda _: None)
    with pytest.raises(DecouplingError, match="synthesizer_optimizer="):
        m(batch(0)[0])
    model = Chain()
    model.forward = partial(Chain.forward, model)  # type: ignore[method-assign]
    with pytest.raises(DecouplingError, match="forward was replaced"):
        decoupled_chain(model=model).as_module()


@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_a_context_that_is_missing(gradients: str) -> None:
    m = made(gradients)
    before = state(m)
    with pytest.raises(DecouplingError, match=r"with m\.context"):
        m(batch(0)[0])
    assert torch.is_grad_enabled()
    assert same(
        {n: t for n, t in state(m).items() if "norm" not in n},
        {n: t for n, t in before.items() if "norm" not in n},
    )
    loop(m, 1)
    with pytest.raises(ValueError, match="inside"), m.context(batch(0)[1]):
        raise ValueError("inside")
    with pytest.raises(DecouplingError, match=r"with m\.context"):
        m(batch(0)[0])


def test_traced_at_the_first_call() -> None:
    m: Any = decoupled_chain("linear", example_inputs=None).as_module()
    assert m.eval()(batch(0)[0]).shape == (8, 3)
    m.train()
    loop(m, 2)
    other = made("linear")
    loop(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), other.parameters(), strict=True))


def test_a_trainer_before_leaves_no_unit() -> None:
    decoupled = decoupled_chain("local")
    dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd, accumulate=4)
    m: Any = decoupled.as_module()
    loop(m, 2)
    other = made("local")
    loop(other, 2)
    assert same(state(m), state(other))


class Probe(GradientSource):
    """Counts how often it is asked, and what is alive then."""

    message = "gradient"

    def __init__(self, specs: tuple[TensorSpec, ...], context: TensorSpec | None = None) -> None:
        super().__init__(specs, context)
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Callable[[], Any]] = []

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        guess = values[0] * self.weight
        self.seen.append(weakref.ref(guess))
        return Prediction((guess.detach().clone(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(prediction.state, message[0])


def test_what_sources_computed_is_not_kept() -> None:
    decoupled, (x, y) = decoupled_chain(Probe), batch(0)
    m: Any = decoupled.as_module()
    sources: Any = list(decoupled.sources.values())
    gc.disable()
    try:
        with m.context(y):
            output = m(x)
        assert all(len(s.seen) == 1 and s.seen[0]() is None for s in sources)
        F.cross_entropy(output, y).backward()
        assert all(len(s.seen) == 2 for s in sources)
        assert all(s.weight.grad is None for s in sources)
        assert sources[-1].weight.any()
    finally:
        gc.enable()


def test_no_warnings_in_a_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(made("mlp", 0.1), 1)
