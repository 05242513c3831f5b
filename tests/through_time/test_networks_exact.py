"""Collections with exact messages equal backpropagation through all their networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.networks import Collection, Link, Member
from dni_fx.recurrent import ThroughTime

from .networks import (
    LENGTH,
    MESSAGE,
    Eye,
    Judge,
    assert_close,
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


def joint_loss(eye: Any, judge: Any, seed: int, zero_state: bool) -> Tensor:
    """Two networks over a whole sequence, written by hand."""
    x, y, z = episode(seed)
    total, state, other, messages = torch.zeros(()), None, None, []
    for t in range(1, LENGTH, 2):
        output, state = eye(x[t - 1 : t + 1], cut(state, zero_state))
        total = total + F.mse_loss(output["y"], y[t])
        messages.append(output["message"])
        if len(messages) == 2:
            judged, other = judge(torch.stack(messages), other)
            total, messages = total + F.mse_loss(judged, z[t]), []
    return total


@pytest.mark.parametrize("state", ["exact", "zero"])
def test_exact_messages_equal_backprop_through_both_networks(state: str) -> None:
    """With a state that is exact, too, the sequence makes one update; else the eye is cut between
    its windows.
    """
    eye, judge, collection = pair(mixed("exact", state))
    copies, optimizer = twins(eye, judge)
    for seed in range(3):
        play(collection, seed)
        # The judge's two windows are held and make one update, in which the eye hears of both.
        learn(optimizer, joint_loss(copies[0], copies[1], seed, zero_state=state == "zero"))
        assert same([eye, judge], copies), f"update {seed + 1}"


def test_the_oracle_sees_an_answer_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ThroughTime.answer

    def forgetful(self: ThroughTime, gradients: Any) -> None:
        first = min(gradients)
        lost = {n: torch.zeros_like(g) for n, g in gradients[first].items()}
        answer(self, {**gradients, first: lost})

    monkeypatch.setattr(ThroughTime, "answer", forgetful)
    eye, judge, collection = pair()
    copies, optimizer = twins(eye, judge)
    play(collection, 0)
    learn(optimizer, joint_loss(copies[0], copies[1], 0, zero_state=False))
    assert same([judge], copies[1:])
    assert not same([eye], copies[:1])


def test_weights_wait_for_exact_messages_and_no_longer() -> None:
    """The eye updates when the judge does: after 4, 8, ... ticks."""
    eye, judge = Eye(), Judge()
    collection = Collection(
        {
            "eye": eye_trainer(eye, gradients=mixed("exact")),
            "judge": Member(judge_trainer(judge, gradients="zero"), every=2),
        },
        [Link("eye", "message", "judge")],
    )
    x, y, z = episode(0)
    changed = []
    for t in range(LENGTH):
        before = copy.deepcopy(eye)
        reports = collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]})
        assert set(reports) == {
            n for n, ticks in (("eye", 2), ("judge", 4)) if t % ticks == ticks - 1
        }
        changed.append(not same([eye], [before]))
    assert changed == [t % 4 == 3 for t in range(LENGTH)]


def test_networks_of_all_kinds_equal_backprop() -> None:
    """One message to two receivers, one of them without a state; another receiver takes two
    messages and an input.
    """
    eye, other = Eye(), Eye()
    judge, critic = (
        Judge(2 * MESSAGE + 2),
        nn.Sequential(nn.Linear(MESSAGE, 5), nn.Tanh(), nn.Linear(5, 2)),
    )

    def combine(x: Tensor, messages: dict[str, Tensor]) -> Tensor:
        return torch.cat((x, messages["message"], 2 * messages["other"]), 1)

    collection = Collection(
        {
            "eye": eye_trainer(eye),
            "other": eye_trainer(other),
            "judge": Member(judge_trainer(judge), every=2, combine=combine),
            "critic": Member(judge_trainer(critic, window=1, gradients="exact"), every=4),
        },
        [
            Link("eye", "message", "judge"),
            Link("eye", "message", "critic"),
            Link("other", "message", "judge", into="other"),
        ],
    )
    copies, optimizer = twins(eye, other, judge, critic)
    for seed in range(3):
        x, y, z = episode(
            seed, length=4
        )  # one window of the judge: the critic updates at the end of each of its own
        for t in range(4):
            inputs = {"eye": x[t], "other": x[t].flip(1), "judge": z[t] ** 2}
            targets = {"eye": y[t], "other": y[t].flip(1), "judge": z[t], "critic": z[t]}
            collection.tick(inputs, targets, done=t == 3)
        total, taken, states = torch.zeros(()), [], [None, None]
        for t in (1, 3):
            a, states[0] = copies[0](x[t - 1 : t + 1], states[0])
            b, states[1] = copies[1](x[t - 1 : t + 1].flip(2), states[1])
            total = total + loss_of(a, y[t]) + loss_of(b, y[t].flip(1))
            taken.append(combine(z[t] ** 2, {"message": a["message"], "other": b["message"]}))
        judged, _ = copies[2](torch.stack(taken), None)
        learn(optimizer, total + loss_of(judged, z[3]) + loss_of(copies[3](a["message"]), z[3]))
        assert_close([eye, other, judge, critic], copies)


def test_several_inputs_are_a_dict() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.judge = Judge(2 * MESSAGE)

        def forward(self, x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
            return self.judge(torch.cat((x["message"], x["input"]), 2), state)

    eye, both = Eye(), Both()
    collection = Collection(
        {"eye": eye_trainer(eye), "both": Member(judge_trainer(both), every=2)},
        [Link("eye", "message", "both")],
    )
    copies, optimizer = twins(eye, both)
    x, y, z = episode(0, length=4)
    extra = torch.cat((z, z), 2)
    for t in range(4):
        inputs = {"eye": x[t], "both": extra[t]}
        collection.tick(inputs, {"eye": y[t], "both": z[t]}, done=t == 3)
    first, state = copies[0](x[:2], None)
    second, _ = copies[0](x[2:], state)
    window = {"message": torch.stack((first["message"], second["message"])), "input": extra[1::2]}
    learn(
        optimizer,
        loss_of(first, y[1]) + loss_of(second, y[3]) + loss_of(copies[1](window, None)[0], z[3]),
    )
    assert_close([eye, both], copies)
