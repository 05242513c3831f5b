"""What members of a collection may be, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.networks import Collection, Link, Member
from dni_fx.recurrent import decouple_through_time

from ..helpers.optimisers import adam
from .networks import (
    BATCH,
    FEATURES,
    LENGTH,
    MESSAGE,
    Eye,
    Judge,
    assert_close,
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
