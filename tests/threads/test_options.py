"""What cannot be trained on threads, and options that mean nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time
from dni_fx.schedules import Calibration, Threads, WarmUp

from ..helpers.optimisers import adam
from ..helpers.training import batch
from ..models.cases import Case
from ..models.small import SHARED_STATISTICS, TIED
from .kit import stage_threads, train, trainer_of


@pytest.mark.parametrize("case", [TIED, SHARED_STATISTICS], ids=lambda case: case.name)
def test_what_several_stages_write_to_is_refused(case: Case) -> None:
    trainer = trainer_of(Threads(staleness=0), case=case)
    x, y = batch(0)
    with pytest.raises(DecouplingError, match=r"(weight|norm).* is used by several stages"):
        trainer.step(x, target=y)
    assert stage_threads() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue must be a whole number of batches, at least 1, not 0"),
        ({"queue": 1.5}, "queue must be a whole number"),
        ({"queue": True}, "queue must be a whole number"),
        ({"policy": "drop"}, "policy must be 'wait' or 'drop_oldest', not 'drop'"),
        ({"staleness": -1}, "staleness must be a whole number of steps, 0 or more, not -1"),
        ({"staleness": True}, "staleness must be a whole number"),
        ({"staleness": 1, "policy": "drop_oldest"}, "needs policy='wait'"),
        ({"discount": 0}, "discount must be above 0 and at most 1, not 0"),
        ({"discount": 1.5}, "discount must be above 0"),
        ({"discount": "1"}, "discount must be above 0"),
        ({"then": "sequental"}, "unknown schedule 'sequental'; did you mean 'sequential'"),
        ({"then": Threads()}, r"[Tt]hreads"),
        ({"then": "threads"}, r"[Tt]hreads"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecouplingError, match=message):
        Threads(**options)


def test_threads_are_no_part_of_another_schedule() -> None:
    for make in (partial(WarmUp, 2), partial(Calibration, 3)):
        for then in (Threads(), "threads"):
            with pytest.raises(DecouplingError, match=r"[Tt]hreads"):
                train(trainer_of(make(then=then)), 2)


def test_threads_by_name() -> None:
    trainer = train(trainer_of("threads"), 3)
    assert len(stage_threads()) == 4
    assert isinstance(trainer.schedule, Threads)


def test_windows_are_not_trained_on_threads() -> None:
    options: dict[str, Any] = {"loss": F.mse_loss, "optimizer": adam, "schedule": Threads()}
    with pytest.raises(TypeError, match="unexpected keyword argument 'schedule'"):
        decouple_through_time(nn.LSTM(3, 4), 5, **options)
