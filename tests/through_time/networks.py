"""Two networks that talk, an episode for them, and backpropagation through both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.networks import Collection, Link, Member
from dni_fx.recurrent import ThroughTime, decouple_through_time

from ..helpers.optimisers import adam

BATCH, FEATURES, LENGTH = 6, 3, 8


MESSAGE = 4


class Eye(nn.Module):
    """Looks at a stream, tells something of each window and sends a message at its end."""

    def __init__(self, inputs: int = FEATURES) -> None:
        super().__init__()
        self.core, self.head, self.say = nn.LSTM(inputs, 5), nn.Linear(5, 2), nn.Linear(5, MESSAGE)

    def forward(self, x: Tensor, state: Any) -> tuple[dict[str, Tensor], Any]:
        hidden, state = self.core(x, state)
        return {"y": self.head(hidden[-1]), "message": torch.tanh(self.say(hidden[-1]))}, state


class Judge(nn.Module):
    """Judges by messages."""

    def __init__(self, inputs: int = MESSAGE) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(inputs, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self.core(x, state)
        return self.head(hidden[-1]), state


def loss_of(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(output["y"] if isinstance(output, dict) else output, target)


def trainer_of(
    model: nn.Module, window: int, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    options = {"loss": loss_of, "optimizer": adam, **options}
    return decouple_through_time(model, window, gradients=gradients, **options)


def eye_trainer(
    eye: nn.Module, window: int = 2, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    return trainer_of(eye, window, gradients, messages=("message",), **options)


def judge_trainer(
    judge: nn.Module, window: int = 2, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    return trainer_of(judge, window, gradients, input_gradients=True, **options)


def mixed(message: Any, state: Any = "zero") -> dict[str, Any]:
    """Gradients of an :class:`Eye`."""
    return {"message": message, "next_0": state, "next_1": state}


def pair(gradients: Any = "exact", **options: Any) -> tuple[Eye, Judge, Collection]:
    """An eye with windows of 2, and a judge that ticks and updates half as often."""
    eye, judge = Eye(), Judge()
    collection = Collection(
        {
            "eye": eye_trainer(eye, gradients=gradients, **options),
            "judge": Member(judge_trainer(judge), every=2),
        },
        [Link("eye", "message", "judge")],
    )
    return eye, judge, collection


def episode(seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """A stream and the targets of both networks at every tick."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, BATCH, n, generator=generator) for n in (FEATURES, 2, 2))  # type: ignore[return-value]


def play(collection: Collection, seed: int, length: int = LENGTH) -> list[dict[str, Any]]:
    """One sequence."""
    x, y, z = episode(seed, length)
    return [
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]}, done=t + 1 == length)
        for t in range(length)
    ]


def twins(*models: nn.Module) -> tuple[list[Any], torch.optim.Optimizer]:
    """Copies, and one optimiser for all."""
    copies = [copy.deepcopy(model) for model in models]
    return copies, adam([p for m in copies for p in m.parameters()])


def learn(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same(ours: Mapping[str, nn.Module] | list[Any], theirs: list[Any]) -> bool:
    """Bit for bit."""
    a = [p for m in (ours.values() if isinstance(ours, Mapping) else ours) for p in m.parameters()]
    return all(map(torch.equal, a, [p for m in theirs for p in m.parameters()]))


def assert_close(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    for mine, model in zip(ours, theirs, strict=True):
        for (name, a), b in zip(mine.named_parameters(), model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15), f"{name}: {(a - b).abs().max()}"


def cut(state: Any, zero: bool) -> Any:
    """A state as the next window gets it: without its graph where its gradient is zero."""
    return tuple(s.detach() for s in state) if zero and state is not None else state
