"""What the tests of sources inside the trainer share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import dni_fx
from dni_fx.schedules import Mode, Schedule


def noted(trainer: dni_fx.Trainer, stage: int, seen: dict[str, Tensor]) -> None:
    """Keep the gradients that a stage steps with."""
    module: Any = trainer.decoupled.model[stage]
    trainer.optimizers[f"stage_{stage}"].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    )


class Fixed(Schedule):
    """Modes in turn, whatever the step."""

    def __init__(self, *modes: Mode) -> None:
        self.modes = modes

    def mode(self, step: int, stages: int) -> Mode:
        return self.modes[step % len(self.modes)]
