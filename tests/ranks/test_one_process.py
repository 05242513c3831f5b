"""The distributed trainer without a process group: one process trains alone, and options that mean
nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError

from ..helpers.training import batch
from ..models.small import TOWERS
from . import kit


def alone(**options: Any) -> Any:
    return kit.trainer_of("linear", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue must be a whole number"),
        ({"policy": "drop"}, "policy must be 'wait' or 'drop_oldest'"),
        ({"staleness": 1, "policy": "drop_oldest"}, "needs policy='wait'"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ({"timeout": "1"}, "timeout must be a positive number"),
        ({"schedule": "threads"}, "schedules.Threads is for dni_fx.Trainer"),
        ({"schedule": "thread"}, "unknown schedule"),
        ({"placement": [0, 0]}, "placement has 2 entries for 4 stages"),
        ({"placement": [0, 0, 0, 1]}, "there are ranks 0 to 0"),
        ({"placement": [0, 0, 0, True]}, "names rank True"),
        ({"placement": [0, 0, 0, []]}, "at least one rank for each stage"),
        ({"placement": {"stage_0": 0}}, "leaves out"),
        ({"placement": {"stage0": 0}}, "did you mean"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecouplingError, match=re.escape(message)):
        kit.train(alone(**options), 1)


@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_one_process_trains_alone(staleness: int | None, tmp_path: Path) -> None:
    with alone(staleness=staleness) as trainer:
        kit.train(trainer, 9)
        x, _ = batch(0)
        assert torch.equal(trainer.forward(x), trainer.decoupled.model(x))
        assert trainer.gather().keys() == trainer.decoupled.model.state_dict().keys()
        assert "stage_3" in str(trainer.status())
        trainer.save_timeline(tmp_path / "timeline.json")
        assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
        assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]
        assert trainer.mean(float("nan")) != trainer.mean(1.0) == 1.0
    trainer.close()


WHOLE = ["diagnose", "diagnose_parameters", "true_gradients", "state_dict", "load_state_dict"]


@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_the_whole_model_is_not_offered(name: str) -> None:
    """No process has the other stages' weights of now, so it can neither measure nor save them."""
    assert callable(getattr(alone(alone=True), name))
    assert not hasattr(alone(), name)


def test_a_plan_needs_no_group() -> None:
    model, x = TOWERS.build(), batch(0)[0]
    decoupled = distributed.decouple(model, ["a"], example_inputs=(x,), gradients="zero")
    assert isinstance(decoupled, dni_fx.Decoupled)
    assert distributed.start() == 0
