"""A trainer's model judged on held-out batches: right numbers, and training goes on untouched."""

from __future__ import annotations

import math
import random
import tempfile
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal

torch.manual_seed(0)
X, Y = torch.randn(22, 6), torch.randint(3, (22,))
HELD_OUT = [(X[:9], Y[:9]), (X[9:18], Y[9:18]), (X[18:], Y[18:])]  # the last batch is shorter


class Net(nn.Module):
    """Dropout, batch norm, and a buffer that is written to in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4))
        self.last = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.first(x))


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-2)


def plain(**options: Any) -> Any:
    torch.manual_seed(1)
    decoupled = dni_fx.decouple(
        Net(), ["first"], example_inputs=(X[:8],), context=dni_fx.one_hot(3)
    )
    return options.pop("kind", dni_fx.Trainer)(
        decoupled, F.cross_entropy, optimizer=adam, synthesizer_optimizer=adam, **options
    )


EXECUTORS: dict[str, Callable[[], Any]] = {
    "in turn": plain,
    "stage by stage": lambda: plain(update="at_once"),
    "out of memory": lambda: plain(resident=1, store=tempfile.mkdtemp()),
    "looked at later": lambda: plain(check_finite="deferred"),
    "threads": lambda: plain(schedule=Threads(staleness=0)),
    "a process": lambda: plain(kind=distributed.Trainer, staleness=0),
}
executors = pytest.mark.parametrize("make", EXECUTORS.values(), ids=EXECUTORS)


def by_hand(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy over all samples at once."""
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        output = model.eval()(X)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    loss = float(F.cross_entropy(output.double(), Y))
    return loss, float((output.argmax(1) == Y).double().mean())


def settle(trainer: Any) -> None:
    """Nothing is under way, and all of the model is here."""
    trainer.drain()
    trainer.gather()


def right(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(1) == target


def train(trainer: Any, look: Callable[[Any], object]) -> dict[str, Any]:
    """Six steps, after each a look; what is then to be seen of the run."""
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    losses = []
    for _ in range(6):
        chosen = torch.randint(len(X), (8,))
        trainer.step(X[chosen], target=Y[chosen])
        trainer.drain()
        look(trainer)
        settle(trainer)
        losses.append(torch.tensor(random.random() + np.random.rand()))  # noqa: NPY002
    state = {n: t for n, t in trainer.decoupled.state_dict().items() if isinstance(t, Tensor)}
    trainer.close()
    return {**state, "drawn": torch.stack(losses), "next": torch.rand(3)}


@executors
def test_means_are_over_samples(make: Callable[[], Any]) -> None:
    trainer = make()
    for _ in range(3):
        trainer.step(X, target=Y)
    settle(trainer)
    loss, accuracy = by_hand(trainer.decoupled.model)
    found = trainer.evaluate(HELD_OUT, {"loss": F.cross_entropy, "right": right})
    assert found == {"loss": pytest.approx(loss, abs=1e-6), "right": pytest.approx(accuracy)}
    assert trainer.evaluate(HELD_OUT) == found["loss"]
    assert trainer.evaluate(HELD_OUT, right) == found["right"]
    each = [F.cross_entropy(trainer.decoupled.model.eval()(x), y) for x, y in HELD_OUT]
    over_batches = float(torch.stack(each).detach().mean())
    assert over_batches != pytest.approx(loss, abs=1e-6)  # the last batch is shorter
    trainer.close()


@executors
def test_training_goes_on_as_if_nothing_had_happened(make: Callable[[], Any]) -> None:
    loader = DataLoader(TensorDataset(X, Y), 9, shuffle=True)

    def drawn(output: Tensor, target: Tensor) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        return right(output, target)

    straight = train(make(), lambda _: None)
    looking = train(make(), lambda trainer: trainer.evaluate(loader, drawn))
    assert_bits_equal(looking, straight, "evaluated after each step")

    def carelessly(trainer: Any) -> None:
        settle(trainer)
        with torch.no_grad():
            trainer.decoupled.model.eval()(X)
        trainer.decoupled.model.train()

    careless = train(make(), carelessly)
    assert careless["model.calls"] != straight["model.calls"]


@executors
def test_modes_and_gradients_stay(make: Callable[[], Any]) -> None:
    trainer = make()
    trainer.step(X, target=Y)
    trainer.drain()
    model = trainer.decoupled.model
    frozen = model.first[1]
    frozen.eval()  # as one freezes batch norm
    before = [m.training for m in model.modules()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trainer.evaluate(HELD_OUT, right)

    def fails(output: Tensor, target: Tensor) -> Tensor:
        assert not output.requires_grad
        assert not model.training
        raise KeyError("a metric")

    with pytest.raises(KeyError):
        trainer.evaluate(HELD_OUT, fails)
    assert [m.training for m in model.modules()] == before
    assert before.count(False) == 1
    assert {n for n, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    assert all(
        torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients
    )  # type: ignore[arg-type]
    assert torch.is_grad_enabled()


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding."""


class ReadOnly(Mapping[str, Any]):
    """A mapping, and nothing else."""

    def __init__(self, **content: Any) -> None:
        self._content = content

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@executors
@pytest.mark.parametrize("kind", [dict, lambda **c: Encoding(c), ReadOnly])
def test_batches_are_any_mapping(make: Callable[[], Any], kind: Any) -> None:
    mapped, pairs = make(), make()
    batches = [kind(x=x, labels=y) for x, y in HELD_OUT]
    states = []
    for trainer, loader in ((mapped, batches), (pairs, HELD_OUT)):
        torch.manual_seed(3)
        trainer.fit(loader, progress=False)
        settle(trainer)
        states.append(trainer.decoupled.model.state_dict())
    assert_bits_equal(*states, "mappings")
    assert mapped.evaluate(batches, right) == pairs.evaluate(HELD_OUT, right)
    mapped.close()
    pairs.close()


def test_what_cannot_be_evaluated() -> None:
    trainer = plain()
    for loader, metric, says in [
        ([], right, "no batch"),
        (iter(()), None, "no batch"),
        (X, right, r"takes a loader.*decoupled\(x\).*forward\(x\)"),
        ([X], right, "a batch must be .* but is a Tensor"),
        ([UserDict(x=X)], right, r"has \['x'\]"),
        (HELD_OUT, "accuracy", "metric= must be a callable"),
        (HELD_OUT, {"a": right, "b": 3}, "'b' is 3"),
        (HELD_OUT, lambda *_: "good", "must return a number"),
        (HELD_OUT, lambda *_: None, "must return a number"),
    ]:
        with pytest.raises(DecouplingError, match=says):
            trainer.evaluate(loader, metric)
    assert math.isfinite(trainer.evaluate(HELD_OUT))
    own = trainer.evaluate([(Y, X)], right, unpack=lambda b: ((b[1],), {}, b[0]))
    assert own == trainer.evaluate([(X, Y)], right)
