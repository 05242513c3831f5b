"""Messages that are not exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dni_fx.networks import Collection, Link

from .networks import (
    BATCH,
    LENGTH,
    MESSAGE,
    Eye,
    Judge,
    cut,
    episode,
    eye_trainer,
    judge_trainer,
    learn,
    loss_of,
    mixed,
    pair,
    play,
    same,
    twins,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def test_with_zero_messages_the_sender_learns_from_its_own_loss_only() -> None:
    eye, judge, collection = pair("zero")
    copies, optimizer = twins(eye)
    start = copy.deepcopy(judge)
    for seed in range(2):
        x, y, _ = episode(seed)
        play(collection, seed)
        state = None
        for t in range(1, LENGTH, 2):
            output, state = copies[0](x[t - 1 : t + 1], cut(state, True))
            learn(optimizer, loss_of(output, y[t]))
        assert same([eye.core, eye.head], [copies[0].core, copies[0].head])
    assert same([eye], copies)  # nothing has told the message anything
    assert not same([judge], [start])


def test_the_target_of_a_source_is_the_exact_gradient() -> None:
    """With models that stand still a linear source with a bias is fitted until it tells the
    gradient.
    """

    def still(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    eye, judge = Eye(), nn.Linear(MESSAGE, 2)
    sources = lambda p: torch.optim.Adam(p, 0.03)  # noqa: E731
    trainer = eye_trainer(
        eye,
        window=1,
        gradients=mixed("linear"),
        optimizer=still,
        synthesizer_optimizer=sources,
        metrics_every=1,
    )
    collection = Collection(
        {"eye": trainer, "judge": judge_trainer(judge, window=1, optimizer=still)},
        [Link("eye", "message", "judge")],
    )
    for _ in range(40):
        play(collection, 0, length=2)
    early = collection.tick(
        {"eye": episode(0)[0][0]}, {"eye": torch.ones(BATCH, 2), "judge": torch.ones(BATCH, 2)}
    )
    assert early["eye"].interfaces["message"].cosine > 0
    # The gradient of a squared error is linear in the message where the target is the same for all.
    x = episode(0)[0]
    for _ in range(400):
        for t in range(2):
            collection.tick(
                {"eye": x[t]},
                {"eye": torch.ones(BATCH, 2), "judge": torch.ones(BATCH, 2)},
                done=t == 1,
            )
    reports = collection.tick(
        {"eye": x[0]}, {"eye": torch.ones(BATCH, 2), "judge": torch.ones(BATCH, 2)}
    )
    report = reports["eye"].interfaces["message"]
    assert report.explained > 0.99
    assert report.reference == "bootstrapped"


@pytest.mark.parametrize("source", ["auto", "linear", "mlp", "stale", "zero"])
def test_senders_do_not_wait(source: str) -> None:
    _, judge, collection = pair(mixed(source))
    reports = [set(r) for seed in range(2) for r in play(collection, seed)]
    assert (
        reports
        == [{n for n, k in (("eye", 2), ("judge", 4)) if t % k == 0} for t in range(1, 9)] * 2
    )
    assert collection.members["eye"].trainer.drain() == 0  # everything was answered
    assert all(p.grad is not None for p in judge.parameters())


def test_gradients_count_as_the_receivers_mean_loss_does() -> None:
    """A receiver that accumulates sends the gradient of its loss; a sender that does takes its
    share.
    """
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        eye, judge = Eye(), Judge()
        sgd = lambda p: torch.optim.SGD(p, 0.0)  # noqa: E731
        trainer = eye_trainer(
            eye, window=1, gradients=mixed("linear"), accumulate=accumulate, optimizer=sgd
        )
        receiver = judge_trainer(judge, window=1, accumulate=2, optimizer=sgd)
        collection = Collection(
            {"eye": trainer, "judge": receiver}, [Link("eye", "message", "judge")]
        )
        play(collection, 0, length=2)
        found.append(trainer.sources["message"].source.scale.item())  # type: ignore[union-attr,operator]
    assert found[0] == pytest.approx(2 * found[1], rel=1e-12)
    assert found[0] > 0
