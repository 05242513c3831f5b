"""Drawings: everything of the plan is in them, and nothing lies over anything else."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.drawing import draw_plan
from dni_fx.drawing.boxes import Box
from dni_fx.drawing.layout import lay_out, spread
from dni_fx.drawing.page import render
from dni_fx.drawing.routing import route
from dni_fx.drawing.shapes import CHIP, Picture, colour_of
from dni_fx.drawing.views import MOST_BOXES, Views
from dni_fx.errors import DecouplingError
from dni_fx.plan import (
    CutPlan,
    Interface,
    NodeReport,
    PlanReport,
    SearchReport,
    SourceReport,
    StageCost,
    StageReport,
    TensorSpec,
)

from ..helpers.paths import ROOT
from ..models.zoo import ZOO, UNet

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = [
    "unet", "two_towers", "transformer", "gpt", "residual", "dense", "inception", "fan_out", "siamese", "lstm",
    "mutate_through_view", "early_outputs", "several_inputs", "nested_input", "tied_language_model",
]  # fmt: skip


class Encoder(nn.Module):
    """Modules in modules, a mask from the inputs alone, sizes, and members of a split."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.qkv = nn.Linear(8, 24)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).split(x.shape[-1], dim=-1)
            weights = (q @ k.transpose(1, 2)).masked_fill(~mask, float("-inf")).softmax(-1)
            x = x + weights @ v
            return x + self.mlp(x)

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Encoder.Layer() for _ in range(layers))
        self.head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


class Dense(nn.Module):
    """Every layer uses all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * (k + 1), 4) for k in range(14))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, -1)))
        return torch.cat(features, -1)


def plan_of(name: str, stages: int = 4) -> CutPlan:
    """A plan of a model of the zoo."""
    case = next(c for c in ZOO if c.name == name)
    args, kwargs = case.inputs(4, torch.float32)
    return dni_fx.plan_cuts(
        case.build(), args, example_kwargs=kwargs, stages=stages, costs="analytic"
    )


def unet_plan() -> CutPlan:
    """Skips over one and over two stages."""
    cuts = ["down1", "down2", "middle"]
    return dni_fx.plan_cuts(UNet(), (torch.randn(2, 2, 16, 16),), cuts=cuts, costs="analytic")


def encoder_plan() -> CutPlan:
    return dni_fx.plan_cuts(
        Encoder(), (torch.zeros(2, 6, dtype=torch.long),), stages=4, costs="analytic"
    )


def chain_plan(
    count: int,
    stages: int = 4,
    scope: Callable[[int], tuple[str, ...]] = lambda k: (str(k),),
    model: str = "Chain",
) -> CutPlan:
    """A plan of a chain of linear layers, made by hand."""
    share = -(-count // stages)
    spec = TensorSpec((2, 4), torch.float32)
    nodes = [NodeReport("x", "input", (), (), (2, 4), None)]
    for k in range(count):
        nodes.append(
            NodeReport(f"n{k}", "Linear", scope(k), (nodes[-1].name,), (2, 4), k // share, 1e-3)
        )
    nodes.append(NodeReport("output", "output", (), (nodes[-1].name,), (), None))
    ends = [min((s + 1) * share, count) - 1 for s in range(stages)]
    names = [scope(k)[-1] if scope(k) else f"n{k}" for k in ends[:-1]]
    interfaces = tuple(
        Interface(n, spec, s, (s + 1,), aliases=(f"n{ends[s]}",)) for s, n in enumerate(names)
    )
    rows = tuple(StageReport(f"stage_{s}", share, 20, c) for s, c in enumerate([*names, None]))
    sources = {n: SourceReport("linear", 20, None) for n in names}
    report = PlanReport("calls", rows, interfaces, sources=sources, nodes=tuple(nodes))
    return CutPlan(model, "0" * 16, tuple(names), report=report)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def draw(plan: CutPlan, path: Path) -> str:
    assert draw_plan(plan, path) == path
    return text_of(path)


def texts(svg: str) -> list[str]:
    """What can be read in a picture."""
    return [t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}text")]


def titles(svg: str) -> str:
    """What is said on pointing at things."""
    return "\n".join(t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}title"))


class Page(HTMLParser):
    """Tags, tables, links and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids[value or ""] += 1
            if name == "href":
                self.links.append(value or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[-1][-1][-1] += data


# what is in a drawing


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
        assert f"source: {plan.report.sources[interface.name].kind}" in read
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


# safe and self-contained


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
        "import sys; from tests.plans.test_drawing import encoder_plan; plan = encoder_plan();"
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


# nothing lies over anything else


def rectangles(picture: Picture) -> list[tuple[str, float, float, float, float]]:
    """Boxes, pills and labels."""
    found = [(b["item"].title, b["x"], b["y"], b["w"], b["h"]) for b in picture.items]
    found += [
        (link["link"].name, link["x"], link["y"], *CHIP)
        for link in picture.links
        if link["link"].label
    ]
    return found


def segments(path: str) -> list[tuple[float, float, float, float]]:
    """Pieces of a line of horizontal and vertical parts; its corners are rounded off."""
    pieces, at = [], (0.0, 0.0)
    for command, numbers in re.findall(r"([MLQ])([-\d. ]+)", path):
        to = tuple(float(n) for n in numbers.split()[-2:])
        if command == "L":
            pieces.append(
                (min(at[0], to[0]), min(at[1], to[1]), max(at[0], to[0]), max(at[1], to[1]))
            )
        at = to
    return pieces


@pytest.mark.parametrize("name", DRAWN)
def test_boxes_labels_and_thick_lines_keep_clear_of_each_other(name: str) -> None:
    plan = plan_of(name)
    assert plan.report is not None
    check_clear(plan.report)


@pytest.mark.parametrize(
    "cuts", [["layers.6"], ["layers.1", "layers.3", "layers.5"], ["layers.10", "layers.12"]]
)
def test_many_interfaces_are_clear_too(cuts: list[str]) -> None:
    report = dni_fx.plan_cuts(Dense(), (torch.randn(2, 4),), cuts=cuts, costs="analytic").report
    assert report is not None
    check_clear(report)


def test_a_long_model_with_eight_stages_is_clear_too() -> None:
    plan = dni_fx.plan_cuts(
        Encoder(), (torch.zeros(2, 6, dtype=torch.long),), stages=8, costs="analytic"
    )
    assert plan.report is not None
    check_clear(plan.report)


def check_clear(report: PlanReport) -> None:
    whole = Views(report).whole()
    picture = route(whole.panels, whole.links)
    boxes = rectangles(picture)
    for (name, x, y, w, h), (other, x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y, (
            f"{name} lies over {other}"
        )
    for name, x, y, w, h in boxes:
        assert x >= 0, name
        assert y >= 0, name
        assert x + w <= picture.width, name
        assert y + h <= picture.height, name
    for link in picture.links:
        own = link["link"].name
        for ax, ay, bx, by in segments(str(link["d"])):
            assert ax >= 0
            assert ay >= 0
            for name, x, y, w, h in boxes:
                through = ax < x + w - 1 and bx > x + 1 and ay < y + h - 1 and by > y + 1
                assert not through or name == own, f"the line of {own} runs through {name}"


@pytest.mark.parametrize("seed", range(20))
def test_lanes_keep_clear_of_boxes_in_random_graphs(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 30)
    edges = [
        (a, b) for a, b in itertools.combinations(range(count), 2) if draw.random() < 3 / count
    ]
    sizes = {k: draw.choice([(220.0, 46.0), (180.0, 24.0)]) for k in range(count)}
    layout = lay_out(sizes, edges)
    boxes = {
        k: (x - sizes[k][0] / 2, y, x + sizes[k][0] / 2) for k, (x, y) in layout.centres.items()
    }
    for (a, (left, y, right)), (b, (left2, y2, right2)) in itertools.combinations(boxes.items(), 2):
        assert layout.layer[a] != layout.layer[b] or right <= left2 or right2 <= left
        assert (layout.layer[a] < layout.layer[b]) == (y < y2) or layout.layer[a] == layout.layer[b]
    assert all(layout.layer[a] < layout.layer[b] for a, b in edges)
    assert {a: len(ends) for a, (_, ends) in layout.lines.items()} == Counter(a for a, _ in edges)
    for x0, top, x1, bottom in (piece for pieces, _ in layout.lines.values() for piece in pieces):
        passed = [
            k for k, (left, y, right) in boxes.items() if top < y < bottom and left < x0 < right
        ]
        assert x0 != x1 or not passed


def test_layers_put_users_below_and_chains_in_a_line() -> None:
    sizes = dict.fromkeys(range(6), (100.0, 40.0))
    layout = lay_out(sizes, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5), (1, 4)])
    assert [layout.layer[k] for k in range(6)] == list(range(6))
    places = [x for x, _ in layout.centres.values()]
    assert max(places) - min(places) < 1
    assert layout.leftmost == layout.rightmost == frozenset(range(6))


def test_layers_are_ordered_without_needless_crossings() -> None:
    sizes = dict.fromkeys(range(4), (100.0, 40.0))
    layout = lay_out(sizes, [(0, 3), (1, 2)])
    x = {k: place for k, (place, _) in layout.centres.items()}
    assert (x[0] < x[1]) == (x[3] < x[2])


def test_spread_keeps_order_and_gaps_and_moves_as_little_as_can_be() -> None:
    assert spread([0, 10, 20], [5, 5]) == [0, 10, 20]
    assert spread([0, 0], [4]) == [-2, 2]
    assert spread([0, 0], [4], [3, 1]) == [-1, 3]
    assert spread([], []) == []


# large models


def all_boxes(views: Views, box: Box) -> list[Box]:
    """What a box shows once everything in it is opened: the boxes that do not open."""
    if len(box.nodes) == 1:
        return [box]
    return [b for _, part in views.inside(box).folded for b in all_boxes(views, part)] + [
        Box(i.title, box.stage, (), 0)
        for p in views.inside(box).panels
        for i in p.items
        if i.nodes == 1
    ]


@pytest.mark.parametrize(
    "make", [unet_plan, encoder_plan, lambda: chain_plan(1000), lambda: plan_of("inception")]
)
def test_whatever_is_folded_opens_down_to_every_node(make: Callable[[], CutPlan]) -> None:
    report = make().report
    assert report is not None
    views = Views(report)
    whole = views.whole()
    boxes = [i for p in whole.panels for i in p.items if i.nodes]
    assert len(boxes) <= MOST_BOXES
    leaves = sum(i.nodes == 1 for i in boxes) + sum(
        len(all_boxes(views, box)) for _, box in whole.folded
    )
    assert leaves == sum(len(nodes) for nodes in views.nodes.drawn.values())


def test_a_module_of_one_stage_is_one_box_and_one_that_is_cut_is_opened(tmp_path: Path) -> None:
    plan = dni_fx.plan_cuts(
        Encoder(),
        (torch.zeros(2, 6, dtype=torch.long),),
        cuts=["layers.3", "layers.7.mlp.0"],
        costs="analytic",
    )
    read = texts(draw(plan, tmp_path / "plan.svg"))
    assert {f"layers.{k}" for k in range(12) if k != 7} <= set(read)
    assert "layers.7" not in read
    assert "layers.7.mlp" not in read
    assert {"layers.7.mlp.0", "layers.7.mlp.1"} <= set(read)


def test_one_module_used_in_several_stages_is_drawn_in_each(tmp_path: Path) -> None:
    svg = draw(unet_plan(), tmp_path / "plan.svg")
    assert texts(svg).count("pool") == 2


def test_every_folded_box_leads_to_its_own_details(tmp_path: Path) -> None:
    page = Page(draw(chain_plan(1000), tmp_path / "plan.html"))
    targets = [link[1:] for link in page.links if link != "#picture"]
    assert sorted(targets) == sorted(name for name in page.ids if name.startswith("inside-"))
    assert set(page.ids.values()) == {1}
    assert page.tags["details"] == len(targets)


@pytest.mark.parametrize(
    "scope",
    [lambda k: (str(k),), lambda k: (f"b.{k // 100}", f"b.{k // 100}.{k % 100}"), lambda k: ()],
    ids=["flat", "blocks", "functions"],
)
def test_ten_thousand_nodes_are_drawn_in_seconds(
    scope: Callable[[int], tuple[str, ...]], tmp_path: Path
) -> None:
    plan = chain_plan(10_000, scope=scope)
    begin = time.perf_counter()
    page = draw(plan, tmp_path / "plan.html")
    assert time.perf_counter() - begin < 60, "2 s on an idle core"
    assert len(page) < 2e7
    svg = draw(plan, tmp_path / "plan.svg")
    assert len(svg) < 2e5
    assert len(list(ET.fromstring(svg).iter(f"{SVG}text"))) < 4 * MOST_BOXES + 60


def test_stages_that_alternate_do_not_break_the_limit() -> None:
    report = chain_plan(1000, 2).report
    assert report is not None
    nodes = [n for n in report.nodes if n.operator == "Linear"]
    towers = [
        replace(n, inputs=() if k < 2 else (nodes[k - 2].name,), stage=k % 2)
        for k, n in enumerate(nodes)
    ]
    views = Views(replace(report, nodes=tuple(towers), interfaces=()))
    boxes = [i for p in views.whole().panels for i in p.items if i.nodes]
    assert len(boxes) <= MOST_BOXES


# errors


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
    code = "import sys, dni_fx; print([m for m in ('dni_fx.drawing', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
