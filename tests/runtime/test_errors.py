"""Bad input: one clear error that names place, expected and found, and the next step; and nothing
has changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import CutError, DecouplingError, NonFiniteError, PlanMismatchError, TracingError
from dni_fx.sources import GradientSource, Linear, Prediction

from ..helpers.oracles import adam, assert_bits_equal, sgd, state_of
from ..models.zoo import Views, mlp_chain, norm_dropout_chain

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1])
CUTS = ["1", "3"]


pytestmark = pytest.mark.usefixtures("quiet")


def everything(trainer: dni_fx.Trainer) -> dict[str, Any]:
    """Parameters, buffers, ``.grad``, sources with their extra state, optimisers, random states,
    modes, steps.
    """
    decoupled = trainer.decoupled
    optimizers = [*trainer.optimizers.values(), *trainer.synthesizer_optimizers.values()]
    return {
        "state": state_of(decoupled),
        "whole state": {
            k: v.clone() if isinstance(v, Tensor) else v for k, v in decoupled.state_dict().items()
        },
        "gradients": {
            n: None if p.grad is None else p.grad.clone() for n, p in decoupled.named_parameters()
        },
        "optimizers": [_copied(o.state_dict()) for o in optimizers],
        "random": [torch.get_rng_state(), list(random.getstate()[1])],
        "modes": [m.training for m in decoupled.modules()],
        "requires_grad": [p.requires_grad for p in decoupled.parameters()],
        "steps": trainer.steps,
        "global": [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")],
    }


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def refused(error: type[BaseException], call: Callable[[], Any], *words: str) -> str:
    """The call raises the error, with a message that holds all words."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in: {text}"
    return text


def refused_step(
    error: type[BaseException], trainer: dni_fx.Trainer, call: Callable[[], Any], *words: str
) -> str:
    """The same, and the trainer, its model, sources, optimisers and random states keep every bit.

    Only gradients of a finished update may be gone, as after ``zero_grad``: all of them, or none.
    """
    before = everything(trainer)
    text = refused(error, call, *words)
    after = everything(trainer)
    if trainer.steps % trainer.accumulate == 0 and not any(
        g is not None for g in after["gradients"].values()
    ):
        before["gradients"] = dict.fromkeys(before["gradients"])
    assert_bits_equal(after, before, "state after the error")
    return text


def decouple(
    cuts: Any = ("1", "3"), model: nn.Module | None = None, **options: Any
) -> dni_fx.Decoupled:
    options.setdefault("example_inputs", (X,))
    return dni_fx.decouple(
        model if model is not None else mlp_chain(), cuts, check=False, **options
    )


def make_trainer(
    gradients: Any = "linear", *, warm: int = 2, model: nn.Module | None = None, **options: Any
) -> dni_fx.Trainer:
    decoupled = decouple(("2", "5"), model or norm_dropout_chain(), gradients=gradients)
    trainer = dni_fx.Trainer(decoupled, options.pop("loss", F.mse_loss), optimizer=adam, **options)
    for _ in range(warm):
        trainer.step(X, target=torch.randn(4, 3))
    return trainer


# Where to cut.
# -----------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.encoder(x)).relu())


def test_every_problem_of_the_cuts_is_gathered_with_close_names() -> None:
    model = Named().requires_grad_(True)
    model.encoder.requires_grad_(False)
    names = ["midle", "encoder", "middle", "nowhere_at_all"]
    text = refused(CutError, lambda: decouple(names, model), "3 of 4", "'midle'", "did you mean 'middle'",
                   "'encoder'", "frozen", "'nowhere_at_all'", "list_cut_points")  # fmt: skip
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


# Which model.
# ------------------------------------------------------------------------------------------------------


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
    ids=["function", "class", "data parallel", "compiled", "compiled inside", "scripted", "scripted inside", "lazy",
         "decoupled", "hook", "pre-hook", "backward hook", "backward pre-hook"],
)  # fmt: skip
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
    for options in ({"cuts": ["nope"]}, {"gradients": "nope"}, {"gradients": {"nope": "zero"}}, {"context": 3},
                    {"example_inputs": (X[:, :5],)}, {"example_inputs": ("text",)}):  # fmt: skip
        with pytest.raises(DecouplingError):
            dni_fx.decouple(model, **{"cuts": ["2"], "example_inputs": (X,), **options})
    assert_bits_equal(state_of(model), state, "model after errors")
    assert_bits_equal(torch.get_rng_state(), generator, "generator after errors")
    assert vars(model) == table
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


# Inputs.
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"example_inputs": X}, ["(x,)"]),
        ({"example_inputs": (X[:0],)}, ["empty batch", "(0, 6)"]),
        ({"example_inputs": ()}, ["input"]),
        ({"example_inputs": (X, X)}, ["positional arguments"]),
        ({"example_inputs": (X[:, :5],)}, ["'0'", "4x5"]),
        ({"example_inputs": (X.double(),)}, ["Double"]),
        ({"example_inputs": (None,)}, ["NoneType"]),
        ({"example_kwargs": [1]}, ["example_kwargs"]),
        ({"example_kwargs": {"nothing": X}}, ["nothing"]),
        ({"inputs": "liner"}, ["liner", "linear"]),
    ],
    ids=[
        "tensor",
        "empty batch",
        "none",
        "two",
        "features",
        "dtype",
        "no tensor",
        "kwargs",
        "keyword",
        "inputs",
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_examples_that_the_model_refuses(
    options: dict[str, Any], words: list[str], check: bool
) -> None:
    call = {"cuts": ["1"], "example_inputs": (X,), "check": check, **options}
    refused(DecouplingError, lambda: dni_fx.decouple(mlp_chain(), **call), *words)


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((X.double(),), {}, "Double"),
        ((X.long(),), {}, "Long"),
        ((X[:, :5],), {}, "4x5"),
        ((X[None],), {}, ""),
        ((), {}, "input"),
        ((X, X), {}, "positional arguments"),
        ((X,), {"nothing": X}, "nothing"),
        ((None,), {}, "NoneType"),
        (([1.0],), {}, "list"),
        ((X[:0],), {}, "empty batch"),
    ],
    ids=[
        "double",
        "integer",
        "features",
        "rank",
        "none",
        "two",
        "keyword",
        "None",
        "list",
        "empty batch",
    ],
)
def test_a_step_on_inputs_that_do_not_fit(args: Any, kwargs: Any, word: str) -> None:
    trainer = make_trainer()
    refused_step(
        DecouplingError,
        trainer,
        lambda: trainer.step(*args, target=torch.zeros(4, 3), **kwargs),
        word,
    )
    trainer.step(X, target=torch.zeros(4, 3))  # and it goes on


def test_inputs_that_the_model_takes_but_the_sources_cannot_serve() -> None:
    trainer = dni_fx.Trainer(decouple(), F.mse_loss, optimizer=sgd)
    assert trainer.decoupled(X[None]).shape == (1, 4, 3)  # evaluated on a graph of its own
    refused_step(
        DecouplingError,
        trainer,
        lambda: trainer.step(X[None], target=torch.zeros(1, 4, 3)),
        "(4, 8)",
        "(1, 4, 8)",
    )


def test_the_plan_before_tracing() -> None:
    decoupled = dni_fx.decouple(mlp_chain(), CUTS)
    for ask in ("plan", "stages", "interfaces", "sources"):
        refused(
            DecouplingError,
            lambda ask=ask: getattr(decoupled, ask),
            "not traced yet",
            "example_inputs=",
        )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    refused(DecouplingError, lambda: trainer.load_state_dict({}), "not traced yet")
    trainer.step(X, target=Y)
    assert decoupled.plan.cuts == ("1", "3")


# Plans.
# ------------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_graph() -> None:
    plan = decouple(["encoder"], Named()).plan
    refused(
        PlanMismatchError, lambda: decouple(plan), "Named", "Sequential", plan.digest, "plan_cuts"
    )
    refused(PlanMismatchError, lambda: dni_fx.decouple(mlp_chain(), plan)(X), plan.digest)


def test_a_plan_from_json_has_no_report() -> None:
    plan = dni_fx.CutPlan.from_json(decouple().plan.to_json())
    for ask in ("interfaces", "stages"):
        refused(DecouplingError, lambda ask=ask: getattr(plan, ask), "JSON", "decouple")
    assert "after 1" in str(plan)
    assert decouple(plan).plan == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", ["JSON"]),
        ("", ["JSON"]),
        ("[]", ["format"]),
        ("null", ["format"]),
        ({"format": "other"}, ["format"]),
        ({"version": 2}, ["version 2", "version 1"]),
        ({"version": None}, ["version"]),
        ({"cuts": "layer"}, ["'cuts'"]),
        ({"cuts": [1]}, ["'cuts'"]),
        ({"digest": None}, ["'digest'"]),
        ({"gradients": []}, ["'gradients'"]),
        ({"gradients": {"1": 3}}, ["'gradients'"]),
    ],
    ids=str,
)
def test_broken_plans(change: Any, words: list[str]) -> None:
    text = (
        change
        if isinstance(change, str)
        else json.dumps({**json.loads(decouple().plan.to_json()), **change})
    )
    refused(DecouplingError, lambda: dni_fx.CutPlan.from_json(text), *words)


@pytest.mark.parametrize("text", [None, 3, b"\xff", {"format": "dni_fx cut plan"}], ids=repr)
def test_plans_that_are_no_text(text: Any) -> None:
    refused(DecouplingError, lambda: dni_fx.CutPlan.from_json(text), "plan")


def test_a_plan_whose_cuts_were_edited() -> None:
    content = json.loads(decouple().plan.to_json())
    content["cuts"] = ["1", "thre"]
    refused(CutError, lambda: decouple(dni_fx.CutPlan.from_json(json.dumps(content))), "'thre'")


def test_a_plan_made_with_a_factory_asks_for_it() -> None:
    class Own(Linear):
        pass

    plan = decouple(gradients=Own).plan
    refused(
        DecouplingError,
        lambda: decouple(dni_fx.CutPlan.from_json(plan.to_json())),
        "Own",
        "gradients=",
    )
    assert isinstance(decouple(plan, gradients=Own).sources["1"], Own)


# Sources.
# ----------------------------------------------------------------------------------------------------------


class WrongShape(GradientSource):
    def predict(self, values: Any, context: Any = None) -> Prediction:
        return Prediction((torch.zeros(3),))


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ("linaer", ["'linaer'", "did you mean 'linear'"]),
        ({"11": "linear"}, ["'11'", "'1'", "'3'"]),
        ({"1": "lin"}, ["interface '1'", "'lin'", "'linear'"]),
        ({"1": "exact"}, ["'exact'", "whole model"]),
        ({"1": "exact", "3": "exact"}, ["whole model"]),
        ("conv", ["interface '1'", "(4, 8)", "'linear'"]),
        (None, ["None"]),
        (3, ["3"]),
        (lambda specs, context: nn.Linear(2, 2), ["interface '1'", "Linear", "GradientSource"]),
        (lambda specs: None, ["interface '1'"]),
        (nn.Linear(2, 2), ["interface '1'"]),
    ],
    ids=["close name", "no interface", "name in mapping", "exact for one", "exact for all by name", "conv", "None", "int",
         "wrong factory", "wrong signature", "module"],
)  # fmt: skip
def test_gradients_that_cannot_be_had(gradients: Any, words: list[str]) -> None:
    refused(DecouplingError, lambda: decouple(gradients=gradients), *words)


def test_a_source_object_instead_of_a_factory() -> None:
    refused(
        DecouplingError,
        lambda: decouple(gradients=decouple().sources["1"]),
        "each interface makes its own",
    )


def test_a_prediction_of_the_wrong_shape() -> None:
    trainer = dni_fx.Trainer(
        decouple(gradients={"1": WrongShape, "3": "zero"}), F.cross_entropy, optimizer=sgd
    )
    refused_step(
        DecouplingError, trainer, lambda: trainer.step(X, target=Y), "'1'", "(4, 8)", "(3,)"
    )


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (3, ["context=", "callable"]),
        (lambda target: target, ["context=", "float"]),
        (lambda target: target["label"], ["features"]),
        (lambda target: torch.zeros(7, 3), ["context=", "(7, 3)", "4 labels"]),
    ],
    ids=["no callable", "integers", "fails", "shape"],
)
def test_contexts_that_cannot_be_had(context: Any, words: list[str]) -> None:
    refused(DecouplingError, lambda: decouple(context=context), *words)


def test_contexts_at_a_step() -> None:
    trainer = dni_fx.Trainer(
        decouple(context=dni_fx.one_hot(3), gradients="linear"), F.cross_entropy, optimizer=sgd
    )
    trainer.step(X, target=Y)
    refused_step(
        DecouplingError, trainer, lambda: trainer.step(X, target=Y + 1), "one_hot(3)", "label 3"
    )
    refused_step(
        DecouplingError,
        trainer,
        lambda: trainer.step(X, target=Y.float()),
        "one_hot(3)",
        "integer labels",
    )
    refused_step(
        DecouplingError, trainer, lambda: trainer.step(X, target=Y[:3]), "(3, 3)", "(4, 8)"
    )
    trainer.loss = lambda output, target: output.sum()
    refused_step(DecouplingError, trainer, lambda: trainer.step(X), "target=")
    trainer.decoupled.context = lambda target: torch.zeros(len(target), 5)
    refused_step(DecouplingError, trainer, lambda: trainer.step(X, target=Y), "3 features", "5")


# The trainer.
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "pipelined"}, ["'pipelined'", "'sequential'"]),
        ({"accumulate": 0}, ["accumulate"]),
        ({"accumulate": 1.5}, ["accumulate"]),
        ({"metrics_every": 0}, ["metrics_every"]),
        ({"clip_norm": -1.0}, ["clip_norm"]),
        ({"clip_norm": "1"}, ["clip_norm"]),
        ({"optimizer": torch.optim.SGD(mlp_chain().parameters(), 0.1)}, ["optimizer"]),
        ({"optimizer": lambda params: None}, ["optimizer=", "NoneType"]),
        ({"loss": None}, ["loss"]),
    ],
    ids=[
        "schedule",
        "accumulate 0",
        "accumulate 1.5",
        "metrics",
        "clip -1",
        "clip text",
        "made",
        "none made",
        "loss",
    ],
)
def test_trainer_arguments(options: dict[str, Any], words: list[str]) -> None:
    call = {"loss": F.cross_entropy, "optimizer": sgd, **options}
    decoupled = decouple()
    refused(DecouplingError, lambda: dni_fx.Trainer(decoupled, call.pop("loss"), **call), *words)


def test_trainer_takes_decoupled_models_only() -> None:
    refused(
        DecouplingError,
        lambda: dni_fx.Trainer(mlp_chain(), F.cross_entropy, optimizer=sgd),
        "decouple",
        "Sequential",
    )


@pytest.mark.parametrize("gradients", ["linear", "exact"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_that_give_no_scalar_with_a_graph(gradients: str, accumulate: int) -> None:
    trainer = make_trainer(gradients, warm=3, accumulate=accumulate)
    step = lambda: trainer.step(X, target=torch.zeros(4, 3))  # noqa: E731
    for loss, words in (
        (lambda output, _: output, ["(4, 3)", "one element"]),
        (lambda output, _: output.sum().item(), ["float", "one element"]),
        (lambda output, _: output.detach().sum(), ["loss", "graph"]),
        (lambda output, _: torch.tensor(3.0), ["loss", "graph"]),
    ):
        trainer.loss = loss
        refused_step(DecouplingError, trainer, step, *words)


@pytest.mark.parametrize("gradients", ["linear", "exact"])
def test_a_loss_that_raises_is_the_users_own_error(gradients: str) -> None:
    trainer = make_trainer(gradients, loss=F.cross_entropy, warm=0)
    trainer.step(X, target=Y)

    def failing(output: Tensor, target: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("my loss")

    refused_step(IndexError, trainer, lambda: trainer.step(X, target=Y + 10), "out of bounds")
    trainer.loss = failing
    refused_step(RuntimeError, trainer, lambda: trainer.step(X, target=Y), "my loss")


def test_a_missing_target() -> None:
    trainer = make_trainer(loss=F.cross_entropy, warm=0)
    refused_step(DecouplingError, trainer, lambda: trainer.step(X), "target=")


def test_a_stage_without_its_loss() -> None:
    decoupled = decouple(["3"])
    first = decoupled.stages[0].step(decoupled.bind(X))
    refused(DecouplingError, lambda: decoupled.stages[1].step({**first.outputs}), "loss=")
    exact = decouple(["3"], gradients="exact")
    refused(DecouplingError, lambda: exact.stages[0].step(exact.bind(X)), "'exact'", "Trainer.step")


def test_a_state_of_other_stages() -> None:
    trainer, other = make_trainer(), dni_fx.Trainer(decouple(["1"]), F.mse_loss, optimizer=adam)
    refused_step(
        DecouplingError, other, lambda: other.load_state_dict(trainer.state_dict()), "plan"
    )
    refused_step(DecouplingError, other, lambda: other.load_state_dict({}), "optimizers")
    refused_step(DecouplingError, other, lambda: other.load_state_dict(None), "state")
    whole = other.state_dict()
    for key in whole:
        partial = {k: v for k, v in whole.items() if k != key}
        refused_step(
            DecouplingError, other, lambda partial=partial: other.load_state_dict(partial), key
        )
    same_stages = make_trainer("mlp", warm=1)
    refused_step(
        DecouplingError, same_stages, lambda: same_stages.load_state_dict(trainer.state_dict())
    )


def test_batches_of_the_wrong_kind() -> None:
    trainer = make_trainer()
    for batch in ([X], X, {"input": X}, (X,)):
        refused_step(
            DecouplingError,
            trainer,
            lambda batch=batch: trainer.fit([batch], progress=False),
            "batch",
            "unpack=",
        )


# NaN and infinity.
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gradients", ["linear", "mlp", "stale", "zero", "exact"])
def test_non_finite_values_are_named_and_change_nothing(gradients: str, accumulate: int) -> None:
    trainer = make_trainer(gradients, warm=3, accumulate=accumulate)
    target = torch.randn(4, 3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        kind = "NaN" if bad != bad else "infinite"
        broken, wrong = X.clone(), target.clone()
        broken[0, 0] = wrong[1, 2] = bad
        refused_step(
            NonFiniteError,
            trainer,
            lambda wrong=wrong: trainer.step(X, target=wrong),
            "step 4",
            "the loss",
            kind,
        )
        refused_step(
            NonFiniteError,
            trainer,
            lambda broken=broken: trainer.step(broken, target=target),
            "step 4",
            "'2'",
        )
        for layer, place in ((0, "interface '2'"), (4, "interface '5'"), (8, "loss")):
            weight = trainer.decoupled.model[layer].weight.data
            kept = weight.clone()
            weight[0, 0] = bad
            refused_step(
                NonFiniteError, trainer, lambda: trainer.step(X, target=target), "step 4", place
            )
            weight.copy_(kept)
    trainer.loss = lambda output, _: (
        (output - output.detach()).abs().sqrt().sum()
    )  # finite, but not its gradient
    refused_step(
        NonFiniteError, trainer, lambda: trainer.step(X, target=target), "step 4", "gradient"
    )
    trainer.loss = F.mse_loss
    assert trainer.step(X, target=target).loss.isfinite()


@pytest.mark.parametrize("where", ["parameter", "scale"])
def test_non_finite_sources_are_named(where: str) -> None:
    trainer = make_trainer("linear", warm=3)
    source = trainer.decoupled.sources["5"]
    tensor = source.scale if where == "scale" else next(source.parameters()).data
    tensor.fill_(float("nan"))
    refused_step(
        NonFiniteError,
        trainer,
        lambda: trainer.step(X, target=torch.zeros(4, 3)),
        "step 4",
        "interface '5'",
    )


class BadFit(Linear):
    """The prediction is fine and so is the target, but the regression's own loss is not finite."""

    def fit(self, prediction: Prediction, message: Any) -> Tensor:
        return super().fit(prediction, message) * float("inf")


def test_a_regression_that_is_not_finite_is_named_before_anything_is_updated() -> None:
    trainer = make_trainer({"2": "stale", "5": BadFit}, warm=0)
    refused_step(
        NonFiniteError,
        trainer,
        lambda: trainer.step(X, target=torch.zeros(4, 3)),
        "step 1",
        "interface '5'",
    )


class FailingFit(Linear):
    def fit(self, prediction: Prediction, message: Any) -> Tensor:
        raise RuntimeError("my fit")


def test_a_regression_that_raises_leaves_the_sources_before_it_as_they_were() -> None:
    trainer = make_trainer({"2": "stale", "5": FailingFit}, warm=0)
    refused_step(RuntimeError, trainer, lambda: trainer.step(X, target=torch.zeros(4, 3)), "my fit")


def test_every_error_is_a_decoupling_error() -> None:
    for error in (TracingError, CutError, PlanMismatchError, NonFiniteError):
        assert issubclass(error, DecouplingError)
    assert issubclass(DecouplingError, ValueError)
