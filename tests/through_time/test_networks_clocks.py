"""Networks with clocks of their own, and circles of networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.networks import Collection, Link, Member

from ..helpers.optimisers import adam
from .networks import (
    BATCH,
    FEATURES,
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
    trainer_of,
    twins,
)

pytestmark = pytest.mark.usefixtures("double_precision")


class Speaker(Judge):
    """A judge that sends a message, too."""

    def __init__(self, inputs: int = MESSAGE) -> None:
        super().__init__(inputs)
        self.say = nn.Linear(5, MESSAGE)

    def forward(self, x: Tensor, state: Any) -> tuple[dict[str, Tensor], Any]:  # type: ignore[override]
        hidden, state = self.core(x, state)
        return {"y": self.head(hidden[-1]), "back": self.say(hidden[-1])}, state


def run_latest(
    eye_every: int, judge_every: int, seed: int, judge_first: bool = False
) -> tuple[list[Any], list[Any]]:
    """A sequence of messages of single ticks, the judge taking the latest one, against the same by
    hand.
    """
    eye, judge = Eye(), Judge()
    members = {
        "eye": Member(eye_trainer(eye, window=1), every=eye_every),
        "judge": Member(judge_trainer(judge, window=3), every=judge_every),
    }
    order = ("judge", "eye") if judge_first else ("eye", "judge")
    start = torch.full((BATCH, MESSAGE), 0.5)
    collection = Collection(
        {n: members[n] for n in order}, [Link("eye", "message", "judge", initial=start)]
    )
    copies, optimizer = twins(eye, judge)
    x, y, z = episode(seed)
    total, states, latest, taken = torch.zeros(()), [None, None], start, []
    for t in range(LENGTH):
        done = t + 1 == LENGTH
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]}, done=done)
        for name in order:
            if name == "eye" and (t + 1) % eye_every == 0:
                output, states[0] = copies[0](x[t : t + 1], states[0])
                total, latest = total + loss_of(output, y[t]), output["message"]
            if name == "judge" and (t + 1) % judge_every == 0:
                taken.append(latest)
            if name == "judge" and (len(taken) == 3 or (done and taken)):
                judged, states[1] = copies[1](torch.stack(taken), states[1])
                total, taken = total + loss_of(judged, z[t]), []
    learn(optimizer, total)
    return [eye, judge], copies


@pytest.mark.parametrize("judge_first", [False, True])
@pytest.mark.parametrize("clocks", [(1, 2), (2, 1), (3, 1), (2, 3), (3, 2), (1, 1)])
def test_a_receiver_takes_the_latest_message(clocks: tuple[int, int], judge_first: bool) -> None:
    """Messages that are replaced before it ticks get no gradient; those that it takes again get the
    sum.
    """
    assert_close(*run_latest(*clocks, seed=1, judge_first=judge_first))


def test_messages_that_are_never_taken_have_no_gradient() -> None:
    eye, judge = Eye(), Judge()
    collection = Collection(
        {
            "eye": eye_trainer(eye, window=1),
            "judge": Member(judge_trainer(judge, window=1), every=4),
        },
        [Link("eye", "message", "judge")],
    )
    answered: dict[int, float] = {}
    answer = collection.members["eye"].trainer.answer

    def watched(gradients: Any) -> None:
        answered.update({step: g["message"].abs().sum().item() for step, g in gradients.items()})
        answer(gradients)

    collection.members["eye"].trainer.answer = watched  # type: ignore[method-assign]
    play(collection, 0)
    assert {step: gradient > 0 for step, gradient in answered.items()} == {
        k: k in (4, 8) for k in range(1, 9)
    }


def test_windows_that_a_sequence_cuts_short() -> None:
    """After 7 ticks: the eye's last window has one, the judge's last one message."""
    eye, judge, collection = pair()
    copies, optimizer = twins(eye, judge)
    x, y, z = episode(0)
    for t in range(7):
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]}, done=t == 6)
    assert collection.now == 0
    total, states, messages = torch.zeros(()), [None, None], []
    for window, t in zip(x[:7].split(2), (1, 3, 5, 6), strict=True):
        output, states[0] = copies[0](window, states[0])
        total = total + loss_of(output, y[t])
        messages.append(output["message"])
    first, states[1] = copies[1](torch.stack(messages[:2]), None)
    second, _ = copies[1](
        torch.stack(messages[2:3]), states[1]
    )  # the last message comes after the judge's last tick
    learn(optimizer, total + loss_of(first, z[3]) + loss_of(second, z[6]))
    assert_close([eye, judge], copies)


def test_a_sequence_that_ends_between_the_windows_of_a_member() -> None:
    """The judge's window is full after 4 ticks; at the end, after 5, it has nothing to update with,
    and begins anew.
    """
    _, _, collection = pair(mixed("linear"))
    trainer = collection.members["judge"].trainer
    reports = play(collection, 0, length=5)
    assert [set(r) for r in reports] == [set(), {"eye"}, set(), {"eye", "judge"}, {"eye"}]
    assert trainer.state is None
    assert trainer.drain() == 0


def test_targets_of_each_tick() -> None:
    eye, steps = Eye(), nn.LSTMCell(FEATURES, 2)
    copied, optimizer = twins(steps)
    member = Member(trainer_of(steps, 2), target_each_tick=True)
    collection = Collection({"steps": member, "eye": eye_trainer(eye)})
    x, y, _ = episode(0)
    for t in range(4):
        collection.tick({"eye": x[t], "steps": x[t]}, {"eye": y[t], "steps": y[t]}, done=t == 3)
    total, state = torch.zeros(()), None
    hidden = []
    for t in range(4):
        state = copied[0](x[t], state)
        hidden.append(state[0])
    for t in (0, 2):
        total = total + F.mse_loss(torch.stack(hidden[t : t + 2]), y[t : t + 2])
    learn(optimizer, total)
    assert_close([steps], copied)


def circle(forward: Any, back: Any, initial: Tensor | None) -> tuple[Eye, Speaker, Collection]:
    """Two networks that listen to each other, every tick."""
    eye, judge = Eye(FEATURES + MESSAGE), Speaker()
    there = trainer_of(eye, 1, mixed(forward), messages=("message",), input_gradients=True)
    here = trainer_of(
        judge, 1, {"back": back, "next_0": "zero"}, messages=("back",), input_gradients=True
    )
    listening = Member(there, combine=lambda x, messages: torch.cat((x, messages["back"]), 1))
    links = [Link("eye", "message", "judge"), Link("judge", "back", "eye", initial=initial)]
    return eye, judge, Collection({"eye": listening, "judge": here}, links)


def test_networks_that_listen_to_each_other() -> None:
    """The eye waits for the judge's exact gradient, the judge for none: what comes back is the last
    tick's word.
    """
    start = torch.ones(BATCH, MESSAGE)
    eye, judge, collection = circle("exact", "zero", start)
    (a, b), _ = twins(eye, judge)
    optimizers = [adam(a.parameters()), adam(b.parameters())]
    x, y, z = episode(0)
    word, states = start, [None, None]
    for t in range(LENGTH):
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]}, done=t + 1 == LENGTH)
        output, states[0] = a(torch.cat((x[t], word), 1)[None], cut(states[0], True))
        judged, state = b(output["message"][None], states[1])
        word, states[1] = judged["back"].detach(), state.detach()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss_of(output, y[t]) + loss_of(judged, z[t])).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_close([eye, judge], [a, b])


def test_a_source_in_a_circle_hears_of_each_tick() -> None:
    _, _, collection = circle("linear", "linear", torch.zeros(BATCH, MESSAGE))
    for seed in range(3):
        play(collection, seed)
    for name, message in (("eye", "message"), ("judge", "back")):
        source: Any = collection.members[name].trainer.sources[message].source
        # All but the judge's last word, which nobody hears: a zero target counts for nothing.
        assert source.count.item() == 3 * (LENGTH - (name == "judge"))


def test_a_network_that_hears_itself() -> None:
    eye = Eye(MESSAGE)
    trainer = trainer_of(eye, 1, mixed("linear"), messages=("message",), input_gradients=True)
    collection = Collection(
        {"eye": trainer}, [Link("eye", "message", "eye", initial=torch.ones(BATCH, MESSAGE))]
    )
    for t in range(3):
        reports = collection.tick({}, {"eye": torch.zeros(BATCH, 2)}, done=t == 2)
        assert set(reports) == {"eye"}


def test_exact_circles_are_refused() -> None:
    _, _, collection = circle("exact", "exact", torch.ones(BATCH, MESSAGE))
    with pytest.raises(
        DecouplingError, match=r"'eye' -> 'judge' -> \.\.\. wait for each other's exact gradients"
    ):
        play(collection, 0)
