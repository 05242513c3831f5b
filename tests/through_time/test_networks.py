"""Collections of networks: with exact messages they equal backpropagation through all of them, and
each waits alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.networks import Collection, Link, Member
from dni_fx.recurrent import ThroughTime, decouple_through_time

BATCH, FEATURES, LENGTH = 6, 3, 8
MESSAGE = 4


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    """In double precision."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


class Eye(nn.Module):
    """Looks at a stream, tells something of each window and sends a message at its end."""

    def __init__(self, inputs: int = FEATURES) -> None:
        super().__init__()
        self.core, self.head, self.say = nn.LSTM(inputs, 5), nn.Linear(5, 2), nn.Linear(5, MESSAGE)

    def forward(self, x: Tensor, state: Any) -> tuple[dict[str, Tensor], Any]:
        hidden, state = self.core(x, state)
        return {"y": self.head(hidden[-1]), "message": torch.tanh(self.say(hidden[-1]))}, state


class Judge(nn.Module):
    """Judges by messages."""

    def __init__(self, inputs: int = MESSAGE) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(inputs, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self.core(x, state)
        return self.head(hidden[-1]), state


class Speaker(Judge):
    """A judge that sends a message, too."""

    def __init__(self, inputs: int = MESSAGE) -> None:
        super().__init__(inputs)
        self.say = nn.Linear(5, MESSAGE)

    def forward(self, x: Tensor, state: Any) -> tuple[dict[str, Tensor], Any]:  # type: ignore[override]
        hidden, state = self.core(x, state)
        return {"y": self.head(hidden[-1]), "back": self.say(hidden[-1])}, state


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def loss_of(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(output["y"] if isinstance(output, dict) else output, target)


def trainer_of(
    model: nn.Module, window: int, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    options = {"loss": loss_of, "optimizer": adam, **options}
    return decouple_through_time(model, window, gradients=gradients, **options)


def eye_trainer(
    eye: nn.Module, window: int = 2, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    return trainer_of(eye, window, gradients, messages=("message",), **options)


def judge_trainer(
    judge: nn.Module, window: int = 2, gradients: Any = "exact", **options: Any
) -> ThroughTime:
    return trainer_of(judge, window, gradients, input_gradients=True, **options)


def mixed(message: Any, state: Any = "zero") -> dict[str, Any]:
    """Gradients of an :class:`Eye`."""
    return {"message": message, "next_0": state, "next_1": state}


def pair(gradients: Any = "exact", **options: Any) -> tuple[Eye, Judge, Collection]:
    """An eye with windows of 2, and a judge that ticks and updates half as often."""
    eye, judge = Eye(), Judge()
    collection = Collection(
        {
            "eye": eye_trainer(eye, gradients=gradients, **options),
            "judge": Member(judge_trainer(judge), every=2),
        },
        [Link("eye", "message", "judge")],
    )
    return eye, judge, collection


def episode(seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """A stream and the targets of both networks at every tick."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, BATCH, n, generator=generator) for n in (FEATURES, 2, 2))  # type: ignore[return-value]


def play(collection: Collection, seed: int, length: int = LENGTH) -> list[dict[str, Any]]:
    """One sequence."""
    x, y, z = episode(seed, length)
    return [
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]}, done=t + 1 == length)
        for t in range(length)
    ]


def twins(*models: nn.Module) -> tuple[list[Any], torch.optim.Optimizer]:
    """Copies, and one optimiser for all."""
    copies = [copy.deepcopy(model) for model in models]
    return copies, adam([p for m in copies for p in m.parameters()])


def learn(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same(ours: Mapping[str, nn.Module] | list[Any], theirs: list[Any]) -> bool:
    """Bit for bit."""
    a = [p for m in (ours.values() if isinstance(ours, Mapping) else ours) for p in m.parameters()]
    return all(map(torch.equal, a, [p for m in theirs for p in m.parameters()]))


def assert_close(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    for mine, model in zip(ours, theirs, strict=True):
        for (name, a), b in zip(mine.named_parameters(), model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15), f"{name}: {(a - b).abs().max()}"


def cut(state: Any, zero: bool) -> Any:
    """A state as the next window gets it: without its graph where its gradient is zero."""
    return tuple(s.detach() for s in state) if zero and state is not None else state


# ---- exact messages are backpropagation ----------------------------------------------------------


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


# ---- clocks --------------------------------------------------------------------------------------


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


# ---- circles -------------------------------------------------------------------------------------


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


# ---- messages that are not exact -----------------------------------------------------------------


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


# ---- what members may be -------------------------------------------------------------------------


class Looking(nn.Module):
    """An eye behind a front."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front, self.eye = front, Eye()

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        return self.eye(self.front(x), state)


def test_members_may_hold_decoupled_models() -> None:
    """Inside a member it runs composed, as the model that it was made of."""
    front = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, FEATURES))
    plain, start = Looking(front), Judge()
    holding = copy.deepcopy(plain)
    inner = dni_fx.decouple(
        holding.front, cuts=["1"], example_inputs=(torch.randn(2, BATCH, FEATURES),)
    )
    holding.front = inner
    found = []
    for model in (plain, holding):
        judge = copy.deepcopy(start)
        collection = Collection(
            {"eye": eye_trainer(model), "judge": Member(judge_trainer(judge), every=2)},
            [Link("eye", "message", "judge")],
        )
        for seed in range(2):
            play(collection, seed)
        found.append([*model.eye.parameters(), *judge.parameters()])
    assert all(map(torch.equal, *found))
    assert same([front], [inner.model])
    assert not any(p.grad is not None for p in inner.synthesizers.parameters())


def test_the_model_of_a_decoupled_one_may_be_a_member() -> None:
    """It is left as it was made, so that it can be decoupled once more."""
    eye, judge = Eye(), nn.Sequential(nn.Linear(MESSAGE, 5), nn.Tanh(), nn.Linear(5, 2))
    copies, optimizer = twins(eye, judge)
    decoupled = dni_fx.decouple(judge, cuts=["1"], example_inputs=(torch.randn(BATCH, MESSAGE),))
    collection = Collection(
        {"eye": eye_trainer(eye, window=1), "judge": judge_trainer(decoupled.model, window=1)},
        [Link("eye", "message", "judge")],
    )
    x, y, z = episode(0)
    collection.tick({"eye": x[0]}, {"eye": y[0], "judge": z[0]}, done=True)
    output, _ = copies[0](x[:1], None)
    learn(optimizer, loss_of(output, y[0]) + loss_of(copies[1](output["message"]), z[0]))
    assert_close([eye, judge], copies)
    with pytest.raises(DecouplingError, match="decoupled already"):
        decouple_through_time(decoupled, 1, loss=loss_of, optimizer=adam, input_gradients=True)


def test_networks_whose_state_stays_inside() -> None:
    """The same networks with and without their states as arguments."""

    class Inside(nn.Module):
        def __init__(self, whole: Any) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor) -> Any:
            return self.whole(x, None)[0]

    eye, judge, collection = pair()
    copies = [Inside(copy.deepcopy(eye)), Inside(copy.deepcopy(judge))]
    inside = Collection(
        {"eye": eye_trainer(copies[0]), "judge": Member(judge_trainer(copies[1]), every=2)},
        [Link("eye", "message", "judge")],
    )
    for seed in range(2):
        play(collection, seed)
        play(inside, seed)
        assert same([eye, judge], copies)


def test_networks_without_any_state() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.say = (
                nn.Linear(FEATURES, 5),
                nn.Linear(5, 2),
                nn.Linear(5, MESSAGE),
            )

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.body(x))
            return {"y": self.head(hidden), "message": self.say(hidden)}

    eye, judge = Plain(), nn.Linear(MESSAGE, 2)
    copies, optimizer = twins(eye, judge)
    collection = Collection(
        {"eye": eye_trainer(eye, window=1), "judge": judge_trainer(judge, window=1)},
        [Link("eye", "message", "judge")],
    )
    x, y, z = episode(0)
    for t in range(LENGTH):
        reports = collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]})
        assert set(reports) == {"eye", "judge"}
        output = copies[0](x[t])
        learn(optimizer, loss_of(output, y[t]) + loss_of(copies[1](output["message"]), z[t]))
        assert same([eye, judge], copies)


def test_a_sequence_resumes_from_a_state_dict() -> None:
    torch.manual_seed(3)
    eye, judge, collection = pair(mixed("mlp", "linear"))
    play(collection, 0)
    saved = copy.deepcopy(collection.state_dict())
    play(collection, 1)
    play(collection, 2)
    again_eye, again_judge, again = pair(mixed("mlp", "linear"))
    play(again, 5)  # the models are traced by their first windows
    again.load_state_dict(saved)
    play(again, 1)
    play(again, 2)
    assert same([eye, judge], [again_eye, again_judge])
    for a, b in zip(collection.members.values(), again.members.values(), strict=True):
        assert same([a.trainer.decoupled], [b.trainer.decoupled])


def test_reset_begins_anew() -> None:
    _, _, collection = pair(mixed("linear"))
    x, y, z = episode(0)
    for t in range(3):
        collection.tick({"eye": x[t]}, {"eye": y[t], "judge": z[t]})
    with pytest.raises(DecouplingError, match=r"tick 3 of a sequence.*done=True, or call reset"):
        collection.state_dict()
    collection.reset()
    assert collection.now == 0
    assert all(member.trainer.state is None for member in collection.members.values())
    collection.state_dict()
    play(collection, 1)


# ---- errors --------------------------------------------------------------------------------------


def test_errors_of_the_making() -> None:
    eye, judge = eye_trainer(Eye()), judge_trainer(Judge())
    members = {"eye": eye, "judge": judge}
    with pytest.raises(
        DecouplingError,
        match=r"there is no member 'juge', only 'eye', 'judge'; did you mean 'judge'",
    ):
        Collection(members, [Link("eye", "message", "juge")])
    with pytest.raises(
        DecouplingError, match=r"link 'judge' -> 'eye' \('x'\).*input_gradients=True"
    ):
        Collection(members, [Link("judge", "x", "eye")])
    with pytest.raises(
        DecouplingError, match=r"has another input 'message'; name this one by into="
    ):
        Collection(members, [Link("eye", "message", "judge")] * 2)
    with pytest.raises(DecouplingError, match=r"has another input 'input'; name this one by into="):
        Collection(members, [Link("eye", "message", "judge", into="input")])
    for every in (0, 1.5, True):
        with pytest.raises(
            DecouplingError, match=r"member 'judge': every=.*expected a number of ticks"
        ):
            Collection({**members, "judge": Member(judge, every=every)})  # type: ignore[arg-type]
    with pytest.raises(
        DecouplingError, match=r"member 'eye': expected what decouple_through_time returns.*not Eye"
    ):
        Collection({"eye": Eye()})  # type: ignore[dict-item]
    with pytest.raises(DecouplingError, match="takes single steps"):
        eye_trainer(nn.LSTMCell(FEATURES, 5))
    with pytest.raises(
        DecouplingError,
        match=r"link 'eye' -> 'judge' \('mesage'\): the sender sends no such.*'message'",
    ):
        Collection(members, [Link("eye", "mesage", "judge")])
    without_state = judge_trainer(nn.Linear(MESSAGE, 2), window=2)
    with pytest.raises(
        DecouplingError, match=r"member 'judge': its model has no state.*window=2: use window=1"
    ):
        Collection({"judge": without_state})


def test_errors_of_a_tick() -> None:
    _, _, collection = pair()
    x, y, z = episode(0)
    targets = {"eye": y[0], "judge": z[0]}
    with pytest.raises(DecouplingError, match=r"tick: there is no member 'ear'"):
        collection.tick({"ear": x[0]}, targets)
    with pytest.raises(DecouplingError, match=r"done=tensor.*expected True or False"):
        collection.tick({"eye": x[0]}, targets, done=torch.zeros(BATCH, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(
        DecouplingError, match=r"member 'eye': tick 1: it ticks, but inputs= has nothing"
    ):
        collection.tick({}, targets)
    collection.reset()
    collection.tick({"eye": x[0]}, targets)
    with pytest.raises(
        DecouplingError, match=r"member 'eye': the inputs of one window must be alike"
    ):
        collection.tick({"eye": x[1, :2]}, targets)
    collection.reset()
    with pytest.raises(DecouplingError, match=r"this state is of members \['eye'\]"):
        collection.load_state_dict({"eye": {}})


def test_a_receiver_before_the_first_message() -> None:
    collection = Collection(
        {"eye": eye_trainer(Eye()), "judge": judge_trainer(Judge())},
        [Link("eye", "message", "judge")],
    )
    with pytest.raises(
        DecouplingError, match=r"nothing has come by 'eye' -> 'judge' \('message'\) yet.*initial="
    ):
        play(collection, 0)


def test_what_is_not_finite_names_the_member() -> None:
    eye, _, collection = pair(mixed("linear"))
    x, y, z = episode(0)
    before = copy.deepcopy(eye)
    collection.tick({"eye": x[0]})
    with pytest.raises(
        NonFiniteError, match="member 'eye': step 1: the value of interface 'next_0' is NaN"
    ):
        collection.tick({"eye": x[1] * torch.nan}, {"eye": y[1], "judge": z[1]})
    assert same([eye], [before])
    collection.reset()
    play(collection, 0)
