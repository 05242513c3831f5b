"""Ranks that do not do the same: one error on all of them, within the time, that says who."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dni_fx import distributed
from dni_fx.parallel.mailbox import ParallelError

from ...helpers.training import batch
from ...models.small import TOWERS, Towers
from .. import kit
from ..kit import fails, train, trainer_of

TIMEOUT = 5.0


def differs(message: str, run: Callable[[Any, int], Any], **options: Any) -> None:
    """Assert that every rank raises an error of ours that says so, in time."""
    trainer, began = trainer_of(timeout=TIMEOUT, **options), time.monotonic()
    fails(message, lambda: run(trainer, dist.get_rank()), ParallelError)
    took = time.monotonic() - began
    assert took < TIMEOUT + 3.0, f"{took} s"
    dist.barrier()


def another_batch() -> None:
    """In the first step, or in one of the later ones that are compared."""

    def shuffled(trainer: Any, rank: int) -> None:
        x, y = batch(rank)
        trainer.step(x, target=y)

    def shorter(trainer: Any, rank: int) -> None:
        x, y = batch(0)
        trainer.step(x[: 8 - rank], target=y[: 8 - rank])

    def target(trainer: Any, rank: int) -> None:
        trainer.step(batch(0)[0], target=batch(rank)[1])

    def second(trainer: Any, rank: int) -> None:
        for step in range(3):
            x, y = batch(step + 10 * rank * step)
            trainer.step(x, target=y)
        trainer.gather()

    said = "rank 1 got another batch than rank 0 in its first step"
    differs(f"{said}: 'x' has other values", shuffled)
    differs(f"{said}: 'x' is [('float32', (7, 6))], not [('float32', (8, 6))]", shorter)
    differs(f"{said}: 'target' has other values", target)
    differs("got another batch than rank", second)


def equal_batches() -> None:
    """The control: batches that are not a number, or not contiguous, are equal to themselves."""
    trainer = trainer_of(
        "zero", timeout=TIMEOUT, context=None, loss=lambda o, _: o.logsumexp(1).mean()
    )
    x, _ = batch(0)
    for target in (torch.tensor([float("nan")]), None, float("nan"), {"a": (1, "b")}):
        for inputs in (x, x.t().contiguous().t(), x[:, :6]):
            trainer.step(inputs, target=target)
    trainer.close()


def another_count_of_steps() -> None:
    def gathered(trainer: Any, rank: int, more: int = 1) -> None:
        train(trainer, 5 + 3 * (rank == more)).gather()

    def closed(trainer: Any, rank: int) -> None:
        train(trainer, 5 + 3 * rank).close()

    def saved(trainer: Any, rank: int) -> None:
        train(trainer, 5 + 3 * rank).save(kit.OUT / "unequal")

    def far(trainer: Any, rank: int) -> None:
        train(trainer, 5 + 40 * rank).gather()

    said = "rank 0 made fewer steps than rank 1: it called gather() after 5"
    differs(said, gathered)
    differs(said, far)
    differs("rank 1 made fewer steps than rank 0", lambda trainer, rank: gathered(trainer, rank, 0))
    differs("rank 0 made fewer steps than rank 1: it called close() after 5", closed)
    differs("rank 0 made fewer steps than rank 1: it called save() after 5", saved)
    differs(said, gathered, gradients="exact")
    differs(said, gathered, staleness=2)
    differs(said, gathered, policy="drop_oldest", inputs="mlp")
    assert not (kit.OUT / "unequal").exists()


def another_call() -> None:
    def calls(*names: str) -> Callable[[Any, int], None]:
        def run(trainer: Any, rank: int) -> None:
            train(trainer, 3)
            if names[rank] == "nothing":
                time.sleep(TIMEOUT + 1.0)
                trainer.process.mail.check()
            elif names[rank] == "save":
                trainer.save(kit.OUT / "alone")
            else:
                getattr(trainer, names[rank])()

        return run

    both = "both after 3 steps: every process must make the same calls"
    differs(both, calls("gather", "close"))
    differs(both, calls("save", "gather"))
    for name in ("close", "save"):
        differs(f"rank 1's own call of {name}() did not come within 5 s", calls(name, "nothing"))
    assert not list((kit.OUT / "alone").glob("step-*"))


def another_model_or_plan() -> None:
    rank = dist.get_rank()
    x = batch(0)[0]
    fails(
        "rank 1 cannot cut its model as rank 0 does",
        lambda: distributed.decouple(
            Towers() if rank == 0 else nn.Linear(6, 3), stages=2, example_inputs=(x,)
        ),
    )
    model = TOWERS.build()
    if rank == 1:
        model.register_buffer("more", torch.zeros(3))
    differs("rank 1 has another model than rank 0", lambda t, _: train(t, 1), model=model)
    differs(
        "rank 1 has another number of steps than rank 0",
        lambda trainer, rank: (setattr(trainer, "steps", rank), train(trainer, 1)),
    )


def the_loss_on_every_rank() -> None:
    """That of the last stage's newest batch, and the stages of all ranks in the table."""
    for options in ({"staleness": 0}, {"staleness": 2}, {}):
        trainer, losses = trainer_of("linear", **options), []  # type: ignore[arg-type]
        for step in range(6):
            x, y = batch(step)
            losses.append(trainer.step(x, target=y).loss.item())
        trainer.gather()
        x, y = batch(6)
        losses.append(trainer.step(x, target=y).loss.item())
        every: list[Any] = [None, None]
        dist.all_gather_object(every, losses)
        mine, truth = every
        assert mine[-1] in truth[-2:], (mine, truth)
        known = [loss for loss in mine if loss == loss]
        assert set(known) <= set(truth), (mine, truth)
        if options == {"staleness": 0}:
            assert mine[1:] == truth[1:], (mine, truth)
        assert {row["stage"] for row in trainer.status().rows} == {f"stage_{k}" for k in range(4)}
        trainer.close()


TWO = [
    another_batch,
    equal_batches,
    another_count_of_steps,
    another_call,
    another_model_or_plan,
    the_loss_on_every_rank,
]
