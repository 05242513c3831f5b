"""Sources that people write: what they declare in ``asks``, the flags of before, and what is said
when something is missing, misspelt or wrong.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    Joint,
    Linear,
    Mix,
    Prediction,
    Regression,
    Traces,
    Wait,
    make_source,
    serve,
    try_predict,
)
from dni_fx.sources.regression import Network

SPEC, LABELS = TensorSpec((4, 6), torch.float32), TensorSpec((4, 3), torch.float32)
X, Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])


def decoupled_with(gradients: Any, **options: Any) -> dni_fx.Decoupled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return dni_fx.decouple(
        model, ["1", "3"], example_inputs=(X,), gradients=gradients, check=False, **options
    )


def trained(gradients: Any, steps: int = 5) -> dict[str, Tensor]:
    decoupled = decoupled_with(gradients, context=dni_fx.one_hot(3))
    trainer = dni_fx.Trainer(
        decoupled,
        F.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        synthesizer_optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    for _ in range(steps):
        trainer.step(X, target=Y)
    trainer.drain()
    return decoupled.model.state_dict()


class Good(GradientSource):
    """A source as it should be written; the mistakes below are this one with one thing wrong."""

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.weight = nn.Parameter(torch.zeros(self.specs[0].shape[1:]))

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        guess = torch.zeros_like(values[0]) + self.weight
        return Prediction((guess.detach(),), guess)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Tensor | None:
        return F.mse_loss(prediction.state, message[0])


class Nothing(GradientSource):
    """Says zero, and has nothing to learn."""

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        return Prediction(tuple(torch.zeros_like(value) for value in values))


PARTS = {"complete": lambda self, p, awaited: awaited, "fit_part": lambda self, n, p, m: None}


# ------------------------------------------------------------------------------------ declarations


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
        inner, wait=Wait(1, recompute=False, corrects=True)
    )
    assert Mix([SPEC], LABELS, source="sobolev").asks == dataclasses.replace(inner, wait=Wait(0))
    assert Mix([SPEC], LABELS, **late, steps=3).asks.wait == Wait(3, recompute=False, corrects=True)
    assert Mix([SPEC], LABELS, steps=3, at_once=False).asks.wait == Wait(3)


# ----------------------------------------------------------------------- the flags of before


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


# ------------------------------------------------------------------------ sources made of sources


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


# ----------------------------------------------------------------------------- one part a consumer


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


# ------------------------------------------------------------------------------- mistakes


class NoFit(Good):
    fit = GradientSource.fit


class MisspeltFit(NoFit):
    def fitt(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None: ...


class CapitalFit(Nothing):
    def Fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None: ...


class MisspeltPredict(GradientSource):
    def predictt(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> None: ...


class MisspeltComplete(Nothing):
    asks = Asks(learns_from=(), wait=Wait(1))

    def compleat(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> None: ...


class NoComplete(Nothing):
    lag = 0


class NoParts(Nothing):
    asks = Asks(per_consumer=True)


class AsksElsewhere(Nothing):
    ask = Asks(learns_from=())


class NoAsks(Nothing):
    asks = "gradient"  # type: ignore[assignment]


class NoContext(Nothing):
    def predict(self, values: tuple[Tensor, ...]) -> Any:  # type: ignore[override]
        return Prediction(values)


class FitOfOne(Good):
    def fit(self, prediction: Prediction) -> None:  # type: ignore[override]
        return None


class LayerFirst(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        self.layer = nn.Linear(2, 2)


class ParameterFirst(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        self.weight = nn.Parameter(torch.zeros(2))


class BufferFirst(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        self.register_buffer("mean", torch.zeros(2))
        super().__init__(specs, context)


class SpecsFirst(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        self.width = self.specs[0].shape[1]
        super().__init__(specs, context)


class NeverStarted(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        self.rate = 0.1


class StartedWithout(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__()  # type: ignore[call-arg]


class AnotherStart(Nothing):
    def __init__(self, specs: Any, context: Any = None) -> None:
        nn.Module.__init__(self)


SUPER = r"must call super\(\).__init__\(specs, context\)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (NoFit, r"no method fit\(prediction, message\), which trains its parameters \(weight\)"),
        (NoFit, r"requires_grad_\(False\)"),
        (MisspeltFit, r"fit\(prediction, message\) \(is 'fitt' misspelt\?\)"),
        (CapitalFit, r"is 'Fit' misspelt.*learns from gradient.*Asks\(learns_from=\(\)\)"),
        (MisspeltPredict, r"predict\(values, context\) \(is 'predictt' misspelt\?\)"),
        (MisspeltComplete, r"complete\(prediction, awaited\) \(is 'compleat' misspelt\?\)"),
        (NoComplete, r"no method complete\(prediction, awaited\), which says"),
        (NoParts, r"no method fit_part\(place, prediction, message\)"),
        (AsksElsewhere, r"\.ask is an Asks that nobody reads: call it asks"),
        (NoAsks, r"\.asks must be an Asks\(...\), but is 'gradient'"),
        (NoContext, r"predict must take \(values, context\): too many"),
        (FitOfOne, r"fit must take \(prediction, message\): too many"),
        *[
            (kind, f"__init__ {SUPER}")
            for kind in (
                LayerFirst,
                ParameterFirst,
                BufferFirst,
                SpecsFirst,
                NeverStarted,
                StartedWithout,
                AnotherStart,
            )
        ],
    ],
)
def test_a_source_that_is_not_written_as_one(source: Any, words: str) -> None:
    """At decouple, with the interface and the class; inside another source as well."""
    for option in (source, partial(source)):
        with pytest.raises(DecouplingError, match=f"interface '1': {source.__name__}.*{words}"):
            decoupled_with({"1": option, "3": "zero"})
    with pytest.raises(DecouplingError, match=words):
        decoupled_with(partial(Corrected, source=source))


class Frozen(Good):
    fit = GradientSource.fit

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.weight.requires_grad_(False)


class FitOnInstance(NoFit):
    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.fit = lambda prediction, message: F.mse_loss(prediction.state, message[0])


class HelpersOfOtherNames(Nothing):
    def flip(self) -> None: ...

    def outfit(self) -> None: ...

    def completely(self) -> None: ...


class HearsNothing(CapitalFit):
    asks = Asks(learns_from=())


class MoreArguments(Good):
    def fit(self, *anything: Any, rate: float = 1.0) -> Tensor:
        return F.mse_loss(anything[0].state, anything[1][0])


FINE = [(kind, Good) for kind in (FitOnInstance, MoreArguments)]
FINE += [(kind, "zero") for kind in (Nothing, Frozen, HelpersOfOtherNames, HearsNothing)]


@pytest.mark.parametrize(("source", "same"), FINE)
def test_sources_that_are_fine(source: Any, same: Any) -> None:
    want, other = trained(same), trained("zero" if same is Good else Good)
    found = trained(source)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert not all(torch.equal(found[name], other[name]) for name in other)


def test_errors_of_other_causes_stay_what_they_are() -> None:
    class Typo(Nothing):
        def __init__(self, specs: Any, context: Any = None) -> None:
            self.width = specs[0].shpae[1]
            super().__init__(specs, context)

    class After(Nothing):
        def __init__(self, specs: Any, context: Any = None) -> None:
            super().__init__(specs, context)
            self.width = self.sepcs[0]

    for source, words in ((Typo, "'TensorSpec' object has no attribute 'shpae'"), (After, "sepcs")):
        with pytest.raises(AttributeError, match=words):
            decoupled_with(source)


# -------------------------------------------------------------------------- wrong predictions


def answering(answer: Any, **members: Any) -> type[GradientSource]:
    """A source that returns what is made of its values."""
    return type("Own", (Nothing,), {"predict": lambda self, v, c=None: answer(v), **members})


WRONG = {
    "bare tensor": (lambda v: Prediction(v[0]), r"Prediction\(a tensor of shape \(4, 6\)\)"),
    "list": (lambda v: Prediction([v[0]]), r"Prediction\(a list, 1 of them: "),
    "not one": (lambda v: v[0] * 0, r"returned a tensor of shape \(4, 6\)"),
    "tuple": (lambda v: (v[0] * 0,), r"returned a tuple, 1 of them: "),
    "nothing": (lambda v: None, "returned None"),
    "two": (lambda v: Prediction((v[0], v[0])), "1 here.*2 of them"),
    "hole": (lambda v: Prediction((None,)), "1 of them: NoneType"),
    "waits for nothing": (lambda v: Prediction(None), r"Prediction\(None\)"),
    "shape": (
        lambda v: Prediction((v[0].sum(1),)),
        r"gradient of shape \(4,\).*value of shape \(4, 6\)",
    ),
    "dtype": (lambda v: Prediction((v[0].double(),)), r"torch.float64.*a value of.*torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prediction_is_found_at_decouple_or_in_the_first_step(name: str) -> None:
    answer, words = WRONG[name]
    with pytest.raises(DecouplingError, match=f"interface '1'.*Own.predict .*{words}"):
        decoupled_with(answering(answer))

    # One that reads a number cannot be asked without data: the same error, one step later.
    def reads(values: Any) -> Any:
        return answer(values) if float(values[0].sum()) < 1e9 else None

    decoupled = decoupled_with(answering(reads))
    trainer = dni_fx.Trainer(
        decoupled, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    with pytest.raises(DecouplingError, match=f"Own.predict .*{words}"):
        trainer.step(X, target=Y)


def test_a_wrong_prediction_within_another_source_is_named_by_its_class() -> None:
    wrong = answering(WRONG["bare tensor"][0], asks=Asks(learns_from=()))
    for option in (
        partial(Corrected, source=wrong),
        partial(Mix, source=wrong, steps=1),
        Joint(wrong),
    ):
        with pytest.raises(DecouplingError, match=r"Own.predict .*Prediction\(a tensor"):
            decoupled_with(option)
    waits = answering(lambda v: Prediction(None), lag=1, corrects=True, complete=lambda s, p, a: a)
    with pytest.raises(DecouplingError, match=r"Own.predict .*Prediction\(None\)"):
        decoupled_with(waits)  # it says that it predicts at once
    waits.asks = dataclasses.replace(waits.asks, wait=Wait(1))
    decoupled_with(waits)  # the control


def test_a_network_of_ones_own_in_a_source_of_ours_is_tried() -> None:
    class Narrow(Network):
        layers = nn.ModuleList([nn.Linear(6, 1)])

        def compute(self, value: Tensor, context: Tensor | None) -> Tensor:
            return value[:, :1]

        def flops(self) -> int:
            return 0

    with pytest.raises(DecouplingError, match=r"gradient of shape \(4, 1\) for"):
        decoupled_with(lambda specs, context: Regression(specs, context, Narrow))


class Counting(Good):
    """Changes whatever it can when it is asked."""

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.register_buffer("count", torch.zeros(()))
        self.asked, self.seen, self.plain = 0, [], torch.zeros(2)

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        self.asked += 1
        self.seen.append(torch.rand(3))
        self.count += 1
        self.plain += 1
        with torch.no_grad():
            self.weight += 1
        return super().predict(values, context)


def test_trying_changes_nothing() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    source = make_source(Counting, [SPEC])
    storage = source.weight.data_ptr()
    try_predict(source)
    assert torch.equal(torch.get_rng_state(), state)
    assert (source.asked, source.seen) == (0, [])
    assert not source.count.any()
    assert not source.plain.any()
    assert not source.weight.any()
    assert source.weight.data_ptr() == storage
    assert type(source.weight) is nn.Parameter
    source((torch.zeros(4, 6),))  # the control: this is what it does when it is asked
    assert (source.asked, len(source.seen), source.count, source.plain[0]) == (1, 1, 1, 1)
    assert bool(source.weight.all())


def test_a_source_that_cannot_be_tried_is_left_to_its_first_step() -> None:
    class Locked(Nothing):
        def __init__(self, specs: Any, context: Any = None) -> None:
            super().__init__(specs, context)
            self.rows = (row for row in range(3))  # nothing that can be copied

        def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
            return Prediction((values[0] * next(self.rows),))

    source = decoupled_with({"1": Locked, "3": "zero"}).sources["1"]
    assert next(source.rows) == 0


def test_traces_serve_no_cut() -> None:
    with pytest.raises(DecouplingError, match="serves no cut within one"):
        decoupled_with(Traces)
