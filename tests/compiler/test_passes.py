"""The passes: pure, with specs and replication as they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dni_fx
from dni_fx.errors import TracingError
from dni_fx.passes.cut import cutting, emission, insertion, splitting
from dni_fx.passes.cut.checking import guards_hold
from dni_fx.passes.cut.specs import infer_specs, name_values
from dni_fx.passes.trace import tracing

from ..helpers.comparing import assert_bits_equal, state_of
from ..models.feedforward import ConvNet, mlp_chain
from ..models.sequences import TransformerModel
from ..models.zoo import BY_NAME
from .kit import DataDependent


def written(graph: fx.Graph) -> list[Any]:
    """The graph's text and all facts in it."""
    return [
        (
            n.name,
            n.op,
            str(n.target),
            str(n.args),
            str(n.kwargs),
            {k: str(v) for k, v in n.meta.items()},
        )
        for n in graph.nodes
    ]


@pytest.mark.parametrize(
    "name", ["unet", "fan_out", "norm_dropout_chain", "views", "gpt", "rebound_buffer", "routing"]
)
def test_passes_change_nothing(name: str) -> None:
    case = BY_NAME[name]
    model = case.build()
    args, kwargs = case.inputs(4, torch.float32)
    state, generator, tables = (
        state_of(model),
        torch.get_rng_state(),
        [dict(vars(m)) for m in model.modules()],
    )
    trace = tracing.trace_calls(model, args, kwargs)
    graph, attributes, digest = written(trace.graph), dict(trace.attributes), trace.digest
    name_values(trace)
    infer_specs(trace)
    flow = cutting.find_flow(trace)
    cutting.list_cut_points(flow)
    positions = tuple(cutting.find_cuts(flow, case.cuts))
    split = splitting.split_stages(flow, cutting.assign_stages(flow, positions), case.cuts)
    chosen = insertion.resolve_gradients(split.interfaces, "auto")
    sources = insertion.make_sources(split.interfaces, chosen, None, torch.device("cpu"))
    modules = [s.module.code for s in split.stages]
    emission.emit_functions(split, sources)
    guards_hold(trace, list(args))
    assert written(trace.graph) == graph
    assert trace.attributes == attributes
    assert trace.digest == digest
    assert [s.module.code for s in split.stages] == modules
    assert [dict(vars(m)) for m in model.modules()] == tables
    assert_bits_equal(
        [state_of(model), torch.get_rng_state()], [state, generator], f"{name}: after the passes"
    )
    again = splitting.split_stages(flow, cutting.assign_stages(flow, positions), case.cuts)
    assert [s.module.code for s in again.stages] == modules


def test_functions_of_torch_are_put_back() -> None:
    before = nn.Module.__call__, torch.autograd.Function.__dict__["apply"], torch.autocast.__enter__
    for model in (mlp_chain(), DataDependent()):
        try:
            tracing.trace_calls(model, (torch.randn(4, 6),), {})
        except TracingError:
            assert isinstance(model, DataDependent)
    after = nn.Module.__call__, torch.autograd.Function.__dict__["apply"], torch.autocast.__enter__
    assert [a == b or a.__func__ is b.__func__ for a, b in zip(after, before, strict=True)] == [
        True
    ] * 3


class SwinLike(nn.Module):
    """Patches by convolution, then channels last: (B, H, W, C) with linear layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = self.norm(x)
        x = x + self.mlp(x)
        return self.head(x.mean((1, 2)))


class VitLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.head = (
            nn.Conv2d(3, 8, 4, stride=4),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens + 1.0).mean(1))


def feature_dims(model: nn.Module, *args: Tensor) -> dict[str, int]:
    trace = tracing.trace_calls(model, args, {})
    names = name_values(trace)
    specs = infer_specs(trace)
    return {names[n][0]: specs[n.name].feature_dim for n in trace.graph.nodes if n.name in specs}


def test_feature_dimensions() -> None:
    image = torch.randn(2, 3, 8, 8)
    maps = feature_dims(ConvNet(), image)
    assert {maps[n] for n in ("conv1", "bn1", "conv2", "bn2")} == {1}
    swin = feature_dims(SwinLike(), image)
    assert swin["patch"] == 1
    assert swin["permute"] == -1  # features were moved last
    assert {swin[n] for n in ("norm", "mlp.0", "mlp.1", "mlp", "add")} == {-1}
    vit = feature_dims(VitLike(), image)
    assert vit["patch"] == 1
    assert {vit[n] for n in ("transpose", "norm", "add")} == {-1}
    tokens = feature_dims(TransformerModel(), torch.randn(4, 4, 5))
    assert set(tokens.values()) == {-1}
    conv1d = feature_dims(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU()),
        torch.randn(2, 3, 8),
    )
    assert {conv1d[str(i)] for i in range(4)} == {1}
    by_function = feature_dims(Functional(), torch.randn(2, 3, 8, 8))
    assert {by_function[n] for n in ("relu", "max_pool2d", "batch_norm")} == {1}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.conv2d(x, self.weight))
        h = F.batch_norm(F.max_pool2d(h, 2), None, None, training=True)
        return h.sum((2, 3))


class Masked(nn.Module):
    """Masks and position ids from the inputs alone, used in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).float()
        places = torch.arange(ids.shape[1], device=ids.device)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        h = self.embed(ids)
        for block in self.blocks:
            h = torch.matmul(causal.float(), block(h + self.place(places))) * mask
        return self.head(h.mean(1))


def test_masks_and_positions_do_not_cross() -> None:
    ids = torch.randint(0, 11, (4, 5))
    model = Masked()
    decoupled = dni_fx.decouple(model, ["blocks.0", "blocks.1"], example_inputs=(ids,))
    assert decoupled.plan.report is not None
    assert decoupled.plan.report.plain == ()
    assert [i.name for i in decoupled.interfaces] == ["blocks.0", "blocks.1"]
    assert all(set(s.inputs) <= {"ids", "blocks.0", "blocks.1"} for s in decoupled.stages)
    points = {p.name: p for p in dni_fx.list_cut_points(model, (ids,))}
    assert points["blocks.0"].crossing == ("blocks.0",)
    for batch in (4, 1, 6):
        other = torch.randint(0, 11, (batch, 5))
        assert_bits_equal(decoupled(other), model(other), f"batch {batch}")
    longer = torch.randint(0, 11, (4, 9))
    assert_bits_equal(decoupled(longer), model(longer), "another length")


def test_random_masks_are_drawn_once() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.rand(x.shape[0], 8) > 0.5
            return (self.b((self.a(x) * mask).relu()) * mask).sum(1)

    model, x = Drawing(), torch.randn(4, 6)
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    assert decoupled.plan.report is not None
    assert len(decoupled.plan.report.plain) == 1  # drawn in the first stage, sent to the second
    for call in (decoupled, model):
        torch.manual_seed(0)
        result = call(x)
        if call is decoupled:
            first = result
    assert_bits_equal(first, result, "one mask")
