"""An ordinary loop over the drop-in gives the trainer's bits, for every source and kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal, frozen, state_of
from ..helpers.optimisers import sgd
from ..models import cases, zoo
from ..models.cases import Case
from .kit import CASES, Chain, Mean

SOURCES = (
    "linear",
    "mlp",
    "conv",
    "auto",
    "local",
    "zero",
    "stale",
    "each:linear",
    "joint:local",
    "joint:linear",
)


def compared(
    case: Case,
    gradients: Any,
    drop_in: bool,
    steps: int = 3,
    classes: int = 6,
    wrong: bool = False,
    cast: bool = False,
) -> Any:
    """Outputs, losses, weights, buffers and sources of a few steps, the last one with a short
    batch.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cast)
    args, kwargs, target = oracles.draw(case, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        case.build(),
        list(case.cuts),
        example_inputs=args,
        example_kwargs=kwargs,
        gradients=gradients,
        check=False,
        context=dni_fx.one_hot(classes) if classes else None,
    )
    record: dict[str, Any] = {}
    if drop_in:
        m: Any = decoupled.as_module(unit=2.0 if wrong else 1.0)
        optimizer = sgd(list(m.named_parameters()))
    else:
        trainer = dni_fx.Trainer(decoupled, case.loss, optimizer=sgd)
    for step in range(steps):
        args, kwargs, target = oracles.draw(case, 4 if step < steps - 1 else 3, torch.float32, step)
        cases.seed_generator(step)
        if drop_in:
            with autocast, m.context(target if classes else None):
                output = m(*args, **kwargs)
                loss = case.loss(output, target)
            optimizer.zero_grad()
            with autocast:  # as in a step of the trainer inside a region
                loss.backward()
            optimizer.step()
        else:
            with autocast:
                report = trainer.step(*args, target=target, **kwargs)
            output, loss = report.outputs, report.loss
        record[f"{step}"] = {
            "output": frozen(output),
            "loss": loss.detach(),
            "model": state_of(decoupled.model),
            "sources": state_of(decoupled.synthesizers),
        }
    return record


PAIRS = [
    (case, gradients)
    for case in CASES
    for gradients in SOURCES
    if (gradients, case.name)
    not in {("each:linear", "skips"), ("conv", "skips"), ("conv", "encoder")}
]


@pytest.mark.parametrize(("case", "gradients"), PAIRS, ids=[f"{c.name}-{g}" for c, g in PAIRS])
def test_bits_of_the_trainer(case: Case, gradients: str) -> None:
    got, want = compared(case, gradients, True), compared(case, gradients, False)
    assert_bits_equal(got, want, f"{case.name}, {gradients}")


@pytest.mark.parametrize("gradients", ["linear", "local", "stale"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_of_the_trainer_under_autocast(case: Case, gradients: str) -> None:
    got, want = (
        compared(case, gradients, True, cast=True),
        compared(case, gradients, False, cast=True),
    )
    assert_bits_equal(got, want, f"{case.name}, {gradients}")
    assert got["0"]["output"].dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(
            got["1"]["model"], compared(case, gradients, True)["1"]["model"], "not cast"
        )


def test_a_wrong_unit_is_noticed() -> None:
    got, want = compared(CASES[0], "local", True, wrong=True), compared(CASES[0], "local", False)
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(got["1"]["model"], want["1"]["model"], "negative control")


REFUSED = "checkpoint_reentrant"


LAST_BITS = {
    "dense",
    "fan_out",
    "reused_in_three",
}  # values with three consumers: autograd adds up last stage first


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", [c for c in zoo.ZOO if c.name != REFUSED], ids=lambda case: case.name
)
def test_bits_of_the_trainer_for_every_kind_of_model(case: Case) -> None:
    got, want = (
        compared(case, "linear", True, classes=0),
        compared(case, "linear", False, classes=0),
    )
    if case.name in LAST_BITS:
        for (name, a), (_, b) in zip(
            cases.named_leaves(got), cases.named_leaves(want), strict=True
        ):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        got, want = ({k: {**v, "sources": None} for k, v in r.items()} for r in (got, want))
    assert_bits_equal(got, want, case.name)


@pytest.mark.parametrize("gradients", ["zero", "linear"])
def test_a_reentrant_checkpoint_is_refused(gradients: str) -> None:
    with pytest.raises((DecouplingError, RuntimeError), match="use_reentrant"):
        compared(zoo.BY_NAME[REFUSED], gradients, True, classes=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_is_backpropagation(case: Case) -> None:
    got = compared(case, "exact", True)
    model = case.build()
    optimizer = sgd(list(model.named_parameters()))
    for step in range(3):
        args, kwargs, target = oracles.draw(case, 4 if step < 2 else 3, torch.float32, step)
        cases.seed_generator(step)
        optimizer.zero_grad()
        case.loss(model(*args, **kwargs), target).backward()
        optimizer.step()
        assert_bits_equal(got[f"{step}"]["model"], state_of(model), f"step {step}")


def test_a_source_of_ones_own() -> None:
    case = Case("chain", Chain, cases.rows(6), ("0", "1"), cases.labels(3), F.cross_entropy)
    assert_bits_equal(compared(case, Mean, True), compared(case, Mean, False), "own source")
