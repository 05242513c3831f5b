"""What is easily got wrong at first: each told with what to write instead."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time
from dni_fx.sources import Linear

from ..helpers.optimisers import sgd
from ..helpers.refusing import refused
from .refusals import X, Y, decouple, make_trainer, refused_step

WRITE = "lambda params: torch.optim.Adam(params, 1e-3)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "mse"}, ["loss must be callable", "'mse'", "cross_entropy"]),
        ({"optimizer": 0.1}, ["optimizer must", "0.1", f"optimizer={WRITE}"]),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], 0.1)},
            ["a SGD made already", "each stage makes its own", f"optimizer={WRITE}"],
        ),
        ({"synthesizer_optimizer": 0.1}, ["0.1", f"synthesizer_optimizer={WRITE}"]),
    ],
    ids=["loss", "number", "made", "of sources"],
)
def test_what_a_trainer_cannot_call(options: dict[str, Any], words: list[str]) -> None:
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": sgd, **options}
    refused(DecouplingError, lambda: dni_fx.Trainer(decouple(), **given), *words)


def test_a_positional_target() -> None:
    trainer = dni_fx.Trainer(decouple(), F.cross_entropy, optimizer=sgd)
    trainer.step(X, target=Y)
    hint = "the target goes by keyword: step(x, target=y)"
    for call in (trainer.step, trainer.true_gradients):
        refused_step(DecouplingError, trainer, lambda call=call: call(X, Y), hint)
    refused(DecouplingError, lambda: trainer.prepare(X, Y), hint)
    with pytest.raises(DecouplingError) as caught:  # one that has another reason
        trainer.step(X[:, :2], target=Y)
    assert "keyword" not in str(caught.value)


def test_a_model_of_several_inputs_is_not_told_of_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last(self.first(x) + y)  # type: ignore[no-any-return]

    decoupled = dni_fx.decouple(Two(), ["first"], example_inputs=(X, X), gradients="zero")
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    with pytest.raises(DecouplingError) as caught:
        trainer.step(X, Y)
    assert "keyword" not in str(caught.value)


def test_windows_are_traced_by_prepare() -> None:
    model = nn.GRU(3, 2)
    made = decouple_through_time(
        model, window=2, loss=lambda o, t: (o - t).square().mean(), optimizer=sgd
    )
    for ask in (lambda: made.plan, lambda: made.load_state_dict({})):
        refused(DecouplingError, ask, "not traced yet", ".prepare(window)")
    made.prepare(torch.zeros(2, 4, 3))
    assert made.plan.stages


class _Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


class _Maker:
    """A class that makes objects of another one is a factory as good as any."""

    def __new__(cls, specs: Any, context: Any) -> Any:
        return Linear(specs, context)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Identity, _Own])
def test_a_class_that_is_no_source(kind: type) -> None:
    words = ("interface '1'", kind.__name__, "must be a GradientSource")
    refused(DecouplingError, lambda: decouple(gradients=kind), *words)


def test_classes_that_make_sources() -> None:
    for kind in (Linear, _Maker):
        assert isinstance(decouple(gradients=kind).sources["1"], Linear)


def test_processes_that_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"alone.*dni_fx\.distributed\.start\(\)") as caught:
        make_trainer()
    assert len(caught) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer()
        monkeypatch.undo()
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        make_trainer()


class _Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if int((hidden > 1e9).sum().item()) > 5:
            hidden = hidden * 2
        return self.last(hidden)  # type: ignore[no-any-return]


def test_a_failed_export_is_told_once(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(DecouplingError, match="data-dependent"):
            dni_fx.decouple(_Reads(), ["first"], example_inputs=(X,))
        assert not logger.disabled
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.name == logger.name]
    assert capfd.readouterr().err == ""
