"""Sources that are not written as they should be: one clear error, at decouple or in the first
step.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.sources import (
    Asks,
    Corrected,
    GradientSource,
    Joint,
    Mix,
    Prediction,
    Regression,
    Traces,
    Wait,
    make_source,
    try_predict,
)
from dni_fx.sources.regression import Network

from .declared import SPEC, Good, Nothing, X, Y, decoupled_with, trained


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
