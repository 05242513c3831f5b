"""``trainer.evaluate`` while most stages are out of memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam
from ..helpers.training import batch, record, state, train, trainer_of
from ..models.small import CHAIN

METRICS = {
    "loss": CHAIN.loss,
    "right": lambda output, y: output.argmax(1) == y,
    "first": lambda output, y: output[:, 0],
}
BATCHES = [batch(50 + k, 8) for k in range(5)]


class Counting(nn.Sequential):
    """Each part counts its calls, in evaluation, too, and adds the count."""

    def __init__(self) -> None:
        super().__init__(*(_Counted() for _ in range(3)), nn.Linear(6, 3))


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls[0]


def watch(trainer: Any) -> list[int]:
    """How many stages are in memory whenever one has come there."""
    residency, seen = trainer.beside.executor.residency, []
    come = residency._come

    def counted(stage: int) -> None:
        come(stage)
        seen.append(4 - len(residency._away))

    residency._come = counted
    return seen


@pytest.mark.parametrize("sweep", [1, 3])
@pytest.mark.parametrize("resident", [1, 2])
def test_stages_are_visited_one_after_the_other(resident: int, sweep: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": adam}
    plain = train(trainer_of("local", **options), 3)
    options |= {"resident": resident, "sweep": sweep, "store": tmp_path}
    with contextlib.closing(train(trainer_of("local", **options), 3)) as trainer:
        trainer.evaluate(BATCHES[:1])  # the mode is traced, which needs all of the model
        train(trainer, 3)
        train(plain, 3)
        trainer.drain()
        seen = watch(trainer)
        torch.manual_seed(7)
        found = trainer.evaluate(BATCHES, METRICS)
        drawn = torch.rand(1)
        assert max(seen) == resident
        rounds = -(-len(BATCHES) // sweep)
        assert 4 * rounds - 1 <= len(seen) <= 4 * rounds + 1
        assert found == plain.evaluate(BATCHES, METRICS)  # of the model, all in memory
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(1))
        train(trainer, 3)
        assert_bits_equal(record(trainer), record(train(plain, 3)), "training goes on")
        gathered = trainer.evaluate(BATCHES, METRICS)
        assert gathered == plain.evaluate(BATCHES, METRICS)
        assert gathered != found  # the control: other weights


def test_buffers_that_evaluation_writes_to_are_put_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": adam, "model": None}
    torch.manual_seed(0)
    options["model"] = Counting()
    plain = train(trainer_of("local", **options), 2)
    torch.manual_seed(0)
    options["model"] = Counting()
    with contextlib.closing(
        train(trainer_of("local", **options, resident=1, store=tmp_path), 2)
    ) as trainer:
        trainer.evaluate(BATCHES[:1])
        train(trainer, 1)
        train(plain, 1)
        found = trainer.evaluate(BATCHES, METRICS)
        assert found == plain.evaluate(BATCHES, METRICS)
        each = [trainer.evaluate([one], METRICS)["first"] for one in BATCHES]
        assert found["first"] != sum(each) / len(each)  # the control: counts go on within a pass
        trainer.gather()
        assert_bits_equal(state(trainer), state(plain), "buffers")


def test_a_metric_that_fails_leaves_training_as_it_was(tmp_path: Path) -> None:
    plain = train(trainer_of("local", optimizer=adam), 4)
    with contextlib.closing(
        train(trainer_of("local", optimizer=adam, resident=1, store=tmp_path), 2)
    ) as trainer:
        with pytest.raises(DecouplingError, match="must return a number"):
            trainer.evaluate(BATCHES, lambda output, y: "right")
        assert all(m.training for m in trainer.decoupled.model.modules())
        train(trainer, 2)
        assert_bits_equal(record(trainer), record(plain), "training goes on")
