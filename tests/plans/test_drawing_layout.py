"""Drawings: nothing lies over anything else, in large models neither."""

from __future__ import annotations

import itertools
import random
import re
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dni_fx
from dni_fx.drawing.boxes import Box
from dni_fx.drawing.layout import lay_out, spread
from dni_fx.drawing.routing import route
from dni_fx.drawing.shapes import CHIP, Picture
from dni_fx.drawing.views import MOST_BOXES, Views
from dni_fx.plan import CutPlan, PlanReport

from .drawings import (
    DRAWN,
    SVG,
    Dense,
    Encoder,
    Page,
    chain_plan,
    draw,
    encoder_plan,
    plan_of,
    texts,
    unet_plan,
)


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
