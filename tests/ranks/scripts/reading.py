"""Losses that read parameters of stages on other ranks."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...helpers.comparing import assert_bits_equal
from ...models.small import TOWERS
from ..kit import train, trainer_of, weights


def losses_that_read_other_ranks() -> None:
    """Refused by name, where the loss is; the other rank hears of it."""
    for gradients in ("linear", "exact"):
        model = TOWERS.build()

        def penalised(output: Tensor, target: Tensor, model: nn.Module = model) -> Tensor:
            penalty = [p.pow(2).sum() for p in model.parameters()]
            return F.cross_entropy(output, target) + sum(penalty)

        trainer, said = trainer_of(gradients, model=model, loss=penalised), "nothing"
        try:
            train(trainer, 6)
        except Exception as error:
            said = str(error)
        assert "the loss reads parameter 'a.weight' of stage_0" in said, said
        assert said.startswith("rank 1 failed: ") == (dist.get_rank() == 0), said


def losses_that_read_their_own_rank() -> None:
    """The control: a penalty on what this process trains is the one of a single process."""
    found = []
    for alone in (False, True):
        model = TOWERS.build()

        def penalised(output: Tensor, target: Tensor, model: nn.Module = model) -> Tensor:
            penalty = model.get_submodule("d").weight.pow(2).sum()  # type: ignore[operator,union-attr]
            return F.cross_entropy(output, target) + penalty

        options = {} if alone else {"staleness": 0}
        trainer = trainer_of("linear", alone=alone, model=model, loss=penalised, **options)
        found.append(weights(train(trainer, 5)))
    assert_bits_equal(found[0], found[1], "a penalty on the last stage")


TWO = [losses_that_read_other_ranks, losses_that_read_their_own_rank]
