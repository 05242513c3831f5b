"""Bad sources, trainers, NaN and infinity: one clear error, and nothing has changed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import distributed
from dni_fx.errors import CutError, DecouplingError, NonFiniteError, PlanMismatchError, TracingError
from dni_fx.sources import GradientSource, Linear, Prediction
from dni_fx.through_time.trainer import ThroughTime

from ..helpers.optimisers import adam, sgd
from ..helpers.refusing import refused
from ..models.feedforward import mlp_chain
from .refusals import X, Y, decouple, make_trainer, refused_step


class WrongShape(GradientSource):
    """Reads a number, so that no one can see before the first step what it returns."""

    def predict(self, values: Any, context: Any = None) -> Prediction:
        return Prediction((torch.zeros(3 + int(values[0].isnan().any())),))


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
    ids=[
        "close name",
        "no interface",
        "name in mapping",
        "exact for one",
        "exact for all by name",
        "conv",
        "None",
        "int",
        "wrong factory",
        "wrong signature",
        "module",
    ],
)
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


def test_a_step_within_a_step_and_one_on_another_thread() -> None:
    trainer, inner = make_trainer(), list[threading.Thread]()
    target = torch.zeros(4, 3)

    def again(output: Tensor, target: Tensor) -> Tensor:
        trainer.step(X, target=target)
        return F.mse_loss(output, target)

    trainer.loss = again
    words = ["while another step", "on another thread", "schedules.Threads()"]
    refused_step(DecouplingError, trainer, lambda: trainer.step(X, target=target), *words)
    found: list[str] = []

    def elsewhere(output: Tensor, target: Tensor) -> Tensor:
        def step() -> None:
            found.append(refused(DecouplingError, lambda: trainer.step(X, target=target), *words))

        inner.append(threading.Thread(target=step))
        inner[0].start()
        inner[0].join()
        return F.mse_loss(output, target)

    trainer.loss = elsewhere
    assert trainer.step(X, target=target).loss.isfinite()
    assert len(found) == 1
    trainer.loss = F.mse_loss
    trainer.step(X, target=target)  # the turn was given back each time


@pytest.mark.parametrize("kind", [dni_fx.Trainer, distributed.Trainer, ThroughTime])
def test_every_trainer_makes_one_step_at_a_time(kind: type) -> None:
    trainer = kind.__new__(kind)
    trainer.turn = threading.Lock()
    with trainer.turn:
        refused(DecouplingError, lambda: trainer.step(X), "while another step")


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_trainer_is_not_copied(copied: Callable[[Any], Any]) -> None:
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"neither copied nor pickled: save its state_dict\(\)"):
        copied(trainer)
    trainer.step(X, target=torch.zeros(4, 3))


def test_every_error_is_a_decoupling_error() -> None:
    for error in (TracingError, CutError, PlanMismatchError, NonFiniteError):
        assert issubclass(error, DecouplingError)
    assert issubclass(DecouplingError, ValueError)
