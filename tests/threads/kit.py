"""Small models on threads, and what is compared of a trainer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.schedules import Schedule

from ..helpers import oracles

CUTS = ["a", "b", "c"]


SECONDS = 20  # a test that takes longer is taken for a deadlock


class Skips(nn.Module):
    """Four stages; what the first sends is used in the second and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.c(self.b(h).relu())
        return self.d(torch.cat([k.relu(), h], 1))


class Towers(nn.Module):
    """Two towers and a head; the middle stage sends two values, one of them to both later stages."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(12, 16)
        self.c, self.d = nn.Linear(32, 16), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x).relu()
        joined = self.c(torch.cat([left, right], 1)).relu()
        return self.d(torch.cat([joined, left, right], 1))


MODELS: dict[str, type[nn.Module]] = {"skips": Skips, "towers": Towers}


MADE: list[dni_fx.Trainer] = []


def stage_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dni_fx")]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 12, generator=generator), torch.randint(
        5, (size,), generator=generator
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def trainer_of(
    schedule: str | Schedule,
    gradients: Any = "linear",
    model: nn.Module | None = None,
    inputs: Any = None,
    **options: Any,
) -> dni_fx.Trainer:
    decoupled = dni_fx.decouple(
        built() if model is None else model, options.pop("cuts", CUTS), example_inputs=(batch(0)[0],),
        gradients=gradients, inputs=inputs, context=dni_fx.one_hot(5), check=False,
    )  # fmt: skip
    loss = options.pop("loss", F.cross_entropy)
    trainer = dni_fx.Trainer(decoupled, loss, optimizer=adam, schedule=schedule, **options)
    MADE.append(trainer)
    return trainer


def train(
    trainer: dni_fx.Trainer, steps: int, first: int = 0, pause: float = 0.0
) -> dni_fx.Trainer:
    for step in range(first, first + steps):
        x, y = batch(step, 5 if step % 3 == 2 else 8)
        trainer.step(x, target=y)
        if pause:
            time.sleep(pause)
    trainer.drain()
    return trainer


def record(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """Weights, buffers, sources and the states of all optimisers."""
    state = trainer.state_dict()
    return copy.deepcopy(
        {n: state[n] for n in ("decoupled", "optimizers", "synthesizer_optimizers", "steps")}
    )


def largest_difference(a: Any, b: Any) -> float:
    left, right = (dict(oracles.named_leaves(x)) for x in (a, b))
    pairs = [
        (v, right[n])
        for n, v in left.items()
        if isinstance(v, Tensor) and v.is_floating_point() and v.numel()
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


def built(model: type[nn.Module] = Skips) -> nn.Module:
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    return model()


def slow(name: str, seconds: float) -> nn.Module:
    """A model one of whose modules takes long."""
    model = built()
    model.get_submodule(name).register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def counts(trainer: dni_fx.Trainer) -> list[int]:
    """Updates of each stage."""
    assert trainer._crew is not None
    return [w.updates for w in trainer._crew.workers.values()]


def run_script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=SECONDS,
        env=os.environ | environment,
    )  # fmt: skip


def fails_once(trainer: dni_fx.Trainer) -> BaseException:
    with pytest.raises(DecouplingError) as caught:
        train(trainer, 6)
    assert stage_threads() == []
    return caught.value
