"""An ordinary loop over the drop-in gives the trainer's bits, for every kind of model; for every
source: ``tests/matrix/``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError

from ..helpers.comparing import assert_bits_equal, frozen, state_of
from ..helpers.optimisers import sgd
from ..helpers.oracles import draw, transform
from ..helpers.training import decoupled_of
from ..models.cases import Case, named_leaves, seed_generator
from ..models.small import CHAIN, CONVOLUTIONS, DROPOUT, TIED
from ..models.zoo import BY_NAME, ZOO
from .kit import Mean

PLAINLY = torch.autocast("cpu", enabled=False)
EVERY_KIND = pytest.mark.parametrize(
    "case", [CONVOLUTIONS, DROPOUT, TIED], ids=lambda case: case.name
)


def by_trainer(case: Case, decoupled: dni_fx.Decoupled, autocast: Any = PLAINLY) -> dict[str, Any]:
    """What three steps of the trainer give, the last one with a short batch."""
    trainer, record = dni_fx.Trainer(decoupled, case.loss, optimizer=sgd), {}
    for step, size in enumerate((4, 4, 3)):
        args, kwargs, target = draw(case, size, torch.float32, step)
        seed_generator(step)
        with autocast:
            report = trainer.step(*args, target=target, **kwargs)
        record[f"{step}"] = noted(decoupled, report.outputs, report.loss)
    return record


def by_loop(
    case: Case,
    decoupled: dni_fx.Decoupled,
    autocast: Any = PLAINLY,
    unit: float = 1.0,
) -> dict[str, Any]:
    """The same of an ordinary loop over the drop-in."""
    module: Any = decoupled.as_module(unit=unit)
    optimizer, record = sgd(list(module.named_parameters())), {}
    for step, size in enumerate((4, 4, 3)):
        args, kwargs, target = draw(case, size, torch.float32, step)
        seed_generator(step)
        optimizer.zero_grad()
        with autocast:  # backward, too, as in a step of the trainer inside a region
            with module.context(target):
                output = module(*args, **kwargs)
            loss = case.loss(output, target)
            loss.backward()
        optimizer.step()
        record[f"{step}"] = noted(decoupled, output, loss)
    return record


def noted(decoupled: dni_fx.Decoupled, output: Any, loss: torch.Tensor) -> dict[str, Any]:
    return {
        "output": frozen(output),
        "loss": loss.detach(),
        "model": state_of(decoupled.model),
        "sources": state_of(decoupled.synthesizers),
    }


@EVERY_KIND
@pytest.mark.parametrize("gradients", ["linear", "local", "stale"])
def test_bits_of_the_trainer_under_autocast(case: Case, gradients: str) -> None:
    cast = torch.autocast("cpu", torch.bfloat16)
    got = by_loop(case, decoupled_of(gradients, case), cast)
    want = by_trainer(case, decoupled_of(gradients, case), cast)
    assert_bits_equal(got, want, f"{case.name}, {gradients}")
    assert got["0"]["output"].dtype == torch.bfloat16
    not_cast = by_loop(case, decoupled_of(gradients, case))
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(got["1"]["model"], not_cast["1"]["model"], "not cast")


def test_a_wrong_unit_is_noticed() -> None:
    got = by_loop(CONVOLUTIONS, decoupled_of("local", CONVOLUTIONS), unit=2.0)
    want = by_trainer(CONVOLUTIONS, decoupled_of("local", CONVOLUTIONS))
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(got["1"]["model"], want["1"]["model"], "negative control")


REFUSED = "checkpoint_reentrant"
# Values with three consumers: autograd adds up last stage first.
LAST_BITS = {"dense", "fan_out", "reused_in_three"}


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", [case for case in ZOO if case.name != REFUSED], ids=lambda case: case.name
)
def test_bits_of_the_trainer_for_every_kind_of_model(case: Case) -> None:
    got = by_loop(case, transform(case, torch.float32, "linear"))
    want = by_trainer(case, transform(case, torch.float32, "linear"))
    if case.name in LAST_BITS:
        for (name, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        got, want = ({k: {**v, "sources": None} for k, v in r.items()} for r in (got, want))
    assert_bits_equal(got, want, case.name)


@pytest.mark.parametrize("gradients", ["zero", "linear"])
def test_a_reentrant_checkpoint_is_refused(gradients: str) -> None:
    case = BY_NAME[REFUSED]
    with pytest.raises((DecouplingError, RuntimeError), match="use_reentrant"):
        by_loop(case, transform(case, torch.float32, gradients))


@EVERY_KIND
def test_exact_is_backpropagation(case: Case) -> None:
    got = by_loop(case, decoupled_of("exact", case))
    model: nn.Module = case.build()
    optimizer = sgd(list(model.named_parameters()))
    for step, size in enumerate((4, 4, 3)):
        args, kwargs, target = draw(case, size, torch.float32, step)
        seed_generator(step)
        optimizer.zero_grad()
        case.loss(model(*args, **kwargs), target).backward()
        optimizer.step()
        assert_bits_equal(got[f"{step}"]["model"], state_of(model), f"step {step}")


def test_a_source_of_ones_own() -> None:
    got = by_loop(CHAIN, decoupled_of(Mean, CHAIN))
    assert_bits_equal(got, by_trainer(CHAIN, decoupled_of(Mean, CHAIN)), "own source")
