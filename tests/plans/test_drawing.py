"""Drawings: everything of the plan is in them, and nothing comes from elsewhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_fx
from dni_fx.drawing import draw_plan
from dni_fx.drawing.page import render
from dni_fx.drawing.shapes import colour_of
from dni_fx.drawing.views import Views
from dni_fx.errors import DecouplingError
from dni_fx.plan import CutPlan, NodeReport, SearchReport, StageCost

from ..helpers.paths import ROOT
from ..models.feedforward import UNet
from .drawings import (
    DRAWN,
    SVG,
    Dense,
    Page,
    chain_plan,
    draw,
    encoder_plan,
    plan_of,
    text_of,
    texts,
    unet_plan,
)


def titles(svg: str) -> str:
    """What is said on pointing at things."""
    return "\n".join(t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}title"))


@pytest.mark.parametrize(
    "make", [unet_plan, encoder_plan, lambda: plan_of("two_towers"), lambda: plan_of("residual")]
)
def test_a_picture_names_every_stage_interface_and_source(
    make: Callable[[], CutPlan], tmp_path: Path
) -> None:
    plan = make()
    svg = draw(plan, tmp_path / "plan.svg")
    read = texts(svg)
    assert read[0] == f"{plan.model}: {len(plan.stages)} stages, {len(plan.cuts)} cuts"
    for stage in plan.stages:
        assert read.count(stage.name) == 2, "once in the legend, once in its panel"
    for interface in plan.interfaces:
        shape = "×".join(map(str, interface.spec.shape))
        assert interface.name in read
        assert any(
            line.startswith(f"{shape} · ") and line.endswith((" MB", " kB", " B")) for line in read
        )
        kind = plan.report.sources[interface.name].kind
        told = [t.removeprefix("source: ") for t in read if t.startswith("source: ")]
        assert any(t == kind or (t[-1] == "…" and kind.startswith(t[:-1])) for t in told), told
    assert "output" in read
    assert any(line.endswith("%") for line in read)


def test_the_colour_of_a_stage_is_that_of_its_boxes_and_interfaces(tmp_path: Path) -> None:
    plan = unet_plan()
    root = ET.fromstring(draw(plan, tmp_path / "plan.svg"))
    thick = [p.get("stroke") for p in root.iter(f"{SVG}path") if p.get("class") == "link"]
    assert thick[1:] == [colour_of(i.producer) for i in plan.interfaces], (
        "the first one is the legend's"
    )
    assert len({colour_of(s) for s in range(4)}) == 4


def test_the_head_tells_objective_slowest_stage_bound_and_gap(tmp_path: Path) -> None:
    plan = chain_plan(8)
    assert plan.report is not None
    search = SearchReport(
        "throughput", "measured", 0.0125, 0.0100, 7, "program order", {"n1": "half of the work"}
    )
    found = replace(plan, report=replace(plan.report, search=search))
    line = texts(draw(found, tmp_path / "plan.svg"))[1]
    for word in ("throughput", "measured", "12.5 ms", "10 ms", "25.0%"):
        assert word in line
    costs = [StageCost(1e-3 * (s + 1), 1e-3) for s in range(4)]
    rows = tuple(replace(s, cost=c) for s, c in zip(plan.report.stages, costs, strict=True))
    given = replace(plan, report=replace(plan.report, stages=rows))
    assert "slowest stage stage_3, 5 ms" in texts(draw(given, tmp_path / "plan.svg"))[1]


def test_a_page_has_a_table_of_stages_and_one_of_interfaces(tmp_path: Path) -> None:
    plan = encoder_plan()
    page = Page(draw(plan, tmp_path / "plan.html"))
    stages, interfaces = page.tables
    assert [row[0] for row in stages[1:]] == [s.name for s in plan.stages]
    assert [row[0] for row in interfaces[1:]] == [i.name for i in plan.interfaces]
    assert {"interface", "shape", "MB", "from", "to", "source"} <= set(interfaces[0])
    assert page.tags["li"] >= 1, "notes"


def test_a_single_stage_and_plans_without_costs_can_be_drawn(tmp_path: Path) -> None:
    plan = dni_fx.decouple(
        UNet(), [], example_inputs=(torch.randn(2, 2, 16, 16),), check=False
    ).plan
    for suffix in ("svg", "html"):
        assert "1 stage, 0 cuts" in draw(plan, tmp_path / f"plan.{suffix}")
    assert not any(t.endswith("%") for t in texts(text_of(tmp_path / "plan.svg")))


def test_values_without_gradient_and_nodes_made_again_are_told_apart(tmp_path: Path) -> None:
    plan = encoder_plan()
    svg = draw(plan, tmp_path / "plan.svg")
    assert "made again in every stage that uses it" in titles(svg)
    assert "size" not in texts(svg)
    early = plan_of("early_outputs", 3)
    root = ET.fromstring(draw(early, tmp_path / "plan.svg"))
    dashed = sum(p.get("class") == "plain" for p in root.iter(f"{SVG}path"))
    assert bool(dashed) == bool(Views(early.report).nodes.crossing.keys() - _sources(early))


def _sources(plan: CutPlan) -> set[str]:
    assert plan.report is not None
    nodes = Views(plan.report).nodes
    return {nodes.source(i) for i in plan.interfaces}


@pytest.mark.parametrize("name", DRAWN)
def test_every_interface_leads_from_its_maker_to_all_its_users(name: str) -> None:
    plan = plan_of(name, 3)
    assert plan.report is not None
    views = Views(plan.report)
    whole = views.whole()
    for interface in plan.interfaces:
        assert set(views.nodes.crossing[views.nodes.source(interface)]) == set(interface.consumers)
    for link in whole.links:
        assert link.sources
        assert all(link.targets.values())


def test_a_module_is_called_by_its_class_where_that_is_known(tmp_path: Path) -> None:
    plan = encoder_plan()
    known = texts(draw(plan, tmp_path / "plan.svg"))
    assert known.count("Layer") == 12
    assert not any(line.startswith("Linear, ") for line in known)
    assert plan.report is not None
    unknown = texts(
        draw(replace(plan, report=replace(plan.report, kinds={})), tmp_path / "plan.svg")
    )
    assert any(line.startswith("Linear, ") for line in unknown), (
        "else by the functions and modules in it"
    )


def test_assertions_and_sizes_are_not_drawn(tmp_path: Path) -> None:
    plan = chain_plan(8)
    assert plan.report is not None
    extra = (
        NodeReport("size_1", "size", (), ("n3",), (), 0),
        NodeReport("floordiv_1", "floordiv", (), ("size_1",), (), 0),
        NodeReport("_assert_1", "_assert", (), (), (), 0),
        NodeReport("exp_1", "exp", (), (), (), 0),
        NodeReport("mul_1", "mul", (), ("n3", "exp_1", "floordiv_1"), (2, 4), 1),
    )
    full = replace(plan, report=replace(plan.report, nodes=(*plan.report.nodes, *extra)))
    read = texts(draw(full, tmp_path / "plan.svg"))
    assert not {"size_1", "floordiv_1", "_assert_1"} & set(read)
    assert {"exp_1", "mul_1"} <= set(read), "a parameter's function is no assertion"


def test_many_interfaces_of_a_stage_are_put_together_and_all_named(tmp_path: Path) -> None:
    plan = dni_fx.plan_cuts(Dense(), (torch.randn(2, 4),), cuts=["layers.10"], costs="analytic")
    svg = draw(plan, tmp_path / "plan.svg")
    assert "11 interfaces" in texts(svg)
    assert all(f"{i.name}: " in titles(svg) for i in plan.interfaces)


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_names_are_escaped(suffix: str, tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">&\'</title></text><script>alert(2)</script>'
    plan = chain_plan(
        200, scope=lambda k: (f"a{k // 10}{bad}", f"a{k // 10}{bad}.b{k}"), model=f"M{bad}"
    )
    text = draw(plan, tmp_path / f"plan.{suffix}")
    assert "&lt;img src=x onerror=" in text
    page = Page(text)
    assert page.tags["img"] == 0
    assert page.tags["script"] == (suffix == "html"), "the page's own"
    assert "onerror" not in page.attributes
    if suffix == "svg":
        assert bad in "".join(texts(text)) + titles(text)


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_drawing_needs_no_network(suffix: str, tmp_path: Path) -> None:
    text = draw(encoder_plan(), tmp_path / f"plan.{suffix}").replace(
        'xmlns="http://www.w3.org/2000/svg"', ""
    )
    assert "//" not in text
    page = Page(text)
    assert not page.attributes & {"src", "srcset", "action", "xlink:href"}
    assert not {"link", "iframe", "object", "image", "base"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert all(link.startswith("#") for link in page.links)


def test_equal_plans_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.plans.drawings import encoder_plan; plan = encoder_plan();"
        "[plan.draw(f'{sys.argv[1]}.{suffix}') for suffix in ('svg', 'html')]"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "other"], env=environment, check=True, timeout=300
    )
    for suffix in ("svg", "html"):
        here = draw(encoder_plan(), tmp_path / f"here.{suffix}")
        assert draw(encoder_plan(), tmp_path / f"again.{suffix}") == here
        assert text_of(tmp_path / f"other.{suffix}") == here


def test_a_plan_from_json_cannot_be_drawn(tmp_path: Path) -> None:
    plan = CutPlan.from_json(chain_plan(8).to_json())
    with pytest.raises(DecouplingError, match=r"names only.*plan_cuts.*decoupled\.plan"):
        draw_plan(plan, tmp_path / "plan.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan.png", "plan", "plan.SVG.txt"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DecouplingError, match=r"must end in \.html or \.svg"):
        draw_plan(chain_plan(8), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_folder_of_that_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DecouplingError, match=r"there is no folder .*nowhere"):
        draw_plan(chain_plan(8), tmp_path / "nowhere" / "plan.svg")
    (tmp_path / "plan.svg").mkdir()
    with pytest.raises(DecouplingError, match=r"cannot write .*name another file"):
        draw_plan(chain_plan(8), tmp_path / "plan.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]


def test_without_jinja_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DecouplingError, match=r"pip install 'dni_fx\[draw\]'"):
        draw_plan(chain_plan(8), tmp_path / "plan.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**facts: Any) -> Any:
        yield from itertools.islice(render(**facts), 5)
        raise RuntimeError("half-way")

    before = draw(chain_plan(8), tmp_path / "plan.svg")
    monkeypatch.setattr("dni_fx.drawing.render", broken)
    with pytest.raises(RuntimeError, match="half-way"):
        draw_plan(chain_plan(12), tmp_path / "plan.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]
    assert text_of(tmp_path / "plan.svg") == before


def test_importing_dni_fx_imports_no_drawing_library() -> None:
    code = "import sys, dni_fx; "
    code += "print([m for m in ('dni_fx.drawing', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
