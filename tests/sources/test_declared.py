"""What sources declare, in one value or by the flags of before."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import TensorSpec
from dni_fx.sources import (
    SOURCES,
    AcrossTime,
    Asks,
    Corrected,
    Delayed,
    Each,
    Feedback,
    GradientSource,
    Linear,
    Mix,
    Prediction,
    Wait,
    make_source,
    serve,
)

from .declared import LABELS, SPEC, Nothing, X, trained

PARTS = {"complete": lambda self, p, awaited: awaited, "fit_part": lambda self, n, p, m: None}


def test_what_is_declared() -> None:
    asks = Asks(learns_from=("loss", "logits"), wait=Wait(2, for_=("gradient", "logits")))
    assert asks.hears == ("gradient", "loss", "logits")
    assert (asks.lag, asks.awaited) == (2, ("gradient", "logits"))
    assert not asks.at_once
    assert not asks.early
    assert Asks(wait=Wait(1, corrects=True)).early
    assert (Asks().hears, Asks().lag, Asks().awaited) == (("gradient",), None, ())
    assert Asks().at_once
    assert Asks().early
    with pytest.raises(dataclasses.FrozenInstanceError):
        asks.wait = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: Asks(learns_from="gradient"), r"tuple.*\('gradient',\).*not 'gradient'"),
        (lambda: Asks(learns_from=("gradeint",)), "'gradeint'; did you mean 'gradient'"),
        (lambda: Asks(learns_from=("loss", "gradient")), "in the order 'gradient', 'loss'"),
        (lambda: Asks(learns_from=("loss", "loss")), "once each"),
        (lambda: Asks(wait=1), r"Wait\(lag=1\), not 1"),
        (lambda: Asks(per_consumer=True, learns_from=("loss",)), "gradients alone"),
        (lambda: Asks(per_consumer=True, wait=Wait(1)), "answer at once"),
        (lambda: Wait(-1), "0 or more, not -1"),
        (lambda: Wait(True), "not True"),
        (lambda: Wait(1.0), "not 1.0"),
        (lambda: Wait(1, for_=["gradient"]), r"for_=.*tuple"),
    ],
)
def test_declarations_that_make_no_sense(declare: Any, words: str) -> None:
    with pytest.raises(DecouplingError, match=words):
        declare()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_declares(name: str) -> None:
    spec = TensorSpec((4, 6, 5), torch.float32, 1) if name == "conv" else SPEC
    source = make_source(name, [spec], LABELS)
    assert isinstance(source.asks, Asks)
    assert source.asks.exact == (name == "exact")
    assert copy.deepcopy(source).asks == source.asks


def test_sources_that_wrap_others_ask_for_what_those_do() -> None:
    inner = Asks(learns_from=("gradient", "loss"))
    late = {"source": "sobolev", "recompute": False}
    assert Corrected([SPEC], LABELS, **late).asks == dataclasses.replace(
        inner, wait=Wait(1, recompute=False, corrects=True, weight="delay")
    )
    assert Mix([SPEC], LABELS, source="sobolev").asks == dataclasses.replace(inner, wait=Wait(0))
    assert Mix([SPEC], LABELS, **late, steps=3).asks.wait == Wait(3, recompute=False, corrects=True)
    assert Mix([SPEC], LABELS, steps=3, at_once=False).asks.wait == Wait(3)


class OldInClass(GradientSource):
    message, lag, recompute = "none", 1, False

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        return Prediction(None)

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> Any:
        return awaited


class OldInInit(OldInClass):
    message, lag, recompute = "gradient", None, True  # all overwritten

    def __init__(self, specs: Any, context: Any = None) -> None:
        self.recompute = False  # in any order, before nn.Module's own and before there is a lag
        super().__init__(specs, context)
        self.message, self.lag = "none", 1


class New(OldInClass):
    asks = Asks(learns_from=(), wait=Wait(1, recompute=False))


def test_flags_say_the_same_as_asks() -> None:
    want = trained(partial(Delayed, recompute=False))
    for kind in (OldInClass, OldInInit, New):
        source = make_source(kind, [SPEC])
        assert source.asks == Asks(learns_from=(), wait=Wait(1, recompute=False))
        assert (source.message, source.lag, source.awaits) == ("none", 1, "gradient")
        assert (source.recompute, source.corrects, source.exact) == (False, False, False)
        for name, tensor in trained(kind).items():
            assert torch.equal(tensor, want[name]), name
    now = trained(Delayed)  # the control: with the weights of now it would be something else
    assert not all(torch.equal(now[name], want[name]) for name in want)


def test_flags_of_a_class_are_read_from_the_class() -> None:
    assert (OldInClass.lag, OldInClass.message, Nothing.lag) == (1, "none", None)
    assert OldInClass.asks.wait == Wait(1, recompute=False)
    assert Nothing.asks == GradientSource.asks == Asks()  # nothing of a subclass came to its base


def test_flags_of_a_class_beside_it() -> None:
    class Beside:
        message = "loss+logits"

    class Own(Beside, Nothing):
        pass

    assert Own.asks == Asks(learns_from=("loss", "logits"))


def test_a_flag_written_to_a_source_of_ours() -> None:
    class LateFeedback(Feedback):
        def __init__(self, specs: Any, context: Any = None) -> None:
            super().__init__(specs, context)
            self.lag = 2

    class Louder(Linear):
        message = "gradient+error"

    source = make_source(LateFeedback, [SPEC], LABELS)
    assert source.asks == Asks(learns_from=(), wait=Wait(2, for_=("error",)))
    assert Louder.asks.learns_from == ("gradient", "error")
    assert Linear.asks == Asks()
    source = make_source("linear", [SPEC])
    source.exact = True
    assert source.asks == Asks(exact=True)
    assert make_source("linear", [SPEC]).asks == Asks()
    source.exact, source.awaits, source.corrects, source.lag = False, "error", True, 0
    assert source.asks == Asks(wait=Wait(0, for_=("error",), corrects=True))
    source.recompute, source.lag = False, 4
    assert source.asks.wait == Wait(4, ("error",), recompute=False, corrects=True)
    source.lag = None
    assert source.asks == Asks()


def test_flags_that_cannot_be_translated() -> None:
    with pytest.raises(DecouplingError, match=r"Own declares asks and the flag lag"):
        type("Own", (Nothing,), {"asks": Asks(), "lag": 1})
    with pytest.raises(DecouplingError, match=r"Own.message is computed.*set self.asks"):
        type("Own", (Nothing,), {"message": property(lambda self: "none")})
    with pytest.raises(DecouplingError, match=r"Own.message is 'loss\+gradient'; it must be"):
        type("Own", (Nothing,), {"message": "loss+gradient"})
    with pytest.raises(DecouplingError, match=r"Own.awaits is 'gradeint'; it must be 'none'"):
        type("Own", (Nothing,), {"awaits": "gradeint"})
    with pytest.raises(DecouplingError, match="lag is a whole number"):
        type("Own", (Nothing,), {"lag": "1"})


class Told(Nothing):
    """Notes what it knew when it was asked."""

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        self.told = (self.unit, self.ended, self.jacobian)
        return Prediction(tuple(torch.zeros_like(value) for value in values))


@pytest.mark.parametrize(
    "outer",
    [
        partial(Corrected, source=Told),
        partial(Mix, source=Told),
        partial(Each, source=Told),
        partial(AcrossTime, source=Told),
    ],
    ids=["corrected", "mix", "each", "across time"],
)
def test_what_the_trainer_tells_is_handed_on(outer: Any) -> None:
    source = make_source(outer, [SPEC])
    ended, jacobian = torch.tensor([True, False, False, False]), torch.ones(4, 6, 6)
    source.unit, source.ended, source.jacobian = 0.25, ended, jacobian
    source((torch.ones(4, 6),))
    (inner,) = [m for m in source.modules() if isinstance(m, Told)]
    assert inner.told[0] == 0.25
    assert inner.told[1] is ended
    assert inner.told[2] is jacobian
    alone = Told([SPEC])  # the control
    alone((torch.ones(4, 6),))
    assert alone.told == (1.0, None, None)


def test_what_may_stand_between_windows() -> None:
    for asks in (Asks(learns_from=("loss",)), Asks(wait=Wait(0)), Asks(per_consumer=True)):
        with pytest.raises(DecouplingError, match="cannot serve the state between windows"):
            AcrossTime([SPEC], source=type("Own", (Nothing,), {"asks": asks, **PARTS}))
    for asks in (Asks(), Asks(learns_from=()), Asks(ends=True), Asks(ends=True, jacobian=True)):
        made = AcrossTime([SPEC], source=type("Own", (Nothing,), {"asks": asks}))
        assert made.asks == dataclasses.replace(asks, ends=True)


def test_who_teaches_a_part() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(torch.tanh(self.b(h)) + h)

    torch.manual_seed(0)
    found = {}
    for gradients in ("each:linear", "linear"):
        decoupled = dni_fx.decouple(
            Forked(), ["tanh", "tanh_1"], example_inputs=(X,), gradients=gradients, check=False
        )
        groups = serve(decoupled.interfaces, decoupled.sources)
        found[gradients] = {len(g.consumers): g.by_consumer for g in groups}
        assert all(isinstance(g.source, Each) == (gradients != "linear") for g in groups)
    assert found == {"each:linear": {1: False, 2: True}, "linear": {1: False, 2: False}}
    with pytest.raises(NotImplementedError, match="must implement fit_part"):
        Nothing([SPEC]).fit_part(0, Prediction(()), ())
