"""Bad inputs and plans: one clear error, and nothing has changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dni_fx
from dni_fx.errors import CutError, DecouplingError, PlanMismatchError
from dni_fx.passes.trace.settings import FAKES
from dni_fx.sources import Linear

from ..helpers.optimisers import sgd
from ..helpers.refusing import refused
from ..models.feedforward import mlp_chain
from .refusals import Named, X, Y, decouple, make_trainer, refused_step

CUTS = ["1", "3"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"example_inputs": X}, ["(x,)"]),
        ({"example_inputs": (X[:0],)}, ["empty batch", "(0, 6)"]),
        ({"example_inputs": ()}, ["input"]),
        ({"example_inputs": (X, X)}, ["positional arguments"]),
        ({"example_inputs": (X[:, :5],)}, ["'0'", "4x5"]),
        ({"example_inputs": (X.double(),)}, ["Double"]),
        ({"example_inputs": (None,)}, ["NoneType"]),
        ({"example_kwargs": [1]}, ["example_kwargs"]),
        ({"example_kwargs": {"nothing": X}}, ["nothing"]),
        ({"inputs": "liner"}, ["liner", "linear"]),
    ],
    ids=[
        "tensor",
        "empty batch",
        "none",
        "two",
        "features",
        "dtype",
        "no tensor",
        "kwargs",
        "keyword",
        "inputs",
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_examples_that_the_model_refuses(
    options: dict[str, Any], words: list[str], check: bool
) -> None:
    call = {"cuts": ["1"], "example_inputs": (X,), "check": check, **options}
    refused(DecouplingError, lambda: dni_fx.decouple(mlp_chain(), **call), *words)


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((X.double(),), {}, "Double"),
        ((X.long(),), {}, "Long"),
        ((X[:, :5],), {}, "4x5"),
        ((X[None],), {}, ""),
        ((), {}, "input"),
        ((X, X), {}, "positional arguments"),
        ((X,), {"nothing": X}, "nothing"),
        ((None,), {}, "NoneType"),
        (([1.0],), {}, "list"),
        ((X[:0],), {}, "empty batch"),
    ],
    ids=[
        "double",
        "integer",
        "features",
        "rank",
        "none",
        "two",
        "keyword",
        "None",
        "list",
        "empty batch",
    ],
)
def test_a_step_on_inputs_that_do_not_fit(
    args: Any, kwargs: Any, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    refused_step(
        DecouplingError,
        trainer,
        lambda: trainer.step(*args, target=torch.zeros(4, 3), **kwargs),
        word,
    )
    trainer.step(X, target=torch.zeros(4, 3))  # and it goes on
    assert not caplog.records  # the error says it all


def test_torch_would_log_what_its_fake_tensors_refuse(caplog: pytest.LogCaptureFixture) -> None:
    """The control of what is not logged."""
    with pytest.raises(RuntimeError, match="reduction dim"), FakeTensorMode():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert [record.name for record in caplog.records] == [FAKES]


def test_inputs_that_the_model_takes_but_the_sources_cannot_serve() -> None:
    trainer = dni_fx.Trainer(decouple(), F.mse_loss, optimizer=sgd)
    assert trainer.decoupled(X[None]).shape == (1, 4, 3)  # evaluated on a graph of its own
    refused_step(
        DecouplingError,
        trainer,
        lambda: trainer.step(X[None], target=torch.zeros(1, 4, 3)),
        "(4, 8)",
        "(1, 4, 8)",
    )


def test_the_plan_before_tracing() -> None:
    decoupled = dni_fx.decouple(mlp_chain(), CUTS)
    for ask in ("plan", "stages", "interfaces", "sources"):
        refused(
            DecouplingError,
            lambda ask=ask: getattr(decoupled, ask),
            "not traced yet",
            "example_inputs=",
        )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    refused(DecouplingError, lambda: trainer.load_state_dict({}), "not traced yet")
    trainer.step(X, target=Y)
    assert decoupled.plan.cuts == ("1", "3")


def test_a_plan_for_another_graph() -> None:
    plan = decouple(["encoder"], Named()).plan
    refused(
        PlanMismatchError, lambda: decouple(plan), "Named", "Sequential", plan.digest, "plan_cuts"
    )
    refused(PlanMismatchError, lambda: dni_fx.decouple(mlp_chain(), plan)(X), plan.digest)


def test_a_plan_from_json_has_no_report() -> None:
    plan = dni_fx.CutPlan.from_json(decouple().plan.to_json())
    for ask in ("interfaces", "stages"):
        refused(DecouplingError, lambda ask=ask: getattr(plan, ask), "JSON", "decouple")
    assert "after 1" in str(plan)
    assert decouple(plan).plan == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", ["JSON"]),
        ("", ["JSON"]),
        ("[]", ["format"]),
        ("null", ["format"]),
        ({"format": "other"}, ["format"]),
        ({"version": 2}, ["version 2", "version 1"]),
        ({"version": None}, ["version"]),
        ({"cuts": "layer"}, ["'cuts'"]),
        ({"cuts": [1]}, ["'cuts'"]),
        ({"digest": None}, ["'digest'"]),
        ({"gradients": []}, ["'gradients'"]),
        ({"gradients": {"1": 3}}, ["'gradients'"]),
    ],
    ids=str,
)
def test_broken_plans(change: Any, words: list[str]) -> None:
    text = (
        change
        if isinstance(change, str)
        else json.dumps({**json.loads(decouple().plan.to_json()), **change})
    )
    refused(DecouplingError, lambda: dni_fx.CutPlan.from_json(text), *words)


@pytest.mark.parametrize("text", [None, 3, b"\xff", {"format": "dni_fx cut plan"}], ids=repr)
def test_plans_that_are_no_text(text: Any) -> None:
    refused(DecouplingError, lambda: dni_fx.CutPlan.from_json(text), "plan")


def test_a_plan_whose_cuts_were_edited() -> None:
    content = json.loads(decouple().plan.to_json())
    content["cuts"] = ["1", "thre"]
    refused(CutError, lambda: decouple(dni_fx.CutPlan.from_json(json.dumps(content))), "'thre'")


def test_a_plan_made_with_a_factory_asks_for_it() -> None:
    class Own(Linear):
        pass

    plan = decouple(gradients=Own).plan
    refused(
        DecouplingError,
        lambda: decouple(dni_fx.CutPlan.from_json(plan.to_json())),
        "Own",
        "gradients=",
    )
    assert isinstance(decouple(plan, gradients=Own).sources["1"], Own)
