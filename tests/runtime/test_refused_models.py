"""Bad cuts and models: one clear error that names place, expected and found, and the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import CutError, DecouplingError

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.refusing import refused
from ..models.feedforward import mlp_chain, norm_dropout_chain
from ..models.shared import Views
from .refusals import Named, X, decouple


def test_every_problem_of_the_cuts_is_gathered_with_close_names() -> None:
    model = Named().requires_grad_(True)
    model.encoder.requires_grad_(False)
    names = ["midle", "encoder", "middle", "nowhere_at_all"]
    text = refused(
        CutError,
        lambda: decouple(names, model),
        "3 of 4",
        "'midle'",
        "did you mean 'middle'",
        "'encoder'",
        "frozen",
        "'nowhere_at_all'",
        "list_cut_points",
    )
    assert "'middle':" not in text


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        (3, ["stages=3"]),
        (True, ["stages="]),
        ("1", ["['1']"]),
        ("layer2", ["['layer2']"]),
        ([1], ["names", "1"]),
        (None, ["cuts="]),
        (1.5, ["cuts="]),
        (["1", "1"], ["'1'", "same place"]),
        (["1", "_1"], ["same place"]),
        ([""], ["''"]),
    ],
    ids=repr,
)
def test_cuts_of_the_wrong_kind(cuts: Any, words: list[str]) -> None:
    refused(DecouplingError, lambda: decouple(cuts), *words)


@pytest.mark.parametrize("stages", [0, -1, 2.0, True, "4"])
def test_stages_of_the_wrong_kind(stages: Any) -> None:
    refused(DecouplingError, lambda: decouple("auto", stages=stages), "stages=", repr(stages))


def test_cuts_and_stages_do_not_go_together() -> None:
    refused(DecouplingError, lambda: decouple(["1"], stages=3), "stages=", "cuts=")
    plan = decouple(["1"]).plan
    refused(DecouplingError, lambda: decouple(plan, stages=3), "stages=")


def test_nothing_is_left_after_the_last_node() -> None:
    refused(CutError, lambda: decouple(["1", "6"]), "'6'", "list_cut_points")


def test_the_last_node_is_not_listed_as_a_legal_cut() -> None:
    points = {p.name: p for p in dni_fx.list_cut_points(mlp_chain(), (X,))}
    assert "6" not in points or not points["6"].legal


class TornViews(nn.Module):
    """Two halves of one tensor, one written to while the other waits: a cut between tears them
    apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        whole = h * 2
        half = whole[:, :4]
        scale = torch.sigmoid(h)
        half.mul_(0.5)
        return self.out(whole * scale + h)


def test_a_cut_that_tears_views_apart_is_illegal_with_the_reason() -> None:
    points = dni_fx.list_cut_points(TornViews(), (X,))
    illegal = [p for p in points if not p.legal]
    assert illegal
    text = refused(
        CutError,
        lambda: decouple([illegal[0].name], TornViews()),
        repr(illegal[0].name),
        illegal[0].reason,
    )
    assert any(word in text for word in ("view", "memory", "in place", "written"))
    for point in points:  # all others may be cut, and the split model is the model
        if point.legal:
            dni_fx.decouple(TornViews(), [point.name], example_inputs=(X,))


@pytest.mark.parametrize("make", [Views, TornViews, Named])
def test_listed_cut_points_keep_their_word(make: Callable[[], nn.Module]) -> None:
    for point in dni_fx.list_cut_points(make(), (X,)):
        if point.legal:
            decoupled = decouple([point.name], make())
            assert len(decoupled.stages) == len(decoupled.plan.stages) == 2
            assert len(decoupled.interfaces) == point.interfaces
        else:
            refused(CutError, lambda point=point: decouple([point.name], make()), point.reason)


def test_no_trainable_path_crosses() -> None:
    model = mlp_chain()
    model[0].requires_grad_(False)
    refused(CutError, lambda: decouple(["1"], model), "'1'", "trainable path")


@pytest.mark.parametrize("cuts", [["1"], "auto"], ids=str)
@pytest.mark.parametrize("make", [lambda: mlp_chain().requires_grad_(False), nn.Flatten])
def test_nothing_to_train(make: Callable[[], nn.Module], cuts: Any) -> None:
    refused(CutError, lambda: decouple(cuts, make()), "trainable")


class Hidden(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(6, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))


def hooked(kind: str) -> nn.Module:
    model = mlp_chain()
    getattr(model, kind)(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: F.relu, ["nn.Module", "function"]),
        (lambda: nn.Linear, ["nn.Module", "type"]),
        (lambda: nn.DataParallel(mlp_chain()), ["DataParallel", ".module"]),
        (lambda: torch.compile(mlp_chain()), ["compiled", "_orig_mod"]),
        (lambda: Hidden(torch.compile(nn.Linear(8, 8))), ["'inner'", "compil"]),
        (lambda: torch.jit.script(mlp_chain()), ["scripted"]),
        (lambda: Hidden(torch.jit.script(nn.Linear(8, 8))), ["'inner'", "script"]),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), ["'0'", "lazy"]),
        (lambda: decouple(["1"]), ["decoupled already", ".model"]),
        (lambda: hooked("register_forward_hook"), ["forward hooks", "submodules"]),
        (lambda: hooked("register_forward_pre_hook"), ["forward pre hooks"]),
        (lambda: hooked("register_full_backward_hook"), ["backward hooks"]),
        (lambda: hooked("register_full_backward_pre_hook"), ["backward pre hooks"]),
    ],
    ids=[
        "function",
        "class",
        "data parallel",
        "compiled",
        "compiled inside",
        "scripted",
        "scripted inside",
        "lazy",
        "decoupled",
        "hook",
        "pre-hook",
        "backward hook",
        "backward pre-hook",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_not_taken(make: Callable[[], Any], words: list[str]) -> None:
    refused(DecouplingError, lambda: decouple(["a"], make()), *words)


def test_a_model_wrapped_for_data_parallel_training(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp_chain())
        refused(
            DecouplingError, lambda: decouple(["1"], wrapped), "DistributedDataParallel", ".module"
        )
    finally:
        torch.distributed.destroy_process_group()


def test_errors_leave_the_model_as_it_was() -> None:
    model = norm_dropout_chain()
    state, generator, table = state_of(model), torch.get_rng_state(), dict(vars(model))
    for options in (
        {"cuts": ["nope"]},
        {"gradients": "nope"},
        {"gradients": {"nope": "zero"}},
        {"context": 3},
        {"example_inputs": (X[:, :5],)},
        {"example_inputs": ("text",)},
    ):
        with pytest.raises(DecouplingError):
            dni_fx.decouple(model, **{"cuts": ["2"], "example_inputs": (X,), **options})
    assert_bits_equal(state_of(model), state, "model after errors")
    assert_bits_equal(torch.get_rng_state(), generator, "generator after errors")
    assert vars(model) == table
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
