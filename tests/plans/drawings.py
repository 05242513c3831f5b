"""Plans to draw, and what can be read from a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import Tensor, nn

import dni_fx
from dni_fx.drawing import draw_plan
from dni_fx.plan import (
    CutPlan,
    Interface,
    NodeReport,
    PlanReport,
    SourceReport,
    StageReport,
    TensorSpec,
)

from ..models.feedforward import UNet
from ..models.zoo import ZOO

SVG = "{http://www.w3.org/2000/svg}"


DRAWN = [
    "unet",
    "two_towers",
    "transformer",
    "gpt",
    "residual",
    "dense",
    "inception",
    "fan_out",
    "siamese",
    "lstm",
    "mutate_through_view",
    "early_outputs",
    "several_inputs",
    "nested_input",
    "tied_language_model",
]


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
    """Three layers in each stage."""
    x = torch.zeros(2, 6, dtype=torch.long)
    ends = ["layers.2", "layers.5", "layers.8"]
    return dni_fx.plan_cuts(Encoder(), (x,), stages=4, must_cut=ends)


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
