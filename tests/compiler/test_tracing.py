"""Tracing, naming and planning: the ladder and its check, pure passes, specs, replication, plans
and code as text.
"""

from __future__ import annotations

import ast
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dni_fx
from dni_fx import compiler
from dni_fx.errors import CutError, TracingError
from dni_fx.passes.cut import cutting, emission, insertion, splitting
from dni_fx.passes.cut.checking import check_stages, guards_hold
from dni_fx.passes.cut.specs import infer_specs, name_values
from dni_fx.passes.trace import exporting, tracing
from dni_fx.plan import CutPlan

from ..helpers.oracles import assert_bits_equal, derivatives, sgd, state_of
from ..models.zoo import (
    BY_NAME,
    ConvNet,
    FanOut,
    ResidualNet,
    TransformerModel,
    UNet,
    mlp_chain,
    norm_dropout_chain,
)

pytestmark = pytest.mark.usefixtures("quiet")


# The ladder.
# -------------------------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    """Reads a tensor's values at the top level, and no tracer can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.relu() if h.sum().item() > 0 else h.tanh())


class Scripted(nn.Module):
    """A scripted function at the top level: recording refuses it, export opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.gate = torch.jit.script(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(self.norm(self.inp(x))))


def gate(h: Tensor) -> Tensor:
    return h.relu() * h.sigmoid()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_traces_what_recording_refuses() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(TracingError, match="Scripted"):
        tracing.trace_calls(Scripted(), (x,), {})
    model = Scripted()
    decoupled = dni_fx.decouple(model, ["norm"], example_inputs=(x,))
    assert decoupled.plan.report is not None
    assert decoupled.plan.report.rung == "export"
    assert [i.name for i in decoupled.interfaces] == ["norm"]
    assert "traced by export" in str(decoupled.plan)
    for batch in (4, 7, 2):
        x = torch.randn(batch, 6)
        state = state_of(model)
        want = derivatives(model, model, (x,), {}, 0, of_inputs=False)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data.copy_(state[name])
        got = derivatives(model, decoupled, (x,), {}, 0, of_inputs=False)
        assert want["containers"] == got["containers"]
        torch.testing.assert_close(got["outputs"], want["outputs"])
        torch.testing.assert_close(got["gradients"], want["gradients"])
        torch.testing.assert_close(got["state"], want["state"])
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    before = state_of(model)
    for _ in range(2):
        trainer.step(x, target=torch.tensor([0, 1]))
    # a bias before a norm has no gradient
    weights = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    assert all(not torch.equal(before[n], p) for n, p in weights)


@pytest.mark.parametrize(
    "name", ["mlp_chain", "norm_dropout_chain", "residual", "conv_norm_chain", "unet", "two_towers", "transformer", "gpt",
             "dict_output", "nested_input", "tied_language_model", "inplace_chain", "several_inputs", "frozen_norm"]
)  # fmt: skip
def test_exported_models_can_be_split(name: str) -> None:
    """Every rung gives a graph that the other passes take: at the cuts of the zoo, equal to the
    model.
    """
    case = BY_NAME[name]
    model = case.build()
    args, kwargs = case.inputs(4, torch.float32)
    state = state_of(model)
    trace = exporting.trace_export(model, args, kwargs)
    assert_bits_equal(state_of(model), state, f"{name}: after export")
    flow = cutting.find_flow(trace)
    split = splitting.split_stages(
        flow, cutting.assign_stages(flow, cutting.find_positions(flow, case.cuts)), case.cuts
    )
    assert len(split.stages) == len(case.cuts) + 1
    owners = {id(p) for p in model.parameters()}
    assert {id(p) for s in split.stages for p in s.module.parameters()} <= owners
    result = check_stages(
        model, lambda *a, **k: compiler._composed(flow.trace, split, *a, **k), args, kwargs
    )
    assert result.mismatch is None


class Mapped(nn.Module):
    """``vmap`` at the top level, which neither rung records."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.vmap(lambda row: row.relu() * row.sigmoid())(self.a(x)))


def test_what_no_rung_takes_at_the_top_is_right_or_one_error() -> None:
    model, x = Mapped(), torch.randn(4, 6)
    try:
        decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    except TracingError as error:
        assert "Mapped" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(decoupled(x), model(x))
    assert (
        torch._C._functorch.peek_interpreter_stack() is None
    )  # nothing is left behind in the process
    inside = nn.Sequential(
        nn.Linear(6, 6), Mapped(), nn.Linear(3, 2)
    )  # in a submodule it is one opaque node
    decoupled = dni_fx.decouple(inside, ["0"], example_inputs=(x,))
    assert_bits_equal(decoupled(x), inside(x), "opaque")


class Counting(nn.Module):
    """Changes a number of its own at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x) * self.calls)


class DrawsFromNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * float(np.random.rand()))  # noqa: NPY002


class DrawsFromPython(DrawsFromNumpy):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * random.random())


@pytest.mark.parametrize("make", [Counting, DrawsFromNumpy, DrawsFromPython])
@pytest.mark.parametrize("nested", [False, True])
def test_what_differs_from_call_to_call_is_never_baked_in(
    make: type[nn.Module], nested: bool
) -> None:
    """An error, or calls that go on as the model's do."""
    model = nn.Sequential(nn.Linear(6, 6), Mapped(), nn.Linear(3, 2)) if nested else make()
    plain, x = copy.deepcopy(model), torch.randn(4, 6)
    try:
        decoupled = dni_fx.decouple(model, ["0" if nested else "a"], example_inputs=(x,))
    except TracingError as error:
        assert not nested
        assert make.__name__ in str(error)  # noqa: PT017
        return
    results = []
    for call in (plain, decoupled):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        results.append([call(x) for _ in range(3)])
    assert_bits_equal(results[1], results[0], "three calls")


def test_parameters_written_in_forward_are_as_they_were_after_decoupling() -> None:
    """An embedding with a largest norm rescales its rows as it looks them up."""
    model = nn.Sequential(nn.Embedding(11, 8, max_norm=0.5), nn.Linear(8, 3))
    weight = model[0].weight.detach().clone()
    dni_fx.decouple(model, ["0"], example_inputs=(torch.randint(0, 11, (4, 5)),))
    assert_bits_equal(model[0].weight, weight, "embedding after decoupling")


def test_the_error_lists_what_each_rung_said() -> None:
    with pytest.raises(TracingError) as caught:
        dni_fx.decouple(DataDependent(), ["a"], example_inputs=(torch.randn(4, 6),))
    text = str(caught.value)
    assert "DataDependent" in text
    assert "trace_calls" in text
    assert "trace_export" in text
    assert "'item'" in text
    assert "test_tracing.py:" in text  # the user's line
    assert "submodule" in text  # what to do


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc(h) if h.sum().item() > 0 else self.fc(h).tanh()


def test_opaque_leaves_are_noted_in_the_plan() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), Inner()), nn.Linear(8, 3))
    decoupled = dni_fx.decouple(model, ["1"], example_inputs=(torch.randn(4, 6),))
    assert decoupled.plan.report is not None
    (note,) = decoupled.plan.report.notes
    assert note.startswith("'1.1' is one opaque node")
    assert "'item'" in note
    assert "test_tracing.py:" in note
    assert note in str(decoupled.plan)
    x = torch.randn(5, 6)
    assert_bits_equal(decoupled(x), model(x), "with an opaque leaf")


def wrong_trace(model: nn.Module, args: Any, kwargs: Any) -> tracing.Trace:
    """A tracer that is silently wrong."""
    trace = tracing.trace_calls(model, args, kwargs)
    for node in trace.graph.nodes:
        if node.target is torch.relu:
            node.target = torch.tanh
            return trace
    raise AssertionError("no relu")


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_the_self_check_catches_a_wrong_trace_and_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    monkeypatch.setattr(compiler, "trace_calls", wrong_trace)
    model = Relu()
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    assert decoupled.plan.report is not None
    assert decoupled.plan.report.rung == "export"
    torch.testing.assert_close(decoupled(x), model(x))
    unchecked = dni_fx.decouple(model, ["a"], example_inputs=(x,), check=False)
    assert not torch.allclose(unchecked(x), model(x))

    def refuse(*_: Any) -> tracing.Trace:
        raise TracingError("torch.export: no")

    monkeypatch.setattr(compiler, "trace_export", refuse)
    with pytest.raises(
        TracingError, match=r"the traced model is not the model: output 0: differs by"
    ) as caught:
        dni_fx.decouple(model, ["a"], example_inputs=(x,))
    assert "torch.export: no" in str(caught.value)


class LostGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (lambda m, x: m.b(m.a(x).detach()), "no gradient where the model has one"),
        (lambda m, x: m.b(m.a(x)) * 1.01, "output 0"),
        (lambda m, x: m.b(m.a(x).double().float() + (m.a(x) - m.a(x).detach())), "gradient of a."),
        (lambda m, x: (m.b(m.a(x)), x), "other tensors"),
        (lambda m, x: m.b(m.a(x)).double(), "float64"),
        (lambda m, x: m.b(m.a(x))[:2], "(2, 3)"),
    ],
    ids=["detached", "scaled", "gradient", "more outputs", "dtype", "shape"],
)
def test_what_the_self_check_sees(broken: Any, word: str) -> None:
    model, x = LostGradient(), torch.randn(4, 6)
    state, generator = state_of(model), torch.get_rng_state()
    model.a.weight.grad = kept = torch.ones(8, 6)
    result = check_stages(model, lambda x: broken(model, x), (x,), {})
    assert result.mismatch is not None
    assert word in result.mismatch
    assert check_stages(model, model, (x,), {}).exact
    assert model.a.weight.grad is kept
    assert bool((kept == 1).all())
    assert_bits_equal([state_of(model), torch.get_rng_state()], [state, generator], "after checks")


def test_the_self_check_forgives_rounding_of_gradients_that_are_zero() -> None:
    """A bias before a BatchNorm has a true gradient of zero, so all that is there is rounding."""
    inp, norm, out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    model, x = nn.Sequential(inp, norm, out), torch.randn(4, 6)

    def in_double(x: Tensor) -> Tensor:
        h = inp(x).double()
        with torch.no_grad():
            norm(inp(x))
        return out(
            F.batch_norm(
                h, None, None, norm.weight.double(), norm.bias.double(), training=True
            ).float()
        )

    assert check_stages(model, in_double, (x,), {}).mismatch is None


def test_the_self_check_is_not_fooled_by_an_output_of_nan() -> None:
    model, x = LostGradient(), torch.randn(4, 6)
    result = check_stages(model, lambda x: model(x) * float("nan"), (x,), {})
    assert result.mismatch is not None


# Passes are pure.
# --------------------------------------------------------------------------------------------------


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
    positions = cutting.find_positions(flow, case.cuts)
    split = splitting.split_stages(flow, cutting.assign_stages(flow, positions), case.cuts)
    chosen = insertion.resolve_gradients(split.interfaces, "auto")
    sources = insertion.make_sources(
        split.interfaces, chosen, None, {i.name: torch.device("cpu") for i in split.interfaces}
    )
    modules = [s.module.code for s in split.stages]
    for stage in split.stages:
        emission.emit_functions(split, stage.index, sources)
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


# Plans.
# ------------------------------------------------------------------------------------------------------------


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
    [("unet", "auto"), ("fan_out", "zero"), ("gpt", "stale"), ("mlp_chain", "exact")],
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
    assert decoupled.is_exact == (gradients == "exact")
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


# Specs.
# ------------------------------------------------------------------------------------------------------------


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


# Replication.
# ------------------------------------------------------------------------------------------------------


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


# Code.
# -------------------------------------------------------------------------------------------------------------


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
