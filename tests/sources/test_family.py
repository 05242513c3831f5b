"""Every kind of source inside the trainer: messages, whole boundaries, synthetic inputs and
schedules.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.plan import CutPlan
from dni_fx.runtime.answers import sample_losses
from dni_fx.schedules import Calibration, Mode, RandomUpdates, Schedule, WarmUp
from dni_fx.sources import (
    SOURCES,
    Corrected,
    Critic,
    Delayed,
    GradientSource,
    InputSource,
    Joint,
    Prediction,
)
from dni_fx.sources.inputs import InputPrediction

from ..helpers import oracles
from ..models.zoo import BY_NAME

NAMES = [name for name in SOURCES if name not in ("exact", "conv")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with oracles.one_thread():
        yield


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(6, 3))


class Skips(nn.Module):
    """Two values cross each cut, and the last stage uses values of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a).tanh()
        c = self.c(a + b).relu()
        return self.head(a * c + b)


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in ((3, 4), (4, 6))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


MODELS: dict[str, tuple[Any, list[str], tuple[int, ...]]] = {
    "mlp": (mlp, ["0", "1", "2"], (6,)),
    "skips": (Skips, ["a", "b", "c"], (6,)),
    "conv": (conv, ["0", "1"], (3, 8, 8)),
}


def batch(shape: tuple[int, ...], step: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, *shape, generator=generator), torch.randint(
        3, (size,), generator=generator
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trainer_of(gradients: Any, model: str = "mlp", **options: Any) -> dni_fx.Trainer:
    make, cuts, shape = MODELS[model]
    inputs = options.pop("inputs", None)
    decoupled = dni_fx.decouple(
        make(), options.pop("cuts", cuts), example_inputs=(batch(shape)[0],), gradients=gradients, inputs=inputs,
        context=options.pop("context", dni_fx.one_hot(3)), check=False,
    )  # fmt: skip
    return dni_fx.Trainer(decoupled, options.pop("loss", F.cross_entropy), optimizer=sgd, **options)


def train(trainer: dni_fx.Trainer, steps: int, model: str = "mlp", first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x, y = batch(MODELS[model][2], step)
        trainer.step(x, target=y)


def noted(trainer: dni_fx.Trainer, stage: int, seen: dict[str, Tensor]) -> None:
    """Keep the gradients that a stage steps with."""
    module = trainer.decoupled.model[stage]
    trainer.optimizers[f"stage_{stage}"].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    )


def state(trainer: dni_fx.Trainer) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in trainer.decoupled.model.state_dict().items()}


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [None, "auto"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_source_trains_every_stage_on_every_graph(
    name: str, model: str, inputs: str | None
) -> None:
    trainer = trainer_of(
        name, model, inputs=inputs, synthesizer_optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    before, sources = state(trainer), copy.deepcopy(trainer.decoupled.synthesizers.state_dict())
    train(trainer, 6, model)
    trainer.drain()
    for parameter, _ in trainer.decoupled.model.named_parameters():
        if parameter.endswith("weight"):  # biases before batch norm have no gradient
            learns = name != "zero" or parameter.startswith(("3.", "head", "4."))
            moved = not torch.equal(state(trainer)[parameter], before[parameter])
            assert moved == learns, parameter
    for key, value in trainer.decoupled.synthesizers.state_dict().items():
        if key.endswith("weight") and "norm" not in key:
            assert not torch.equal(value, sources[key]), f"{key} has not learnt"
    assert not trainer._under_way


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("zero", "stale", "delayed", "mix", "feedback")]
)
def test_one_forward_of_each_source_a_step(name: str) -> None:
    trainer = trainer_of(name, "skips")
    calls: list[int] = []
    for source in trainer.decoupled.sources.values():
        source.register_forward_hook(lambda module, *_: calls.append(id(module)))
    train(trainer, 5, "skips")
    assert len(calls) == 5 * len(set(calls))


@pytest.mark.parametrize("name", ["linear", "critic", "sobolev", "distill", "local"])
def test_sources_predict_before_the_stages_behind_have_run(name: str) -> None:
    """Perturbing a later stage leaves the gradients of earlier ones untouched."""
    grads = []
    for scale in (1.0, 3.0):
        trainer = trainer_of(name)
        train(trainer, 2)
        with torch.no_grad():
            trainer.decoupled.model[3].weight.mul_(scale)
        seen: dict[str, Tensor] = {}
        noted(trainer, 1, seen)
        train(trainer, 1, first=2)
        grads.append(seen)
    oracles.assert_bits_equal(grads[0], grads[1], name)


# --------------------------------------------------------------------------------------------------


class Spy(GradientSource):
    """Predicts zeros, an estimate of loss and logits, and remembers what came back."""

    def __init__(
        self, specs: Sequence[Any], context: Any = None, message: str = "loss", estimate: Any = None
    ) -> None:
        super().__init__(specs, context)
        self.message, self.estimate, self.heard = message, estimate, []

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
        size = values[0].shape[0]
        known = None if self.estimate is None else torch.full((size,), float(self.estimate))
        logits = None if self.estimate is None else torch.full((size, 3), float(self.estimate))
        return Prediction(tuple(torch.zeros_like(v) for v in values), None, known, logits)

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> None:
        self.heard.append(message)


@pytest.mark.parametrize("kind", ["loss", "logits"])
def test_estimates_come_from_the_next_source_that_makes_them(kind: str) -> None:
    trainer = trainer_of(
        {"0": partial(Spy, message=kind), "1": "zero", "2": partial(Spy, message=kind, estimate=7)}
    )
    x, y = batch((6,))
    output = trainer.step(x, target=y).outputs
    first, last = (trainer.decoupled.sources[n].heard[0][0] for n in ("0", "2"))
    assert bool((first == 7).all())  # past the control, which estimates nothing
    want = F.cross_entropy(output, y, reduction="none") if kind == "loss" else output
    torch.testing.assert_close(last, want)


@dataclass
class Answer:
    """As models of transformers answer; two fields, so that it could not be unpacked into one."""

    hidden: Tensor
    logits: Tensor


torch.utils._pytree.register_dataclass(Answer)


@pytest.mark.parametrize("kind", ["attribute", "key"])
def test_logits_and_error_of_an_output_that_names_its_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            hidden = self[2](self[1](self[0](x)))
            logits = self[3](hidden)
            return (
                Answer(hidden, logits)
                if kind == "attribute"
                else {"hidden": hidden, "logits": logits}
            )

    def loss(output: Any, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(
            output.logits if kind == "attribute" else output["logits"], y, reduction=reduction
        )

    spy = partial(Spy, message="loss+logits+error")
    x, y = batch((6,))
    monkeypatch.setitem(MODELS, "named", (lambda: Named(*mlp()), *MODELS["mlp"][1:]))
    plain, named = trainer_of(spy), trainer_of(spy, "named", loss=loss)
    for trainer in (plain, named):
        trainer.step(x, target=y)
    for mine, theirs in zip(
        *(t.decoupled.sources["2"].heard[0] for t in (plain, named)), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("message", ["logits", "error"])
def test_an_output_without_logits(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return {"answer": super().forward(x)}

    monkeypatch.setitem(MODELS, "two", (lambda: Two(*mlp()), *MODELS["mlp"][1:]))
    trainer = trainer_of(
        partial(Spy, message=message),
        "two",
        loss=lambda output, y: F.cross_entropy(output["answer"], y),
    )
    x, y = batch((6,))
    with pytest.raises(DecouplingError, match="called 'logits'"):
        trainer.step(x, target=y)


@pytest.mark.parametrize("apart", [Tensor.clone, Tensor.detach])
def test_logits_that_the_loss_is_not_made_of(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return {"used": found, "logits": apart(found)}

    monkeypatch.setitem(MODELS, "apart", (lambda: Apart(*mlp()), *MODELS["mlp"][1:]))
    trainer = trainer_of(
        partial(Spy, message="error"),
        "apart",
        loss=lambda output, y: F.cross_entropy(output["used"], y),
    )
    x, y = batch((6,))
    with pytest.raises(
        DecouplingError, match="let the model return the logits that the loss is made of"
    ):
        trainer.step(x, target=y)


def test_several_kinds_come_in_order() -> None:
    trainer = trainer_of(partial(Spy, message="gradient+loss+logits+error"))
    x, y = batch((6,))
    output = trainer.step(x, target=y).outputs.requires_grad_()
    loss = F.cross_entropy(output, y)
    (error,) = torch.autograd.grad(loss, output)
    true = trainer_of("zero").true_gradients(x, target=y)["2"]
    gradient, losses, logits, heard = trainer.decoupled.sources["2"].heard[0]
    torch.testing.assert_close(gradient, true)
    torch.testing.assert_close(losses.mean(), loss.detach())
    torch.testing.assert_close(logits, output.detach())
    torch.testing.assert_close(heard, error)


def test_a_message_that_does_not_exist() -> None:
    with pytest.raises(DecouplingError, match="must be 'none'"):
        train(trainer_of(partial(Spy, message="loss+gradient")), 1)


def test_losses_of_each_sample() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    want = F.cross_entropy(logits, labels, reduction="none")
    module = nn.CrossEntropyLoss()
    compiled = torch.compile(module, backend="eager")
    for loss in (F.cross_entropy, module, compiled, lambda o, t: F.cross_entropy(o, t)):
        torch.testing.assert_close(sample_losses(loss, logits, labels), want)
    assert module.reduction == "mean"
    values = torch.tensor([[0.0, 0.0, 0.0, 2.0]])  # zeros that count
    assert sample_losses(F.mse_loss, values, torch.zeros(1, 4)).item() == 1
    ignored = torch.tensor([0, -100, 1, 1, 0])
    for loss in (F.cross_entropy, module, lambda o, t: F.cross_entropy(o, t, ignore_index=-100)):
        assert sample_losses(loss, logits, ignored)[1] == 0
    tokens, targets = torch.randn(4, 3, 6), torch.randint(3, (4, 6))
    targets[0, 2:] = -100
    each = [F.cross_entropy(tokens[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sample_losses(F.cross_entropy, tokens, targets), torch.stack(each))
    with pytest.raises(DecouplingError, match="sample by sample"):
        sample_losses(lambda out, _: out["loss"], {"loss": logits.mean()}, None)


class Wrong(GradientSource):
    """Returns what it is told to."""

    message = "none"
    answers: tuple[Any, Any] = (None, None)

    def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        return self.answers[0]

    def fit(self, prediction: Prediction, message: tuple[Tensor, ...]) -> Any:
        return self.answers[1]

    def complete(self, prediction: Prediction, awaited: tuple[Tensor, ...]) -> Any:
        return self.answers[1]

    def flops(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("answers", "lag", "words"),
    [
        ((torch.zeros(12, 6), None), None, "must return a Prediction"),
        ((Prediction(()), None), None, "must return a Prediction"),
        ((Prediction(None), None), None, "must return a Prediction"),
        ((Prediction((torch.zeros(12, 6),) * 2), None), None, "2 of them"),
        (
            (Prediction((torch.zeros(12, 6),)), torch.zeros(2)),
            None,
            "must return a scalar with its graph",
        ),
        (
            (Prediction((torch.zeros(12, 6),)), torch.zeros(())),
            None,
            "must return a scalar with its graph",
        ),
        ((Prediction(None), None), 0, "complete must return a tuple of 1"),
    ],
)
def test_a_source_that_answers_wrongly_is_told_what_was_expected(
    answers: Any, lag: int | None, words: str
) -> None:
    with pytest.raises(DecouplingError, match=words):
        train(trainer_of(type("Own", (Wrong,), {"answers": answers, "lag": lag})), 1)


def test_a_schedule_that_names_no_stage() -> None:
    with pytest.raises(DecouplingError, match="names stage 7"):
        train(trainer_of("local", schedule=Fixed(Mode(0.0, (7,)))), 1)


def test_exact_is_for_the_whole_model_by_class_too() -> None:
    with pytest.raises(DecouplingError, match="whole model"):
        trainer_of({"0": SOURCES["exact"], "1": "linear"})


@pytest.mark.parametrize("name", ["local", "critic", "sobolev", "distill", "linear"])
def test_labels_per_token(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    tokens, labels = torch.randint(9, (4, 6)), torch.randint(5, (4, 6))
    decoupled = dni_fx.decouple(
        model,
        ["0", "2"],
        example_inputs=(tokens,),
        gradients=name,
        context=dni_fx.one_hot(5, positions=1),
    )

    def loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)

    trainer = dni_fx.Trainer(decoupled, loss, optimizer=sgd)
    first = trainer.step(tokens, target=labels).loss
    for _ in range(60):
        last = trainer.step(tokens, target=labels).loss
    assert last < first


@pytest.mark.parametrize("name", ["linear", "local", "delayed", "corrected"])
def test_batches_are_freed_without_the_collector(name: str) -> None:
    trainer = trainer_of(name)
    train(trainer, 4)
    gc.collect()
    gc.disable()
    try:
        seen = []
        for step in range(8):
            x, y = batch((6,), step)
            seen.append(weakref.ref(x))
            seen.append(weakref.ref(trainer.step(x, target=y).outputs))
            del x, y
        assert sum(ref() is not None for ref in seen) <= 1
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ w


@pytest.mark.parametrize(
    "option", ["joint:critic", Joint(Critic), "joint:linear", "joint:corrected"]
)
def test_one_source_for_a_boundary(option: Any) -> None:
    trainer = trainer_of(option, "skips")
    decoupled = trainer.decoupled
    by_stage: dict[int, set[int]] = {}
    for interface in decoupled.interfaces:
        by_stage.setdefault(interface.producer, set()).add(id(decoupled.sources[interface.name]))
    assert all(len(ids) == 1 for ids in by_stage.values())
    sizes = [len(decoupled.sources[i.name].specs) for i in decoupled.interfaces]
    assert sum(1 / n for n in sizes) == len(by_stage)
    assert len(trainer.synthesizer_optimizers) == len(by_stage)
    train(trainer, 3, "skips")
    assert set(trainer.diagnose(*batch((6,))[:1], target=batch((6,))[1])) == {
        i.name for i in decoupled.interfaces
    }


def test_a_joint_linear_source_is_two_alone() -> None:
    """Networks are one per value there, so only the seeds of their (zero) start could differ."""
    joint, alone = trainer_of("joint:linear", "skips"), trainer_of("linear", "skips")
    for trainer in (joint, alone):
        train(trainer, 4, "skips")
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(joint)[name], tensor)


def test_a_plan_keeps_joint_sources_and_inputs() -> None:
    trainer = trainer_of("joint:critic", "skips", inputs="linear")
    plan = CutPlan.from_json(trainer.decoupled.plan.to_json())
    assert plan == trainer.decoupled.plan
    again = dni_fx.decouple(
        Skips(), plan, example_inputs=(batch((6,))[0],), context=dni_fx.one_hot(3)
    )
    assert again.state_dict().keys() == trainer.decoupled.state_dict().keys()


# ------------------------------------------------------------------------------------------------ s


class Seer(InputSource):
    """Knows the value that is about to come, off by ``shift``."""

    def __init__(self, spec: Any, inputs: Any, model: Any = None, shift: float = 0.0) -> None:
        super().__init__(spec, inputs)
        self.shift = shift

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        return InputPrediction(self.coming + self.shift)

    def fit(self, prediction: InputPrediction, real: Tensor) -> Tensor | None:  # type: ignore[override]
        assert torch.allclose(prediction.value - self.shift, real) or self.shift
        return None


def foreseen(trainer: dni_fx.Trainer, x: Tensor) -> None:
    """Tell the seers what the stages will send."""
    model = copy.deepcopy(trainer.decoupled.model)
    for index, source in enumerate(trainer.decoupled.inputs.values()):
        x = model[index](x)
        source.coming = x.detach()  # type: ignore[assignment]


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_inputs_that_are_right_change_nothing(shift: float) -> None:
    plain, seen = trainer_of("linear"), trainer_of("linear", inputs=partial(Seer, shift=shift))
    for step in range(4):
        x, y = batch((6,), step)
        foreseen(seen, x)
        seen.step(x, target=y)
        plain.step(x, target=y)
    if shift:
        with pytest.raises(AssertionError):
            oracles.assert_bits_equal(state(seen), state(plain), "negative control")
    else:
        oracles.assert_bits_equal(state(seen), state(plain), "perfect inputs")


@pytest.mark.parametrize("inputs", ["linear", None])
def test_no_stage_waits_for_the_forward_of_another(inputs: str | None) -> None:
    grads = []
    for scale in (1.0, 3.0):
        trainer = trainer_of("linear", inputs=inputs)
        train(trainer, 2)
        with torch.no_grad():
            trainer.decoupled.model[0][0].weight.mul_(scale)
            trainer.decoupled.model[0][0].weight[0] = scale
        seen: dict[str, Tensor] = {}
        noted(trainer, 2, seen)
        train(trainer, 1, first=2)
        grads.append(seen)
    if inputs:
        oracles.assert_bits_equal(grads[0], grads[1], "complete unlock")
    else:
        assert not torch.equal(grads[0]["0.weight"], grads[1]["0.weight"])


def test_synthetic_inputs_come_near_the_real_ones() -> None:
    trainer = trainer_of(
        "linear", inputs="mlp", synthesizer_optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    source = trainer.decoupled.inputs["0"]
    errors = []
    for step in range(400):
        x, y = batch((6,), step, size=64)
        trainer.step(x, target=y)
        real = trainer.decoupled.model[0](x).detach()
        errors.append(float((source.predict((x,)).value - real).norm() / real.norm()))
    assert errors[-1] < 0.3 < errors[0]


@pytest.mark.parametrize(
    "case",
    [
        "fan_out",
        "several_inputs",
        "unet",
        "two_towers",
        "transformer",
        "gpt",
        "nested_input",
        "views",
    ],
)
def test_inputs_on_zoo_models(case: str) -> None:
    chosen = BY_NAME[case]
    args, kwargs, target = oracles.draw(chosen, 4, torch.float32, 0)
    decoupled = dni_fx.decouple(
        chosen.build(torch.float32, 0),
        list(chosen.cuts),
        example_inputs=args,
        example_kwargs=kwargs,
        inputs="auto",
    )
    trainer = dni_fx.Trainer(decoupled, chosen.loss, optimizer=sgd)
    for _ in range(3):
        trainer.step(*args, target=target, **kwargs)
    oracles.composed_check(chosen, torch.float32, decoupled=decoupled)


def test_a_value_without_a_batch_dimension_is_named() -> None:
    case = BY_NAME["lstm"]
    args, kwargs, _ = oracles.draw(case, 4, torch.float32, 0)
    with pytest.raises(DecouplingError, match=r"interface '.*leave this interface out"):
        dni_fx.decouple(
            case.build(torch.float32, 0),
            list(case.cuts),
            example_inputs=args,
            example_kwargs=kwargs,
            inputs="auto",
        )


def test_a_synthetic_input_of_another_size_is_named() -> None:
    trainer = trainer_of("linear", "conv", inputs=lambda spec, inputs: Constant(spec, inputs))
    x, y = batch((3, 11, 5))
    with pytest.raises(DecouplingError, match="synthetic input at '0' has shape"):
        trainer.step(x, target=y)


class Constant(InputSource):
    """Always of the example's size."""

    def predict(self, inputs: tuple[Tensor, ...]) -> InputPrediction:
        return InputPrediction(torch.zeros(self.spec.shape))

    def fit(self, prediction: InputPrediction, real: Tensor) -> None:  # type: ignore[override]
        return None


def test_evaluation_uses_the_real_chain() -> None:
    trainer = trainer_of("linear", inputs="linear")
    train(trainer, 3)
    x, _ = batch((6,))
    trainer.decoupled.eval()
    oracles.assert_bits_equal(trainer.decoupled(x), trainer.decoupled.model(x), "evaluation")


# --------------------------------------------------------------------------------------------------


class Fixed(Schedule):
    def __init__(self, *modes: Mode) -> None:
        self.modes = modes

    def mode(self, step: int, stages: int) -> Mode:
        return self.modes[step % len(self.modes)]


@pytest.mark.parametrize("inputs", [None, "linear"])
@pytest.mark.parametrize("gradients", ["linear", "local", "exact"])
def test_only_active_stages_move(gradients: str, inputs: str | None) -> None:
    for active in ((0,), (2,), (1, 3), ()):
        trainer = trainer_of(gradients, schedule=Fixed(Mode(0.0, active)), inputs=inputs)
        train_before = state(trainer)
        report = trainer.step(batch((6,))[0], target=batch((6,))[1])
        weights = [
            n for n, _ in trainer.decoupled.model.named_parameters() if n.endswith("0.weight")
        ]
        for name in weights:
            stage = int(name[0])
            expected = stage in active and (
                stage == 3 or gradients != "linear"
            )  # linear starts at zero
            assert (not torch.equal(state(trainer)[name], train_before[name])) == expected, (
                active,
                name,
            )
        ran = 3 in active or gradients == "exact"
        assert bool(report.loss.isnan()) != ran


def test_stages_that_nobody_needs_are_not_run() -> None:
    trainer = trainer_of("linear", schedule=Fixed(Mode(0.0, (1,))))
    before = state(trainer)
    train(trainer, 1)
    after = state(trainer)
    assert after["0.1.num_batches_tracked"] == 1  # run for its value
    assert after["2.1.num_batches_tracked"] == 0
    assert before["2.1.num_batches_tracked"] == 0


def test_updates_are_as_frequent_as_asked() -> None:
    trainer = trainer_of(
        "local", schedule=RandomUpdates({"stage_0": 0.25, "stage_1": 0.75}, seed=1)
    )
    counts = dict.fromkeys(trainer.optimizers, 0)
    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_pre_hook(
            lambda opt, *_, n=name: counts.update(
                {n: counts[n] + (opt.param_groups[0]["params"][0].grad is not None)}
            )
        )
    train(trainer, 200)
    assert 30 < counts["stage_0"] < 70 < 130 < counts["stage_1"] < 170
    assert counts["stage_2"] == counts["stage_3"] == 200


def test_sources_of_left_out_stages_learn_beside_waiting_ones() -> None:
    trainer = trainer_of(
        {"0": "linear", "1": "feedback", "2": "local"}, schedule=RandomUpdates({0: 0.0})
    )
    train(trainer, 3)
    assert trainer.decoupled.sources["0"].scale.item() > 0


@pytest.mark.parametrize("inputs", [None, "linear"])
def test_sources_learn_whenever_their_target_comes(inputs: str | None) -> None:
    """Not only when their own stage is updated too, which is rarer by another factor of p."""
    trainer = trainer_of("linear", schedule=Fixed(Mode(0.0, (2,))), inputs=inputs)
    trainer_zero = copy.deepcopy(trainer.decoupled.synthesizers.state_dict())
    with torch.no_grad():
        for parameter in trainer.decoupled.sources["2"].parameters():
            parameter.fill_(0.1)  # so that stage 2 has something to pull back
        trainer.decoupled.sources["2"].scale.fill_(1.0)
    train(trainer, 3)
    now = trainer.decoupled.synthesizers.state_dict()
    learnt = {
        key.split(".")[0]
        for key in now
        if "weight" in key and not torch.equal(now[key], trainer_zero[key])
    }
    assert learnt - {"2"} == ({"1", "2@input"} if inputs else {"1"})


def test_warm_up_trains_sources_in_shadow() -> None:
    """Stages move as in backpropagation; sources learn, and are used afterwards."""
    shadow, exact = trainer_of("linear", schedule=WarmUp(steps=5)), trainer_of("exact")
    for trainer in (shadow, exact):
        train(trainer, 5)
    oracles.assert_bits_equal(state(shadow), state(exact), "shadow mode")
    assert all(s.scale.item() > 0 for s in shadow.decoupled.sources.values())
    for trainer in (shadow, exact):
        train(trainer, 1, first=5)
    assert not torch.equal(state(shadow)["0.0.weight"], state(exact)["0.0.weight"])


def test_fading_mixes() -> None:
    half, zero = trainer_of("zero", schedule=Fixed(Mode(0.5))), trainer_of("zero")
    x, y = batch((6,))
    true = zero.true_gradients(x, target=y)
    seen: dict[str, Tensor] = {}
    half.optimizers["stage_2"].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in half.decoupled.model[2].named_parameters()}
        )
    )
    half.step(x, target=y)
    model = mlp()
    model[2](model[1](model[0](x))).backward(true["2"] * 0.5)
    torch.testing.assert_close(seen["0.weight"], model[2][0].weight.grad)


def test_calibration_steps_are_exact() -> None:
    trainer = trainer_of("zero", schedule=Calibration(every=2))
    before = state(trainer)
    train(trainer, 1)
    assert torch.equal(state(trainer)["0.0.weight"], before["0.0.weight"])
    train(trainer, 1, first=1)
    assert not torch.equal(state(trainer)["0.0.weight"], before["0.0.weight"])


@pytest.mark.parametrize("gradients", ["linear", "critic"])
def test_a_resumed_run_goes_on_alike_under_every_schedule(gradients: str) -> None:
    schedule = WarmUp(2, fade=2, then=Calibration(every=3, then=RandomUpdates(0.5)))
    whole = trainer_of(gradients, schedule=schedule, inputs="linear")
    train(whole, 5)
    saved = copy.deepcopy(whole.state_dict())
    train(whole, 6, first=5)
    resumed = trainer_of(gradients, schedule=schedule, inputs="linear")
    resumed.load_state_dict(saved)
    train(resumed, 6, first=5)
    oracles.assert_bits_equal(
        resumed.decoupled.state_dict(), whole.decoupled.state_dict(), "resumed"
    )


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "feedback", "critic"])
def test_accumulated_gradients_have_the_size_of_one_loss(name: str) -> None:
    """Two equal batches, each counting half, make the update of one."""
    found = []
    for accumulate in (1, 2):
        trainer = trainer_of(
            name, accumulate=accumulate, synthesizer_optimizer=partial(torch.optim.SGD, lr=0.0)
        )
        seen: dict[str, Tensor] = {}
        noted(trainer, 2, seen)
        for _ in range(accumulate):
            trainer.step(batch((6,))[0], target=batch((6,))[1])
        found.append(seen)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------


def test_diagnosis_changes_nothing_and_says_something() -> None:
    for gradients in (
        "linear",
        "critic",
        partial(Corrected, source="local"),
        Delayed,
        "zero",
        "exact",
    ):
        trainer, other = trainer_of(gradients), trainer_of(gradients)
        for each in (trainer, other):
            train(each, 4)
        x, y = batch((6,), 99)
        torch.manual_seed(5)
        diagnosis = trainer.diagnose(x, target=y)
        assert str(diagnosis)
        of_parameters = trainer.diagnose_parameters(x, target=y)
        assert str(of_parameters)
        for each in (trainer, other):
            train(each, 2, first=4)
        oracles.assert_bits_equal(
            trainer.decoupled.state_dict(), other.decoupled.state_dict(), "after diagnose"
        )
        names = {"0", "1", "2"} if gradients not in (Delayed, "exact") else set()
        assert set(diagnosis) == names
        waits = isinstance(gradients, partial)  # part of the gradient comes late
        assert set(of_parameters) == ({f"stage_{name}" for name in names} if not waits else set())
        for report in diagnosis.values():
            assert report.reference == "true"


def test_a_source_of_true_gradients_is_found_perfect() -> None:
    trainer = trainer_of("zero")
    x, y = batch((6,))
    true = trainer.true_gradients(x, target=y)

    answers: list[Tensor] = []

    class Knows(GradientSource):
        message = "none"

        def predict(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Prediction:
            return Prediction((answers.pop(0),))

        def flops(self) -> int:
            return 0

    knowing = trainer_of(Knows)
    answers[:] = [true[n] for n in ("0", "1", "2")]
    diagnosis = knowing.diagnose(x, target=y)
    answers[:] = [true[n] for n in ("0", "1", "2")]
    of_parameters = knowing.diagnose_parameters(x, target=y)
    assert len(of_parameters) == 3
    for report in (*diagnosis.values(), *of_parameters.values()):
        assert report.cosine == pytest.approx(1)
        assert report.explained == pytest.approx(1)


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("gradients", ["linear", "critic", "zero"])
def test_what_predictions_make_of_the_parameters_gradients(gradients: str, name: str) -> None:
    """Against autograd on the model itself; and the cosine at the cut is another number."""
    trainer, stages = trainer_of(gradients, name), range(len(MODELS[name][1]))
    train(trainer, 6, name)
    x, y = batch(MODELS[name][2], 7)
    found, cuts = trainer.diagnose_parameters(x, target=y), trainer.diagnose(x, target=y)
    model, sources, value = trainer.decoupled.model, trainer.decoupled.sources, x
    parameters = [list(model[i].parameters()) for i in stages]
    true = [torch.autograd.grad(F.cross_entropy(model(x), y), own) for own in parameters]
    for i in stages:
        value = model[i](value.detach())
        guess = sources[str(i)].predict((value.detach(),), dni_fx.one_hot(3)(y)).gradients
        parts = torch.autograd.grad(value, parameters[i], guess)
        predicted, reference = (
            torch.cat([g.flatten() for g in grads]) for grads in (parts, true[i])
        )
        report = found[f"stage_{i}"]
        size = float(predicted.norm() / reference.norm())
        assert report.rms_ratio == pytest.approx(size, rel=1e-4, abs=1e-9)
        if size:
            assert report.cosine == pytest.approx(
                float(F.cosine_similarity(predicted, reference, 0)), abs=1e-4
            )
            assert abs(report.cosine - cuts[str(i)].cosine) > 1e-3
        else:
            assert gradients == "zero"
            assert math.isnan(report.cosine)


def test_parameters_of_several_stages_count_for_none() -> None:
    class Tied(Skips):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(self.b(self.a(x)).relu()))

    decoupled = dni_fx.decouple(
        Tied(),
        ["b", "a"],
        example_inputs=(batch((6,))[0],),
        gradients="linear",
        context=dni_fx.one_hot(3),
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    x, y = batch((6,))
    found = trainer.diagnose_parameters(x, target=y)
    alone = {
        s.name
        for s in decoupled.stages[:-1]
        if any(p is decoupled.model.b.weight for p in s.parameters())
    }
    assert set(found) == alone
    assert 0 < len(alone) < len(decoupled.stages) - 1
