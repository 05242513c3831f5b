"""The loop: steps by hand, over loaders, with optimisers, schedulers and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dni_fx

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import adam, sgd
from .kit import batches, decouple, fresh, make_trainer


def train_by_hand(
    decoupled: dni_fx.Decoupled, optimizers: list[Any], x: Tensor, target: Tensor
) -> Tensor:
    """The lower-level loop of the documentation: what ``Trainer.step`` does, without its checks."""
    values, targets, predictions = decoupled.bind(x), {}, []
    for optimizer in optimizers:
        optimizer.zero_grad()
    for stage in decoupled.stages:
        result = stage.step(values, decoupled.context(target), F.cross_entropy, target)
        values.update(result.outputs)
        predictions.append(result.predictions)
        for name, gradient in result.input_gradients.items():
            targets[name] = targets[name] + gradient if name in targets else gradient
    for stage, predicted in zip(decoupled.stages, predictions, strict=True):
        stage.fit(predicted, targets)
    for optimizer in optimizers:
        optimizer.step()
    return result.loss


@pytest.mark.parametrize("gradients", ["linear", "mlp", "stale", "zero"])
def test_the_loop_by_hand_equals_the_trainer(gradients: str) -> None:
    trainer, by_hand = make_trainer(gradients), decouple(gradients)
    by_hand.load_state_dict(trainer.decoupled.state_dict())
    optimizers = [adam(s.named_parameters()) for s in by_hand.stages]
    optimizers += [
        dni_fx.sources.default_optimizer(s, list(s.named_parameters()))
        for s in by_hand.sources.values()
        if list(s.parameters())
    ]
    for step, (x, target) in enumerate(batches(5)):
        torch.manual_seed(step)
        expected = train_by_hand(by_hand, optimizers, x, target)
        torch.manual_seed(step)
        assert_bits_equal(
            trainer.step(x, target=target).loss, expected, f"{gradients}: loss of step {step}"
        )
    assert_bits_equal(trainer.decoupled.state_dict(), by_hand.state_dict(), f"{gradients}: state")


def test_fit_over_a_loader_equals_steps() -> None:
    torch.manual_seed(3)
    x, target = torch.randn(22, 6), torch.randint(0, 3, (22,))
    loader = DataLoader(TensorDataset(x, target), batch_size=4)
    fitted, stepped, seen = make_trainer("mlp"), make_trainer("mlp"), []
    torch.manual_seed(0)
    report = fitted.fit(loader, epochs=2, progress=False, on_step=seen.append)
    torch.manual_seed(0)
    for _ in range(2):
        for batch in DataLoader(TensorDataset(x, target), batch_size=4):
            last = stepped.step(batch[0], target=batch[1])
    assert [r.step for r in seen] == list(range(1, 13))
    assert seen[-1] is report
    assert report.outputs.shape == (2, 3)  # the last short batch
    assert_bits_equal(report.loss, last.loss, "last loss")
    assert_bits_equal(
        fitted.decoupled.state_dict(), stepped.decoupled.state_dict(), "state after fit"
    )
    assert fitted.fit([], progress=False) is None


def test_fit_asks_a_loader_for_one_iterator_an_epoch() -> None:
    class Counting(list):
        iterators = 0

        def __iter__(self) -> Any:
            type(self).iterators += 1  # a DataLoader would draw a seed and start its workers
            return super().__iter__()

    make_trainer().fit(Counting(batches(3)), epochs=2, progress=False)
    assert Counting.iterators == 2


def test_fit_takes_dicts_and_other_forms() -> None:
    a, b, c = make_trainer(), make_trainer(), make_trainer()
    x, target = batches(1)[0]
    torch.manual_seed(0)
    a.fit([(x, target)], progress=False)
    torch.manual_seed(0)
    b.fit([{"input": x, "labels": target}], progress=False)
    torch.manual_seed(0)
    c.fit([(target, x)], progress=False, unpack=lambda batch: ((batch[1],), {}, batch[0]))
    assert_bits_equal(state_of(a.decoupled), state_of(b.decoupled), "dict batch")
    assert_bits_equal(state_of(a.decoupled), state_of(c.decoupled), "unpacked batch")


def test_fit_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.fit(batches(12), epochs=1)
    assert "epoch 1/1" in capsys.readouterr().err
    trainer.fit(batches(2), progress=False)
    assert capsys.readouterr().err == ""


def test_clipping_is_per_stage() -> None:
    norms: dict[str, list[Tensor]] = {"clipped": [], "free": []}

    def noting(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
        def make(params: Any) -> torch.optim.Optimizer:
            pairs = list(params)
            optimizer = torch.optim.SGD(pairs, lr=0.0)
            optimizer.register_step_pre_hook(
                lambda *_: norms[kind].append(
                    nn.utils.get_total_norm([p.grad for _, p in pairs if p.grad is not None])
                )
            )
            return optimizer

        return make

    x, target = batches(1)[0]
    for kind, clip in (("clipped", 0.1), ("free", None)):
        torch.manual_seed(0)
        make_trainer("exact", noting(kind), clip_norm=clip).step(x, target=target)
    assert len(norms["free"]) == 3
    for clipped, free in zip(norms["clipped"], norms["free"], strict=True):
        assert float(free) > 0.1
        assert float(clipped) == pytest.approx(0.1, rel=1e-4)


def test_learning_rate_schedulers() -> None:
    trainer = make_trainer("exact", lambda params: torch.optim.SGD(params, lr=0.1))
    model, (x, target) = fresh(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in trainer.optimizers.values()
    ]
    assert list(trainer.optimizers) == ["stage_0", "stage_1", "stage_2"]
    for step in range(3):
        torch.manual_seed(step)
        trainer.step(x, target=target)
        for scheduler in schedulers:
            scheduler.step()
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        plain.step()
    assert_bits_equal(
        state_of(trainer.decoupled.model), state_of(model), "with a scheduler per stage"
    )


def test_optimizers_get_the_models_own_names() -> None:
    given: list[list[str]] = []

    def make(params: Any) -> torch.optim.Optimizer:
        pairs = list(params)
        given.append([n for n, _ in pairs])
        return torch.optim.SGD(pairs, lr=0.1)

    trainer = make_trainer("exact", make)
    assert given == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["4.weight", "4.bias", "5.weight", "5.bias"],
        ["8.weight", "8.bias"],
    ]
    assert trainer.synthesizer_optimizers == {}


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_accumulation_in_exact_mode_equals_a_plain_loop(optimizer: Any) -> None:
    trainer, model, data = make_trainer("exact", optimizer, accumulate=3), fresh(), batches(9)
    plain = optimizer(model.named_parameters())
    torch.manual_seed(1)
    losses = [trainer.step(x, target=target).loss for x, target in data]
    torch.manual_seed(1)
    for step, (x, target) in enumerate(data):
        loss = F.cross_entropy(model(x), target)
        (loss / 3).backward()
        assert float(losses[step]) == pytest.approx(loss.item(), rel=1e-6)
        if step % 3 == 2:
            plain.step()
            plain.zero_grad()
    assert_bits_equal(state_of(trainer.decoupled.model), state_of(model), "accumulated")


def test_gradients_left_by_the_user_do_not_count() -> None:
    clean, dirty, (x, target) = make_trainer("mlp"), make_trainer("mlp"), batches(1)[0]
    for parameter in dirty.decoupled.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    for trainer in (clean, dirty):
        torch.manual_seed(0)
        trainer.step(x, target=target)
    assert_bits_equal(
        state_of(dirty.decoupled), state_of(clean.decoupled), "with old gradients about"
    )


def test_how_often_predictions_are_compared_can_be_changed() -> None:
    trainer = make_trainer("linear", sgd)
    trainer.metrics_every = 2
    assert [trainer.metrics.is_due(step) for step in range(4)] == [True, False, True, False]
