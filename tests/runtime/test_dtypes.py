"""Dtypes, layouts and batch sizes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import sources
from dni_fx.errors import DecouplingError
from dni_fx.runtime import stage_batch

from ..helpers.comparing import assert_bits_equal, state_of
from ..helpers.optimisers import sgd
from ..helpers.oracles import decoupled_run, exact_run
from ..models.feedforward import mlp_chain
from ..models.zoo import BY_NAME
from .kit import SOURCES, batches, decouple, fresh, make_trainer


@pytest.mark.parametrize("backward_inside", [True, False])
def test_bf16_autocast_around_an_exact_step_equals_eager(backward_inside: bool) -> None:
    trainer, model = make_trainer("exact", sgd), fresh()
    optimizer = sgd(model.named_parameters())
    for step, (x, target) in enumerate(batches(4)):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            report = trainer.step(x, target=target)
        torch.manual_seed(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            loss = F.cross_entropy(output, target)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        optimizer.step()
        assert_bits_equal(
            [report.loss, report.outputs], [loss, output], f"step {step} under autocast"
        )
        assert_bits_equal(
            state_of(trainer.decoupled.model), state_of(model), f"step {step} under autocast"
        )


@pytest.mark.parametrize("gradients", ["linear", "mlp", "stale", "zero"])
def test_bf16_autocast_around_a_decoupled_step(gradients: str) -> None:
    trainer = make_trainer(gradients, metrics_every=1)
    for x, target in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            report = trainer.step(x, target=target)
    assert report.outputs.dtype == torch.bfloat16
    assert all(
        p.dtype == p.grad.dtype == torch.float32 for p in trainer.decoupled.model.parameters()
    )
    assert report.loss.isfinite()
    assert trainer.step(*batches(1)[0][:1], target=batches(1)[0][1]).outputs.dtype == torch.float32


@pytest.mark.parametrize("gradients", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(gradients: str, dtype: torch.dtype) -> None:
    trainer = make_trainer(gradients, sgd, model=fresh().to(dtype))
    for x, target in batches(3, dtype=dtype):
        report = trainer.step(x, target=target)
    assert report.outputs.dtype == dtype
    assert {p.dtype for p in trainer.decoupled.model.parameters()} == {dtype}
    if dtype == torch.float64:
        assert {p.dtype for p in trainer.decoupled.synthesizers.parameters()} <= {dtype}


def test_channels_last_is_kept() -> None:
    case = BY_NAME["channels_last"]
    record = exact_run(case, torch.float32, sgd)
    assert_bits_equal(record, decoupled_run(case, torch.float32, sgd, gradients="exact"), "itself")
    model = case.build()
    (x,), _ = case.inputs(4, torch.float32)
    decoupled = dni_fx.decouple(model, list(case.cuts), example_inputs=(x,), gradients="conv")
    stage = decoupled.stages[0]
    result = stage.step(decoupled.bind(x))
    (value,) = [result.outputs[n] for n in result.predictions]
    assert value.is_contiguous(memory_format=torch.channels_last)
    (prediction,) = result.predictions.values()
    assert prediction.gradients[0].stride() == value.stride()


@pytest.mark.parametrize("gradients", SOURCES)
def test_batches_of_any_size(gradients: str) -> None:
    decoupled = decouple(gradients, model=mlp_chain(), cuts=["1", "3"])
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    for size in (4, 1, 7, 2, 1):
        report = trainer.step(torch.randn(size, 6), target=torch.randint(0, 3, (size,)))
        assert report.outputs.shape == (size, 3)
    assert len(decoupled.graphs.variants) == 1


def test_an_example_batch_of_one_serves_others() -> None:
    for kind in ("auto", "linear", "mlp"):
        for context in (None, dni_fx.one_hot(3)):
            decoupled = dni_fx.decouple(
                mlp_chain(),
                ["1"],
                example_inputs=(torch.randn(1, 6),),
                gradients=kind,
                context=context,
            )
            trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
            for size in (1, 5):
                trainer.step(torch.randn(size, 6), target=torch.randint(0, 3, (size,)))


class NormalisedWeight(nn.Module):
    """A value computed from parameters alone, without a batch dimension, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tanh(self.weight)
        size = weight.square().mean()
        return self.out(F.linear(x, weight / size))


@pytest.mark.parametrize("cut", ["tanh", "mean"])
@pytest.mark.parametrize("context", [None, dni_fx.one_hot(3)], ids=["DNI", "cDNI"])
def test_values_without_a_batch_dimension(cut: str, context: Any) -> None:
    x, target = batches(1)[0]
    decoupled = dni_fx.decouple(NormalisedWeight(), [cut], example_inputs=(x,), context=context)
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    assert [trainer.step(x, target=target).loss.isfinite() for _ in range(3)] == [True] * 3


def test_integer_inputs() -> None:
    trainer = dni_fx.Trainer(
        dni_fx.decouple(nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 3)), ["0"],
                        example_inputs=(torch.zeros(4, 5, dtype=torch.long),)),
        F.cross_entropy, optimizer=sgd,
    )  # fmt: skip
    for dtype in (
        torch.long,
        torch.int32,
    ):  # another dtype that the model takes: a graph of its own
        trainer.step(torch.randint(0, 11, (4, 5)).to(dtype), target=torch.randint(0, 3, (4,)))


class _Again(nn.Module):
    """One layer in three stages, its weight besides used as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        h = self.b(self.a(h).tanh())
        h = self.a(h.tanh()) * self.a.weight.mean()
        h = self.a(h)
        result: Tensor = self.c(h)
        return result


def _shared_under_autocast() -> tuple[nn.Module, nn.Module]:
    x, y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    model, alone = _Again(), _Again()
    decoupled = dni_fx.decouple(model, ["a@0", "b"], example_inputs=(x,), gradients="exact")
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=sgd)
    optimizer = sgd(alone.parameters())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            trainer.step(x, target=y)
            F.cross_entropy(alone(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, alone


def test_gradients_of_a_shared_copy_are_added_up_before_they_are_cast_back() -> None:
    model, alone = _shared_under_autocast()
    for (name, want), got in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert_bits_equal(got, want, name)


def test_a_stage_that_casts_its_own_part_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_batch, "copies_of", lambda *_: {})
    model, alone = _shared_under_autocast()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    assert not all(torch.equal(want, got) for want, got in pairs)


class Spectrum(nn.Module):
    """A complex value between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)), n=10))


@pytest.mark.parametrize("gradients", sorted(sources.SOURCES))
def test_complex_values_are_served_whole_or_refused(gradients: str) -> None:
    """Torch would drop imaginary parts with a warning, which is an error here."""
    x, y = torch.randn(4, 6), torch.tensor([0, 2, 1, 0])
    options: dict[str, Any] = {"example_inputs": (x,), "context": dni_fx.one_hot(3)}
    make = functools.partial(
        dni_fx.decouple, Spectrum(), cuts=["fft_rfft"], gradients=gradients, **options
    )
    if gradients not in ("zero", "stale", "delayed", "exact", "feedback"):
        with pytest.raises(DecouplingError, match=r"interface 'fft_rfft'.*\(4, 6\).*complex64"):
            make()
        return
    trainer = dni_fx.Trainer(make(), F.cross_entropy, optimizer=sgd, metrics_every=1)
    before = trainer.decoupled.model.first.weight.clone()
    for _ in range(3):
        assert trainer.step(x, target=y).loss.isfinite()
    learns = not torch.equal(before, trainer.decoupled.model.first.weight)
    assert learns == (gradients != "zero")
