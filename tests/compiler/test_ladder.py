"""Tracing: the ladder of tracers, its check, and what it refuses."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import TracingError
from dni_fx.graphs import pipeline
from dni_fx.passes.cut import cutting, splitting
from dni_fx.passes.cut.checking import Yardstick, call_stages, check_stages
from dni_fx.passes.trace import exporting, tracing

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import sgd
from ..helpers.oracles import derivatives
from ..models.zoo import BY_NAME
from .kit import DataDependent


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
    "name",
    [
        "mlp_chain",
        "norm_dropout_chain",
        "residual",
        "conv_norm_chain",
        "unet",
        "two_towers",
        "transformer",
        "gpt",
        "dict_output",
        "nested_input",
        "tied_language_model",
        "inplace_chain",
        "several_inputs",
        "frozen_norm",
    ],
)
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
        flow, cutting.assign_stages(flow, tuple(cutting.find_cuts(flow, case.cuts))), case.cuts
    )
    assert len(split.stages) == len(case.cuts) + 1
    owners = {id(p) for p in model.parameters()}
    assert {id(p) for s in split.stages for p in s.module.parameters()} <= owners
    composed = functools.partial(call_stages, flow.trace, split)
    result = check_stages(Yardstick(model, args, kwargs), composed)
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
    assert "kit.py:" in text  # the user's line
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
    assert "test_ladder.py:" in note
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
    monkeypatch.setattr(pipeline, "trace_calls", wrong_trace)
    model = Relu()
    decoupled = dni_fx.decouple(model, ["a"], example_inputs=(x,))
    assert decoupled.plan.report is not None
    assert decoupled.plan.report.rung == "export"
    torch.testing.assert_close(decoupled(x), model(x))
    unchecked = dni_fx.decouple(model, ["a"], example_inputs=(x,), check=False)
    assert not torch.allclose(unchecked(x), model(x))

    def refuse(*_: Any) -> tracing.Trace:
        raise TracingError("torch.export: no")

    monkeypatch.setattr(pipeline, "trace_export", refuse)
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
    result = check_stages(Yardstick(model, (x,), {}), lambda x: broken(model, x))
    assert result.mismatch is not None
    assert word in result.mismatch
    assert check_stages(Yardstick(model, (x,), {}), model).exact
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

    assert check_stages(Yardstick(model, (x,), {}), in_double).mismatch is None


def test_the_self_check_is_not_fooled_by_an_output_of_nan() -> None:
    model, x = LostGradient(), torch.randn(4, 6)
    result = check_stages(Yardstick(model, (x,), {}), lambda x: model(x) * float("nan"))
    assert result.mismatch is not None
