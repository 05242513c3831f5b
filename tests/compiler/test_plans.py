"""Naming and planning: plans and code as text."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import CutError
from dni_fx.passes.cut import cutting, splitting
from dni_fx.passes.trace import tracing
from dni_fx.plan import CutPlan

from ..helpers.optimisers import sgd
from ..models.feedforward import FanOut, ResidualNet, UNet, mlp_chain, norm_dropout_chain
from ..models.zoo import BY_NAME


def test_digests() -> None:
    x = torch.randn(4, 6)

    def plan(model: nn.Module, x: Tensor = x, **options: Any) -> CutPlan:
        return dni_fx.plan_cuts(model, (x,), stages=2, costs="analytic", **options)

    first = plan(mlp_chain())
    assert plan(mlp_chain()) == first
    assert (
        plan(mlp_chain(), x=torch.randn(9, 6)) == first
    )  # batch size, weights and mode take no part
    assert plan(mlp_chain().eval()) == first
    assert hash(plan(mlp_chain())) == hash(first)
    assert plan(mlp_chain(), gradients="zero") != first
    assert plan(mlp_chain(), gradients="zero").digest == first.digest
    other = mlp_chain()
    other[3] = nn.Sigmoid()  # another layer under the same name is another graph
    assert plan(other).digest != first.digest
    assert plan(FanOut()).digest != first.digest


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("unet", "auto"),
        ("fan_out", "zero"),
        ("gpt", "stale"),
        ("mlp_chain", "exact"),
        ("mlp_chain", "joint:exact"),
    ],
)
def test_plans_as_json(name: str, gradients: str) -> None:
    case = BY_NAME[name]
    args, _ = case.inputs(4, torch.float32)
    plan = dni_fx.plan_cuts(case.build(), args, cuts=list(case.cuts), gradients=gradients)
    read = CutPlan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.to_json() == plan.to_json()
    assert read.report is None
    decoupled = dni_fx.decouple(case.build(), read, example_inputs=args)
    assert decoupled.plan == plan
    assert decoupled.is_exact == gradients.endswith("exact")
    assert decoupled.plan.interfaces == plan.interfaces


def test_a_plan_is_frozen() -> None:
    plan = dni_fx.plan_cuts(mlp_chain(), (torch.randn(4, 6),), stages=3)
    with pytest.raises(AttributeError):
        plan.cuts = ()  # type: ignore[misc]


def test_plans_print_as_a_table() -> None:
    case = BY_NAME["unet"]
    args, _ = case.inputs(4, torch.float32)
    text = str(dni_fx.decouple(case.build(), ["down2", "middle"], example_inputs=args).plan)
    lines = text.splitlines()
    assert lines[0].startswith("UNet: 3 stages, 2 cuts, graph ")
    (skip,) = [line.split() for line in lines if line.startswith("relu ") or "implied" in line][:1]
    assert "implied" in skip
    (row,) = [line for line in lines if line.startswith("down2 ")]
    assert "4 x 6 x 4 x 4" in row
    assert "conv" in row
    assert "implied" not in row
    assert "(output)" in text
    assert "self-check: equal to the model bit for bit" in text
    assert text == "\n".join(line.rstrip() for line in lines)
    assert sum(int(line.split()[2].rstrip("%")) for line in lines if line.startswith("stage_")) in (
        99,
        100,
        101,
    )


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7, 8, 50])
def test_a_number_of_stages(stages: int) -> None:
    decoupled = dni_fx.decouple(mlp_chain(), stages=stages, example_inputs=(torch.randn(4, 6),))
    plan = decoupled.plan
    possible = min(stages, 7)  # seven nodes
    assert len(decoupled.stages) == len(plan.stages) == len(plan.cuts) + 1 == possible
    assert plan.report is not None
    assert bool(plan.report.notes) == (stages > 7)
    if stages > 7:
        assert (
            "7 stages instead of 50" in plan.report.notes[0]
            or "instead of 8" in plan.report.notes[0]
        )
    sizes = [s.nodes for s in plan.stages]
    assert sum(sizes) == 7
    assert (
        dni_fx.decouple(mlp_chain(), list(plan.cuts), example_inputs=(torch.randn(4, 6),)).plan
        == plan
    )


def test_auto_is_four_stages() -> None:
    assert len(dni_fx.plan_cuts(mlp_chain(), (torch.randn(4, 6),)).stages) == 4
    assert len(dni_fx.decouple(mlp_chain(), example_inputs=(torch.randn(4, 6),)).stages) == 4


def test_cuts_may_come_in_any_order() -> None:
    plan = dni_fx.plan_cuts(mlp_chain(), (torch.randn(4, 6),), cuts=["3", "1"])
    assert plan.cuts == ("1", "3")


def test_cut_points_as_a_table() -> None:
    points = dni_fx.list_cut_points(UNet(), (torch.randn(2, 2, 8, 8),))
    by_name = {p.name: p for p in points}
    down1 = by_name["down1"]
    assert down1.legal
    assert down1.shape == (2, 4, 8, 8)
    assert down1.nbytes == 2 * 4 * 8 * 8 * 4
    assert down1.crossing == ("down1",)
    assert by_name["middle"].interfaces == 3  # the value and both skips
    assert by_name["middle"].nbytes == 4 * 2 * (6 * 2 * 2 + 6 * 4 * 4 + 4 * 8 * 8)
    lines = str(points).splitlines()
    assert lines[0].split()[:2] == ["cut", "after"]
    assert len(lines) == len(points) + 2
    assert "2 x 6 x 2 x 2" in str(points)
    model = mlp_chain()
    model[0].requires_grad_(False)
    frozen = str(dni_fx.list_cut_points(model, (torch.randn(4, 6),)))
    assert "illegal: no value on a trainable path" in frozen


@pytest.mark.parametrize(
    "name",
    ["mlp_chain", "unet", "fan_out", "gpt", "nested_input", "dict_output", "autocast_inside"],
)
def test_emitted_code_is_python_that_reads_like_a_loop(name: str) -> None:
    case = BY_NAME[name]
    args, kwargs = case.inputs(4, torch.float32)
    decoupled = dni_fx.decouple(
        case.build(), list(case.cuts), example_inputs=args, example_kwargs=kwargs, check=False
    )
    for stage in decoupled.stages:
        (function,) = ast.parse(stage.code).body
        assert isinstance(function, ast.FunctionDef)
        assert [a.arg for a in function.args.args] == [
            "self",
            "inputs",
            "context",
            "loss",
            "target",
        ]
        calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
        named = [c.id for c in calls if isinstance(c, ast.Name)]
        assert named.count("pull_back") == 1
        assert named.count("StepResult") == 1
        assert [c.attr for c in calls if isinstance(c, ast.Attribute)].count("stage") == 1
        assert ("evaluate" in named) == (stage is decoupled.stages[-1])
        assert "= None" not in stage.code.replace("context = None", "").replace(
            "loss = None", ""
        ).replace("target = None", "")
        crossing = len(stage.inputs) + len(stage.outputs)
        assert len(stage.code.splitlines()) <= 6 + 8 * crossing
        assert "dni_fx_" not in stage.code
        assert "import" not in stage.code


def test_the_code_of_a_chain() -> None:
    decoupled = dni_fx.decouple(mlp_chain(), ["1", "3"], example_inputs=(torch.randn(4, 6),))
    code = decoupled.stages[1].code
    order = [
        "inputs['1']",
        "self.stage(",
        'getattr(self.sources, "3")',
        "pull_back(",
        "return StepResult(",
    ]
    places = [code.find(word) for word in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)


def test_names_with_dots_are_the_same_everywhere() -> None:
    x = torch.randn(4, 6)
    decoupled = dni_fx.decouple(
        ResidualNet(),
        ["blocks.0", "blocks.1.fc1"],
        example_inputs=(x,),
        gradients={"blocks.0": "zero"},
    )
    name = "blocks.0"
    assert name in decoupled.plan.cuts
    assert dict(decoupled.plan.gradients)[name] == "zero"
    assert decoupled.stages[0].outputs == (name,)
    assert "blocks/0" in decoupled.synthesizers
    trainer = dni_fx.Trainer(
        decoupled, lambda output, target: F.mse_loss(output, target), optimizer=sgd
    )
    report = trainer.step(x, target=torch.zeros_like(decoupled.model(x)))
    assert name in report.interfaces
    assert name in trainer.true_gradients(x, target=torch.zeros_like(report.outputs))


def test_tracing_in_other_contexts() -> None:
    """Inside no_grad, inference-like evaluation and autocast the same stages come out."""
    x = torch.randn(4, 6)
    plan = dni_fx.plan_cuts(norm_dropout_chain(), (x,), stages=3, costs="analytic")
    with torch.no_grad():
        assert dni_fx.plan_cuts(norm_dropout_chain(), (x,), stages=3, costs="analytic") == plan
        quiet = dni_fx.decouple(norm_dropout_chain(), stages=3, example_inputs=(x,))
    assert quiet(x).requires_grad
    assert torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        cast = dni_fx.decouple(norm_dropout_chain(), stages=3, example_inputs=(x,))
    assert cast(x).dtype == torch.float32


def test_a_split_that_goes_in_circles_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    flow = cutting.find_flow(tracing.trace_calls(model, (torch.randn(2, 3),), {}))
    first, second, third = (n for n in flow.nodes if flow.is_computed(n))
    with pytest.raises(CutError, match="circle"):
        splitting.split_stages(flow, {first: 0, second: 1, third: 0})
    with pytest.raises(CutError, match="runs earlier"):
        splitting.split_stages(flow, {first: 1, second: 0, third: 2})


def test_layers_dropped_by_a_draw_are_drawn_anew_in_every_step() -> None:
    """LayerDrop reads a random tensor: its module is one opaque node in training, and drops what
    eager drops.
    """

    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                if not self.training or torch.rand([]) >= 0.4:
                    x = x + torch.tanh(layer(x))
            return x

    model, x = nn.Sequential(nn.Linear(4, 4), LayerDrop(), nn.Linear(4, 2)), torch.randn(3, 4)
    decoupled = dni_fx.decouple(model, ["0", "1"], example_inputs=(x,), gradients="exact")
    dropped = set()
    for seed in range(4):
        runs = []
        for module in (model, decoupled):
            model.zero_grad()
            torch.manual_seed(seed)
            output = module(x)
            output.sum().backward()
            runs.append([output, *(p.grad for p in model.parameters())])
        for want, got in zip(*runs, strict=True):
            assert (want is None) == (got is None)
            assert want is None or torch.equal(want, got)
        dropped.add(tuple(value is None for value in runs[0]))
    assert len(dropped) > 1
    model.eval()
    assert torch.equal(decoupled.eval()(x), model(x))
