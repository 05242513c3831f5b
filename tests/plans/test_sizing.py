"""``"auto"`` is the fullest form within a quarter of its stage's time, and the plan says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.passes.search.probes import FLOPS_PER_SECOND
from dni_fx.plan import CutPlan, TensorSpec
from dni_fx.sources import SOURCES, Auto, auto_forms, auto_name, base_name, make_source

from ..sources.regressions import KINDS, spec_of

ONE_HOT = dni_fx.one_hot(10)
LABELS = TensorSpec((4, 3), torch.float32)


def wide(width: int = 256, per_stage: int = 1) -> nn.Sequential:
    """Three stages of so many layers each."""

    def layer() -> list[nn.Module]:
        return [nn.Linear(width, width), nn.ReLU()]

    stages = [nn.Sequential(*(m for _ in range(per_stage) for m in layer())) for _ in range(3)]
    return nn.Sequential(*stages[:2], nn.Sequential(*stages[2], nn.Linear(width, 10)))


def planned(model: nn.Module, x: Tensor, cuts: Any = ("0", "1"), **options: Any) -> CutPlan:
    options = {"context": ONE_HOT} | options
    return dni_fx.plan_cuts(model, (x,), cuts=list(cuts), **options)


def kinds(plan: CutPlan) -> list[str]:
    return [kind for _, kind in plan.gradients]


def share_of(plan: CutPlan, interface: str) -> float:
    """Arithmetic of the source over its stage's time, reckoned from the plan's tables."""
    assert plan.report is not None
    source = plan.report.sources[interface]
    producer = next(i.producer for i in plan.interfaces if i.name == interface)
    cost = plan.stages[producer].cost
    assert cost is not None
    assert source.flops is not None
    work = 3 * source.flops / FLOPS_PER_SECOND + 32 * source.parameters / 1e10
    return work / (cost.forward + cost.backward + cost.update)


def test_a_layer_gets_a_low_rank_within_a_quarter_and_the_next_rank_does_not_fit() -> None:
    plan = planned(wide(), torch.randn(256, 256))
    for name, kind in plan.gradients:
        rank = int(re.fullmatch(r"linear\(rank=(\d+)\)", kind)[1])  # type: ignore[index]
        assert share_of(plan, name) <= 0.25
        larger = planned(wide(), torch.randn(256, 256), gradients=f"linear(rank={2 * rank})")
        assert share_of(larger, name) > 0.25
        assert f"source at {name!r}: {kind!r} takes" in str(plan)
    assert "'linear' would take" in str(plan)


def test_a_full_source_stays_where_it_fits() -> None:
    plan = planned(wide(per_stage=6), torch.randn(256, 256))
    assert kinds(plan) == ["linear", "linear"]
    assert "source at" not in str(plan)
    made = dni_fx.decouple(
        wide(per_stage=6), plan, example_inputs=(torch.randn(256, 256),), context=ONE_HOT
    )
    assert kinds(made.plan) == kinds(plan)


def test_what_is_asked_for_is_not_touched() -> None:
    x = torch.randn(256, 256)
    for asked in ("linear", "linear(rank=128)", "mlp"):
        assert set(kinds(planned(wide(), x, gradients=asked))) == {asked}
    some = planned(wide(), x, gradients={"0": "linear"})
    assert dict(some.gradients)["0"] == "linear"
    assert "rank=" in dict(some.gradients)["1"]


def test_narrow_values_have_one_form_and_arithmetic_alone_counts() -> None:
    """On small values the calls are nearly all of the time, of which no form saves any."""
    assert kinds(planned(wide(8), torch.randn(4, 8))) == ["linear", "linear"]
    assert kinds(planned(wide(32), torch.randn(4, 32))) == ["linear", "linear"]


class Two(nn.Module):
    """One value crosses, or two alike, of one stage."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.a, self.b, self.head = (nn.Linear(256, n) for n in (256, 256, 10))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first).relu()
        return self.head(second + first if self.both else second)


def test_values_of_one_stage_share_the_quarter() -> None:
    x = torch.randn(256, 256)
    one, two = (planned(Two(both), x, ["b"]) for both in (False, True))
    assert len(one.interfaces) == 1
    assert len(two.interfaces) == 2
    assert sum(share_of(two, i.name) for i in two.interfaces) <= 0.25
    ranks = [min(int(re.search(r"\d+", k)[0]) for k in kinds(p)) for p in (one, two)]  # type: ignore[index]
    assert ranks[0] > ranks[1]


def test_where_no_form_fits_the_plan_says_so() -> None:
    """An embedding only looks up; its value is wide, and moving it costs more than that."""
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    plan = planned(model, torch.randint(50, (64, 32)), ["0"])
    assert kinds(plan) != ["linear"]
    assert "no form takes a quarter or less" in str(plan)


def test_maps_get_depthwise_convolutions() -> None:
    layer = lambda a: nn.Sequential(nn.Conv2d(a, 32, 3, padding=1), nn.ReLU())  # noqa: E731
    model = nn.Sequential(layer(32), layer(32), nn.Flatten(), nn.Linear(32 * 64, 10))
    plan = planned(model, torch.randn(16, 32, 8, 8))
    assert all(kind.startswith("conv(depthwise=True") for kind in kinds(plan))
    assert all(share_of(plan, i.name) <= 0.25 for i in plan.interfaces)


@pytest.mark.parametrize(
    "costs", ["measured", {"0": 1.0, "1": 1.0, "2": 1.0}], ids=["measured", "given"]
)
def test_forms_do_not_depend_on_how_nodes_are_weighed(costs: Any) -> None:
    x = torch.randn(256, 256)
    want = planned(wide(), x)
    got = planned(wide(), x, costs=costs)
    made = dni_fx.decouple(wide(), ["0", "1"], example_inputs=(x,), context=ONE_HOT)
    assert kinds(got) == kinds(want) == kinds(made.plan)
    if costs == "measured":
        return  # times are compared in no test
    (cheap, dear) = (planned(wide(), x, costs=costs, gradients=g) for g in ("auto", "linear"))
    for small, large in zip(cheap.stages[:2], dear.stages[:2], strict=True):
        assert small.cost is not None
        assert large.cost is not None
        assert 0 < small.cost.sources < large.cost.sources


def test_a_search_pays_for_the_form_that_is_taken() -> None:
    x = torch.randn(256, 256)
    plan = dni_fx.plan_cuts(wide(per_stage=2), (x,), stages=3, context=ONE_HOT)
    dear = dni_fx.plan_cuts(wide(per_stage=2), (x,), stages=3, context=ONE_HOT, gradients="linear")
    assert plan.report is not None
    assert dear.report is not None
    assert plan.report.search.slowest < dear.report.search.slowest  # type: ignore[union-attr]
    assert dni_fx.plan_cuts(wide(per_stage=2), (x,), stages=3, context=ONE_HOT) == plan
    read = CutPlan.from_json(plan.to_json())
    made = dni_fx.decouple(wide(per_stage=2), read, example_inputs=(x,), context=ONE_HOT)
    assert made.plan == plan


def test_sized_sources_learn() -> None:
    """Better than the last stage by itself."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    y = x[:, :10].argmax(1)
    rates = {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, 1e-3),
        "synthesizer_optimizer": lambda parameters: torch.optim.Adam(parameters, 3e-2),
    }
    losses = {}
    for gradients in ("auto", "zero"):
        torch.manual_seed(1)
        options = {"example_inputs": (x,), "context": ONE_HOT, "gradients": gradients}
        made = dni_fx.decouple(wide(64), ["0", "1"], **options)
        assert gradients == "zero" or all("rank" in kind for kind in kinds(made.plan))
        trainer = dni_fx.Trainer(made, F.cross_entropy, **rates)
        losses[gradients] = [float(trainer.step(x, target=y).loss) for _ in range(100)][-1]
    assert losses["auto"] < 0.5 * losses["zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [LABELS, None])
def test_forms_are_cheaper_and_cheaper(kind: str, context: TensorSpec | None) -> None:
    """Of every kind of value, at 64 features and at its own few."""
    narrow = spec_of(kind)
    sizes = [64 if size == 6 else size for size in narrow.shape]
    for spec in (narrow, TensorSpec(tuple(sizes), torch.float32, narrow.feature_dim)):
        forms = auto_forms(spec, context)
        assert {base_name(form) for form in forms} <= {auto_name(spec, context)} <= SOURCES.keys()
        flops = [make_source(form, [spec], context).flops() for form in ["auto", *forms]]
        assert flops == sorted(flops, reverse=True)
        assert len(set(flops)) == len(flops)
    assert 64 not in sizes or len(forms) >= 3


def test_a_value_that_labels_do_not_line_up_with_has_one_form() -> None:
    assert auto_forms(TensorSpec((1, 5, 64), torch.float32), LABELS) == []
    assert isinstance(make_source("auto", [TensorSpec((1, 5, 64), torch.float32)], LABELS), Auto)
