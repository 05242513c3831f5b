"""The zoo against the oracles, and each oracle against something broken."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.passes.cut import emission
from dni_fx.runtime.emitted import pull_back
from dni_fx.schedules import WarmUp
from dni_fx.sources import Mix

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam, sgd
from ..helpers.paths import ROOT
from ..models.cases import Case, rows
from ..models.feedforward import ResidualNet
from ..models.zoo import BY_NAME, ZOO

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)
OPTIMIZERS = pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
EVERY_CASE = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


@functools.cache
def backprop(name: str, dtype: torch.dtype, optimizer: oracles.Optimizers) -> oracles.Record:
    return oracles.backprop_run(BY_NAME[name], dtype, optimizer)


@pytest.mark.matrix
@DTYPES
@OPTIMIZERS
@EVERY_CASE
def test_exact_equals_backprop(
    case: Case, optimizer: oracles.Optimizers, dtype: torch.dtype
) -> None:
    got = oracles.exact_run(case, dtype, optimizer)
    assert_bits_equal(got, backprop(case.name, dtype, optimizer), f"{case.name}: exact mode")


@pytest.mark.matrix
@OPTIMIZERS
@EVERY_CASE
def test_a_share_of_one_equals_backprop(case: Case, optimizer: oracles.Optimizers) -> None:
    """BP(λ) with λ = 1, source by source, and as a schedule with sources in shadow."""
    want = backprop(case.name, torch.float32, optimizer)
    mix = functools.partial(Mix, source="mlp", share=1.0)
    got = oracles.decoupled_run(case, torch.float32, optimizer, gradients=mix)
    assert_bits_equal(got, want, f"{case.name}: mix")
    got = oracles.decoupled_run(
        case, torch.float32, optimizer, gradients="mlp", schedule=WarmUp(steps=100)
    )
    assert_bits_equal(got, want, f"{case.name}: shadow mode")


def test_the_oracle_sees_a_share_of_less_than_one() -> None:
    mix = functools.partial(Mix, source="mlp", share=1 - 1e-6)
    must_fail(
        lambda: compare(oracles.decoupled_run(FAN, torch.float32, sgd, gradients=mix)),
        says="weight",
    )


@pytest.mark.matrix
@DTYPES
@OPTIMIZERS
@EVERY_CASE
def test_replay_equals_backprop(
    case: Case, optimizer: oracles.Optimizers, dtype: torch.dtype
) -> None:
    got = oracles.replay_run(case, dtype, optimizer)
    assert_bits_equal(got, backprop(case.name, dtype, optimizer), f"{case.name}: replay")


@pytest.mark.matrix
@DTYPES
@EVERY_CASE
def test_composed_stages_equal_the_model(case: Case, dtype: torch.dtype) -> None:
    batches = (4, 6, 1) if dtype is torch.float32 else (3,)
    assert oracles.composed_check(case, dtype, batches=batches) >= len(batches)


@pytest.mark.matrix
@EVERY_CASE
def test_nothing_crosses_before_fit(case: Case) -> None:
    assert oracles.nothing_crosses(case, torch.float32) > 0


@pytest.mark.matrix
@EVERY_CASE
def test_cut_at_every_legal_place_at_once(case: Case) -> None:
    model = case.build()
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    points = dni_fx.list_cut_points(model, args, example_kwargs=kwargs)
    places = {
        point.crossing: point.name for point in points if point.legal
    }  # one name for each place
    everywhere = dataclasses.replace(case, cuts=tuple(places.values()))
    want = oracles.backprop_run(case, torch.float32, sgd, steps=2)
    for run in (oracles.exact_run, oracles.replay_run):
        assert_bits_equal(
            run(everywhere, torch.float32, sgd, steps=2),
            want,
            f"{case.name}: {run.__name__}",
        )


def plan_of(case: Case) -> dni_fx.CutPlan:
    return oracles.transform(case, torch.float32, "zero").plan


@pytest.mark.matrix
@EVERY_CASE
def test_plan_is_the_same_on_retrace(case: Case) -> None:
    first, second = plan_of(case), plan_of(case)
    assert first == second
    assert first.digest == second.digest
    assert first.to_json() == second.to_json()
    assert type(first).from_json(first.to_json()) == first


HASHED = ("unet", "fan_out", "tied_language_model", "views", "nested_input", "routing")
PRINT_PLANS = """
import sys, warnings
warnings.simplefilter("ignore")
from tests.models.zoo import BY_NAME
from tests.compiler.test_oracles import HASHED, plan_of
for name in HASHED:
    plan = plan_of(BY_NAME[name])
    print(plan.to_json(), plan, sep="\\n")
"""


def test_plans_do_not_depend_on_the_hash_seed() -> None:
    started = []
    for seed in ("0", "1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", PRINT_PLANS]
        started.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(printed[0]) > 1000
    assert printed[0] == printed[1] == printed[2]


@pytest.mark.matrix
@EVERY_CASE
def test_the_self_check_passes(case: Case) -> None:
    """The check that users get by default finds nothing wrong, and leaves model and generator as
    they were.
    """
    model = case.build()
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    state, names, random = state_of(model), list(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    dni_fx.decouple(model, list(case.cuts), example_inputs=args, example_kwargs=kwargs)
    assert_bits_equal(state_of(model), state, f"{case.name}: state after decoupling")
    assert_bits_equal(torch.get_rng_state(), random, f"{case.name}: generator after decoupling")
    assert list(model.state_dict()) == names
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


# Negative controls: what is broken must be seen to be broken.
# ---------------------------------------------------------


def must_fail(run: Callable[[], Any], *, says: str) -> None:
    """The oracle fails, with a message that names what is wrong."""
    with pytest.raises(AssertionError, match=says):
        run()


FAN = BY_NAME["fan_out"]


def compare(got: oracles.Record, case: Case = FAN) -> None:
    assert_bits_equal(got, backprop(case.name, torch.float32, sgd), "control")


def test_bitwise_comparison_sees_a_bit() -> None:
    zero, other = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert_bits_equal(
        {"a": [torch.tensor(float("nan"))]}, {"a": [torch.tensor(float("nan"))]}, "nan"
    )
    must_fail(
        lambda: assert_bits_equal({"a": zero}, {"a": other}, "sign"),
        says=r"sign.*\n.*\['a'\]",
    )
    must_fail(lambda: assert_bits_equal([zero], [zero.double()], "dtype"), says="float64")
    must_fail(lambda: assert_bits_equal([zero], [None], "none"), says="None")
    must_fail(lambda: assert_bits_equal([zero], [zero, zero], "length"), says="length")


@pytest.mark.parametrize("factor", [0.0, 1 + 1e-6])
def test_replay_oracle_sees_a_slightly_wrong_gradient(factor: float) -> None:
    def wrong(decoupled: dni_fx.Decoupled, *step: Any) -> None:
        oracles.hand_over_true_gradients(decoupled, *step)
        source = oracles.source_of(decoupled, "a")
        source.gradients = tuple(gradient * factor for gradient in source.gradients)

    must_fail(
        lambda: compare(oracles.replay_run(FAN, torch.float32, sgd, before_step=wrong)),
        says="a.weight",
    )


def drop_one(roots: Any, gradients: Any, retain_graph: bool = False) -> None:
    """A pull-back that forgets what later stages sent for a stage's own input."""
    pull_back(roots[:1], gradients[:1], retain_graph)


def one_by_one(roots: Any, gradients: Any, retain_graph: bool = False) -> None:
    """A pull-back that is right, but adds partial gradients in another order than autograd."""
    for root, gradient in zip(roots, gradients, strict=True):
        if gradient is not None and root.requires_grad:
            root.backward(gradient, retain_graph=True)


@pytest.mark.parametrize("broken", [drop_one, one_by_one], ids=lambda function: function.__name__)
def test_exact_oracle_sees_a_broken_pull_back(
    broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emission, "pull_back", broken)
    # what does not arrive at all is seen by the step itself
    with pytest.raises((AssertionError, dni_fx.DecouplingError), match="weight"):
        compare(oracles.exact_run(FAN, torch.float32, sgd))


def test_composed_oracle_sees_another_operator() -> None:
    decoupled = oracles.transform(FAN, torch.float32, "zero")
    graph = decoupled.stages[1].module
    (node,) = [node for node in graph.graph.nodes if node.name == "tanh"]
    node.op, node.target = "call_function", torch.sin
    graph.recompile()
    must_fail(
        lambda: oracles.composed_check(FAN, torch.float32, decoupled=decoupled), says="outputs"
    )


def test_composed_oracle_sees_a_lost_update_of_buffers() -> None:
    case = BY_NAME["norm_dropout_chain"]
    decoupled = oracles.transform(case, torch.float32, "zero")
    norm: Any = decoupled.model.get_submodule("1")
    norm.momentum = 0.2
    must_fail(
        lambda: oracles.composed_check(case, torch.float32, decoupled=decoupled),
        says="running_mean",
    )


def test_crossing_oracle_sees_true_gradients() -> None:
    must_fail(
        lambda: oracles.nothing_crosses(FAN, torch.float32, gradients="exact"), says="stem.weight"
    )


def test_plan_comparison_sees_another_graph() -> None:
    class Wider(ResidualNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.0

    residual = BY_NAME["residual"]
    other = Case("other", Wider, rows(6), residual.cuts)
    assert plan_of(other) != plan_of(residual)
    assert plan_of(other).digest != plan_of(residual).digest


def test_training_oracle_sees_another_seed_and_a_parameter_stepped_twice() -> None:
    case = BY_NAME["norm_dropout_chain"]
    other = oracles.backprop_run(case, torch.float32, sgd, seed=1)
    must_fail(lambda: compare(other, case), says="outputs")
    model: nn.Module = case.build()
    grads: oracles.Record = {}
    optimizer = oracles.recording(sgd, grads)(model.named_parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    must_fail(optimizer.step, says="stepped twice")


def test_plans_print_as_json() -> None:
    assert json.loads(plan_of(FAN).to_json())
