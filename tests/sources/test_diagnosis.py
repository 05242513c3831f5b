"""Diagnosis by true gradients: it changes nothing and agrees with autograd."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dni_fx
from dni_fx import sources
from dni_fx.sources import Corrected, Delayed, GradientSource, Prediction

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import batch, train, trainer_of
from ..models.cases import Case
from ..models.small import CHAIN, CONVOLUTIONS, Crossing


def test_diagnosis_changes_nothing_and_says_something() -> None:
    for gradients in (
        "linear",
        "critic",
        partial(Corrected, source="local"),
        Delayed,
        "zero",
        "exact",
    ):
        trainer, other = trainer_of(gradients), trainer_of(gradients)
        for each in (trainer, other):
            train(each, 4)
        x, y = batch(99)
        torch.manual_seed(5)
        diagnosis = trainer.diagnose(x, target=y)
        assert str(diagnosis)
        of_parameters = trainer.diagnose_parameters(x, target=y)
        assert str(of_parameters)
        for each in (trainer, other):
            train(each, 2, first=4)
        assert_bits_equal(
            trainer.decoupled.state_dict(), other.decoupled.state_dict(), "after diagnose"
        )
        names = {"0", "1", "2"} if gradients not in (Delayed, "exact") else set()
        assert set(diagnosis) == names
        waits = isinstance(gradients, partial)  # part of the gradient comes late
        assert set(of_parameters) == ({f"stage_{name}" for name in names} if not waits else set())
        for report in diagnosis.values():
            assert report.reference == "true"


@pytest.mark.parametrize(
    ("gradients", "own"),
    [
        ("local", True), ("distill", True), ("critic", True), ("reconstruct", True),
        (sources.Sum("local", "linear"), False),
        ("linear", False), ("sobolev", False), ("stale", False),
    ],
    ids=str,
)  # fmt: skip
def test_a_head_is_not_judged_by_a_gradient_that_it_does_not_aim_at(
    gradients: Any, own: bool
) -> None:
    trainer = trainer_of(gradients, metrics_every=1)
    train(trainer, 3)
    x, y = batch(99)
    measured = trainer.step(x, target=y).interfaces
    for report in (*trainer.diagnose(x, target=y).values(), *measured.values()):
        assert report.aims is not own
        if own:
            assert "control" not in report.verdict
        away = dataclasses.replace(report, cosine=-0.4, relative_error=1.4)
        assert ("a loss of its own" in away.verdict) is own
        assert ("control (`zero`) would do" in away.verdict) is not own


def test_a_source_of_true_gradients_is_found_perfect() -> None:
    trainer = trainer_of("zero")
    x, y = batch(0)
    true = trainer.true_gradients(x, target=y)

    answers: list[Tensor] = []

    class Knows(GradientSource):
        message = "none"

        def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
            return Prediction((answers.pop(0),))

        def flops(self) -> int:
            return 0

    knowing = trainer_of(Knows)
    answers[:] = [true[n] for n in ("0", "1", "2")]
    diagnosis = knowing.diagnose(x, target=y)
    answers[:] = [true[n] for n in ("0", "1", "2")]
    of_parameters = knowing.diagnose_parameters(x, target=y)
    assert len(of_parameters) == 3
    for report in (*diagnosis.values(), *of_parameters.values()):
        assert report.cosine == pytest.approx(1)
        assert report.explained == pytest.approx(1)


@pytest.mark.parametrize("case", [CHAIN, CONVOLUTIONS], ids=lambda case: case.name)
@pytest.mark.parametrize("gradients", ["linear", "critic", "zero"])
def test_what_predictions_make_of_the_parameters_gradients(gradients: str, case: Case) -> None:
    """Against autograd on the model itself; and the cosine at the cut is another number."""
    trainer, stages = trainer_of(gradients, case), range(len(case.cuts))
    train(trainer, 6, case=case)
    x, y = batch(7, case=case)
    found, cuts = trainer.diagnose_parameters(x, target=y), trainer.diagnose(x, target=y)
    model, sources, value = trainer.decoupled.model, trainer.decoupled.sources, x
    parameters = [list(model[i].parameters()) for i in stages]
    true = [torch.autograd.grad(F.cross_entropy(model(x), y), own) for own in parameters]
    for i in stages:
        value = model[i](value.detach())
        guess = sources[str(i)].predict((value.detach(),), dni_fx.one_hot(3)(y)).gradients
        parts = torch.autograd.grad(value, parameters[i], guess)
        predicted, reference = (
            torch.cat([g.flatten() for g in grads]) for grads in (parts, true[i])
        )
        report = found[f"stage_{i}"]
        size = float(predicted.norm() / reference.norm())
        assert report.rms_ratio == pytest.approx(size, rel=1e-4, abs=1e-9)
        if size:
            assert report.cosine == pytest.approx(
                float(F.cosine_similarity(predicted, reference, 0)), abs=1e-4
            )
            assert abs(report.cosine - cuts[str(i)].cosine) > 1e-3
        else:
            assert gradients == "zero"
            assert math.isnan(report.cosine)


def test_parameters_of_several_stages_count_for_none() -> None:
    class Reused(Crossing):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(self.b(self.a(x)).relu()))

    trainer, (x, y) = trainer_of("linear", model=Reused(), cuts=["b", "a"]), batch(0)
    found, decoupled = trainer.diagnose_parameters(x, target=y), trainer.decoupled
    alone = {
        s.name
        for s in decoupled.stages[:-1]
        if any(p is decoupled.model.b.weight for p in s.parameters())
    }
    assert set(found) == alone
    assert 0 < len(alone) < len(decoupled.stages) - 1
