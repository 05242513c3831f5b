"""What is wrong is said in every process, and nobody hangs."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ...models.small import SHARED_STATISTICS, TIED
from ..kit import fails, train, trainer_of


def refused() -> None:
    """What is wrong before the first step is said in every process, and nobody hangs."""
    me = dist.get_rank()

    def first(*arguments: Any, **options: Any) -> None:
        train(trainer_of(*arguments, **options), 1)

    tied = "'a.weight' is used by stage_0, stage_3, which are placed on different ranks"
    fails(tied, lambda: first("zero", model=TIED.build(), placement=[0, 0, 1, 1]))
    fails("placement has 2 entries for 4 stages", lambda: first(placement=[0, 1]))
    fails("gives rank 1 nothing to do", lambda: first(placement=[0, 0, 0, 0]))
    fails("names rank 2, but there are ranks 0 to 1", lambda: first(placement=[0, 1, 2, 0]))
    fails("no stage: 'stage_9'", lambda: first(placement={"stage_9": 0}))
    fails("leaves out stage_1, stage_2, stage_3", lambda: first(placement={"stage_0": 0}))
    fails(
        "at least one rank for each stage, and none twice",
        lambda: first(placement=[0, [1, 1], 0, 0], staleness=0),
    )
    fails("pass staleness=", lambda: first(placement=[0, [0, 1], 0, 0]))
    fails("rank 1 has another plan than rank 0", lambda: first(cuts=["a", "b" if me else "c"]))
    fails(
        "rank 1 has another placement than rank 0",
        lambda: first(placement=[0, 1, 1, 1] if me else [0, 0, 1, 1]),
    )
    fails("rank 1 has another queue, policy, staleness or discount", lambda: first(queue=2 + me))
    fails(
        "a batch of 1 has no row for each of 2 ranks",
        lambda: train(trainer_of("zero", placement=[0, [0, 1], 1, 1], staleness=0), 1, sizes=(1,)),
    )
    fails("dni_fx.Trainer", lambda: first(schedule="threads"))
    fails("timeout must be", lambda: first(timeout=0))


def refused_buffers() -> None:
    """Statistics that several ranks would keep apart."""
    model = SHARED_STATISTICS.build()
    fails(
        "different ranks", lambda: train(trainer_of("zero", model=model, placement=[0, 0, 1, 1]), 1)
    )


def four_ranks_need_four_stages() -> None:
    fails(
        "there are 4 processes, but only 2 stages: cut into more",
        lambda: train(trainer_of(cuts=["a"]), 1),
    )


TWO = [refused, refused_buffers]


FOUR = [four_ranks_need_four_stages]
