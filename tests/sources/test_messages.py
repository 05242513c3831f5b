"""What comes back to a source: gradients, losses, logits, errors; and sources that answer
wrongly.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.runtime.answers import sample_losses
from dni_fx.schedules import Mode
from dni_fx.sources import SOURCES, GradientSource, Prediction

from ..helpers.optimisers import sgd
from ..helpers.training import batch, decoupled_of, train, trainer_of
from ..models.small import CHAIN
from .kit import Fixed


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
    x, y = batch(0)
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
def test_logits_and_error_of_an_output_that_names_its_logits(kind: str) -> None:
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
    x, y = batch(0)
    plain, named = trainer_of(spy), trainer_of(spy, model=Named(*CHAIN.build()), loss=loss)
    for trainer in (plain, named):
        trainer.step(x, target=y)
    for mine, theirs in zip(
        *(t.decoupled.sources["2"].heard[0] for t in (plain, named)), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("message", ["logits", "error"])
def test_an_output_without_logits(message: str) -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return {"answer": super().forward(x)}

    trainer = trainer_of(
        partial(Spy, message=message),
        model=Two(*CHAIN.build()),
        loss=lambda output, y: F.cross_entropy(output["answer"], y),
    )
    x, y = batch(0)
    with pytest.raises(DecouplingError, match="called 'logits'"):
        trainer.step(x, target=y)


@pytest.mark.parametrize("apart", [Tensor.clone, Tensor.detach])
def test_logits_that_the_loss_is_not_made_of(apart: Any) -> None:
    class Apart(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return {"used": found, "logits": apart(found)}

    trainer = trainer_of(
        partial(Spy, message="error"),
        model=Apart(*CHAIN.build()),
        loss=lambda output, y: F.cross_entropy(output["used"], y),
    )
    x, y = batch(0)
    with pytest.raises(
        DecouplingError, match="let the model return the logits that the loss is made of"
    ):
        trainer.step(x, target=y)


def test_several_kinds_come_in_order() -> None:
    trainer = trainer_of(partial(Spy, message="gradient+loss+logits+error"))
    x, y = batch(0)
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


def test_losses_of_each_sample_from_nested_outputs() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    want = F.cross_entropy(logits, labels, reduction="none")

    def loss(output: Any, target: Any) -> Tensor:
        return F.cross_entropy(output["out"], target["y"])

    found = sample_losses(loss, {"out": logits, "other": logits[:, :1]}, {"y": labels})
    torch.testing.assert_close(found, want)
    # A mean over the batch is no sample's loss, whatever else there is.
    for output in ({"out": logits, "loss": logits.mean()}, {"out": logits, "t": logits.T}):
        with pytest.raises(DecouplingError, match=r"the batch's: \[\(5, 3\), "):
            sample_losses(lambda out, _: out["out"].mean(), output, {"y": labels})


@pytest.mark.parametrize("gradients", ["critic", "sobolev"])
def test_critics_take_dict_outputs(gradients: str) -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            value = self.first(x).tanh()
            return {"out": self.last(value), "mean": value.mean(1)}

    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    decoupled = dni_fx.decouple(
        Dict(), ["first"], example_inputs=(x,), gradients=gradients, context=dni_fx.one_hot(3)
    )
    trainer = dni_fx.Trainer(
        decoupled, lambda out, y: F.cross_entropy(out["out"], y), optimizer=torch.optim.Adam
    )
    before = [p.clone() for p in decoupled.synthesizers.parameters()]
    for _ in range(3):
        trainer.step(x, target=y)
    after = list(decoupled.synthesizers.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))


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
        ((torch.zeros(8, 6), None), None, "must return a Prediction"),
        ((Prediction(()), None), None, "must return a Prediction"),
        ((Prediction(None), None), None, "must return a Prediction"),
        ((Prediction((torch.zeros(8, 6),) * 2), None), None, "2 of them"),
        (
            (Prediction((torch.zeros(8, 6),)), torch.zeros(2)),
            None,
            "must return a scalar with its graph",
        ),
        (
            (Prediction((torch.zeros(8, 6),)), torch.zeros(())),
            None,
            "must return a scalar with its graph",
        ),
        ((Prediction(None), None), 0, "complete must return a tuple of 1"),
    ],
)
def test_a_source_that_answers_wrongly_is_told_what_was_expected(
    answers: Any, lag: int | None, words: str
) -> None:
    own = type("Own", (Wrong,), {"answers": answers, "lag": lag})
    with pytest.raises(DecouplingError, match=words):
        train(trainer_of(own), 1)


@pytest.mark.parametrize("engine", ["trainer", "loop by hand", "drop-in"])
@pytest.mark.parametrize("gradients", ["linear", "local", "each:linear"])
def test_sources_that_are_frozen_predict_and_learn_nothing(gradients: str, engine: str) -> None:
    trainer = trainer_of(gradients)
    train(trainer, 2)
    decoupled, (x, y) = trainer.decoupled, batch(2)
    decoupled.synthesizers.requires_grad_(False)
    before = {n: p.clone() for n, p in decoupled.named_parameters()}
    if engine == "trainer":
        train(trainer, 1)
        trained = {n for n, p in decoupled.named_parameters() if not torch.equal(p, before[n])}
        assert len(trained) > 4
    elif engine == "loop by hand":
        stage = decoupled.stages[0]
        found = stage.step(decoupled.bind(x), decoupled.context(y))
        targets = {name: torch.ones_like(found.outputs[name]) for name in stage.sources}
        assert stage.fit(found.predictions, targets) == {}
    else:
        module: Any = decoupled.as_module()
        with module.context(y):
            F.cross_entropy(module(x), y).backward()
        assert all(p.grad is not None for p in module.parameters())
    sources = [n for n in before if n.startswith("synthesizers")]
    assert sources
    assert all(torch.equal(decoupled.get_parameter(n), before[n]) for n in sources)


@pytest.mark.parametrize("returned", [torch.zeros(2), torch.zeros(()), 1.0])
def test_a_loop_of_ones_own_is_told_as_well(returned: Any) -> None:
    given = {"answers": (Prediction((torch.zeros(8, 6),)), returned)}
    decoupled, (x, y) = decoupled_of(type("Own", (Wrong,), given)), batch(0)
    stage = decoupled.stages[0]
    predictions = stage.step(decoupled.bind(x), decoupled.context(y)).predictions
    with pytest.raises(DecouplingError, match=r"Own\.fit must return a scalar with its graph"):
        stage.fit(predictions, {})
    module: Any = decoupled.as_module()
    with module.context(y), pytest.raises(DecouplingError, match=r"Own\.fit must return a scalar"):
        module(x)


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
            x, y = batch(step)
            seen.append(weakref.ref(x))
            seen.append(weakref.ref(trainer.step(x, target=y).outputs))
            del x, y
        assert sum(ref() is not None for ref in seen) <= 1
    finally:
        gc.enable()
