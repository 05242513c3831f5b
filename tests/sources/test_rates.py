"""The optimiser that sources have where none is named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.plan import TensorSpec
from dni_fx.recurrent import decouple_through_time
from dni_fx.sources import SOURCES, Corrected, Sum, default_optimizer, make_source

from ..helpers.comparing import assert_bits_equal
from ..helpers.training import decoupled_of, record, state, train, trainer_of
from ..models.small import CONVOLUTIONS

VECTOR, LABELS = TensorSpec((4, 6), torch.float32), TensorSpec((4, 3), torch.float32)
FAST = {"linear", "auto", "corrected", "mix"}  # affine regressions, or made of one


def rates(source: Any) -> list[float]:
    made = default_optimizer(source, list(source.named_parameters()))
    return [group["lr"] for group in made.param_groups]


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "conv"])
def test_every_source_has_the_rate_of_its_kind(name: str) -> None:
    source = make_source(name, [VECTOR], LABELS)
    if any(True for _ in source.parameters()):
        assert rates(source) == [3e-2 if name in FAST else 1e-3]


def test_only_what_was_studied_is_fast() -> None:
    assert rates(make_source("linear", [VECTOR])) == [1e-3]  # sees no context
    assert rates(make_source("auto", [VECTOR])) == [1e-3]
    maps = TensorSpec((4, 6, 5, 5), torch.float32, 1)
    assert rates(make_source("auto", [maps], LABELS)) == [1e-3]
    assert rates(make_source(partial(Corrected, source="mlp"), [VECTOR], LABELS)) == [1e-3]
    summed = make_source(Sum("local", "linear"), [VECTOR], LABELS)
    made = default_optimizer(summed, list(summed.named_parameters()))
    by_rate = {g["lr"]: set(g["param_names"]) for g in made.param_groups}
    named = {n for n, _ in summed.named_parameters()}
    assert by_rate == {
        1e-3: {n for n in named if n.startswith("parts.0")},
        3e-2: {n for n in named if n.startswith("parts.1")},
    }
    torch.manual_seed(0)
    trainer = decouple_through_time(
        nn.LSTM(6, 6),
        window=2,
        loss=lambda output, target: output.square().mean(),
        optimizer=torch.optim.Adam,
        gradients="linear",
        context=lambda target: target,
        batch_first=False,
    )
    trainer.step(torch.randn(2, 4, 6), target=torch.randn(4, 3))
    assert trainer.synthesizer_optimizers
    for optimizer in trainer.synthesizer_optimizers.values():
        assert [g["lr"] for g in optimizer.param_groups] == [1e-3]


def test_trainers_and_the_drop_in_take_it_and_an_own_one_goes_before() -> None:
    named = partial(torch.optim.Adam, lr=3e-2)
    trainer, same, other = (
        trainer_of("linear", synthesizer_optimizer=make) for make in (None, named, torch.optim.Adam)
    )
    for t in (trainer, same, other):
        train(t, 4)
    assert_bits_equal(record(trainer), record(same), "the default")
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(state(trainer), state(other), "the control")
    decoupled = decoupled_of("linear")
    module: Any = decoupled.as_module()
    x = torch.randn(8, 6)
    with module.context(torch.zeros(8, dtype=torch.long)):
        F.cross_entropy(module(x), torch.zeros(8, dtype=torch.long)).backward()
    before = decoupled.synthesizers.state_dict()
    assert any(bool(v.any()) for k, v in before.items() if k.endswith("weight"))
    weight = before["2.networks.0.layers.0.weight"]
    assert float(weight.abs().max()) == pytest.approx(0.03, rel=1e-2)


def test_by_default_linear_beats_standing_still_on_digits() -> None:
    """As ``benchmarks/rates.py`` has it, shorter; the control is Adam's own rate."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    found = {}
    for name, make in (("zero", None), ("linear", None), ("slow", torch.optim.Adam)):
        torch.manual_seed(0)
        sizes = (64, 64, 64, 64, 64)
        hidden = [
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
            for a, b in zip(sizes[1:], sizes[:-1], strict=True)
        ]
        model = nn.Sequential(*hidden, nn.Linear(64, 10))
        decoupled = dni_fx.decouple(
            model,
            ["0", "1", "2", "3"],
            example_inputs=(x[:128],),
            gradients="zero" if name == "zero" else "linear",
            context=dni_fx.one_hot(10),
            check=False,
        )
        trainer = dni_fx.Trainer(
            decoupled, F.cross_entropy, optimizer=torch.optim.Adam, synthesizer_optimizer=make
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            rows = torch.randint(1400, (128,), generator=generator)
            trainer.step(x[rows], target=y[rows])
        model.eval()
        found[name] = float((model(x[1400:]).argmax(1) != y[1400:]).float().mean())
    assert found["linear"] < 0.5 * min(found["zero"], found["slow"]), found


def test_maps_keep_adams_own_rate() -> None:
    for optimizer in trainer_of("auto", CONVOLUTIONS).synthesizer_optimizers.values():
        assert [g["lr"] for g in optimizer.param_groups] == [1e-3]
