"""Three small models inside the trainer, for sources of every kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.schedules import Mode, Schedule


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(6, 3))


class Skips(nn.Module):
    """Two values cross each cut, and the last stage uses values of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a).tanh()
        c = self.c(a + b).relu()
        return self.head(a * c + b)


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in ((3, 4), (4, 6))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


MODELS: dict[str, tuple[Any, list[str], tuple[int, ...]]] = {
    "mlp": (mlp, ["0", "1", "2"], (6,)),
    "skips": (Skips, ["a", "b", "c"], (6,)),
    "conv": (conv, ["0", "1"], (3, 8, 8)),
}


def batch(shape: tuple[int, ...], step: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, *shape, generator=generator), torch.randint(
        3, (size,), generator=generator
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trainer_of(gradients: Any, model: str = "mlp", **options: Any) -> dni_fx.Trainer:
    make, cuts, shape = MODELS[model]
    inputs = options.pop("inputs", None)
    decoupled = dni_fx.decouple(
        make(), options.pop("cuts", cuts), example_inputs=(batch(shape)[0],), gradients=gradients, inputs=inputs,
        context=options.pop("context", dni_fx.one_hot(3)), check=False,
    )  # fmt: skip
    return dni_fx.Trainer(decoupled, options.pop("loss", F.cross_entropy), optimizer=sgd, **options)


def train(trainer: dni_fx.Trainer, steps: int, model: str = "mlp", first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(MODELS[model][2], step)
        trainer.step(x, target=y)


def noted(trainer: dni_fx.Trainer, stage: int, seen: dict[str, Tensor]) -> None:
    """Keep the gradients that a stage steps with."""
    module = trainer.decoupled.model[stage]
    trainer.optimizers[f"stage_{stage}"].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    )


def state(trainer: dni_fx.Trainer) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in trainer.decoupled.model.state_dict().items()}


class Fixed(Schedule):
    def __init__(self, *modes: Mode) -> None:
        self.modes = modes

    def mode(self, step: int, stages: int) -> Mode:
        return self.modes[step % len(self.modes)]
