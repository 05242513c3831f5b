"""One clear error, and nothing has changed: how both are asserted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam
from ..helpers.refusing import refused
from ..models.feedforward import mlp_chain, norm_dropout_chain

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1])


def everything(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """Parameters, buffers, ``.grad``, sources with their extra state, optimisers, random states,
    modes, steps.
    """
    decoupled = trainer.decoupled
    optimizers = [*trainer.optimizers.values(), *trainer.synthesizer_optimizers.values()]
    return {
        "state": state_of(decoupled),
        "whole state": {
            k: v.clone() if isinstance(v, Tensor) else v for k, v in decoupled.state_dict().items()
        },
        "gradients": {
            n: None if p.grad is None else p.grad.clone() for n, p in decoupled.named_parameters()
        },
        "optimizers": [_copied(o.state_dict()) for o in optimizers],
        "random": [torch.get_rng_state(), list(random.getstate()[1])],
        "modes": [m.training for m in decoupled.modules()],
        "requires_grad": [p.requires_grad for p in decoupled.parameters()],
        "steps": trainer.steps,
        "global": [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")],
    }


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def refused_step(
    error: type[BaseException], trainer: dni_fx.Trainer, call: Callable[[], Any], *words: str
) -> str:
    """The same, and the trainer, its model, sources, optimisers and random states keep every bit.

    Only gradients of a finished update may be gone, as after ``zero_grad``: all of them, or none.
    """
    before = everything(trainer)
    text = refused(error, call, *words)
    after = everything(trainer)
    if trainer.steps % trainer.accumulate == 0 and not any(
        g is not None for g in after["gradients"].values()
    ):
        before["gradients"] = dict.fromkeys(before["gradients"])
    assert_bits_equal(after, before, "state after the error")
    return text


def decouple(
    cuts: Any = ("1", "3"), model: nn.Module | None = None, **options: Any
) -> dni_fx.Decoupled:
    options.setdefault("example_inputs", (X,))
    return dni_fx.decouple(
        model if model is not None else mlp_chain(), cuts, check=False, **options
    )


def make_trainer(
    gradients: Any = "linear", *, warm: int = 2, model: nn.Module | None = None, **options: Any
) -> dni_fx.Trainer:
    decoupled = decouple(("2", "5"), model or norm_dropout_chain(), gradients=gradients)
    trainer = dni_fx.Trainer(decoupled, options.pop("loss", F.mse_loss), optimizer=adam, **options)
    for _ in range(warm):
        trainer.step(X, target=torch.randn(4, 3))
    return trainer


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.encoder(x)).relu())
