"""What is forecast of memory against the tensors that are alive, and a cap that is kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.graphs.weighing import weighed_plan
from dni_fx.parallel.capping import moments_of
from dni_fx.plan import StageCost
from dni_fx.simulation import forecast

from ..helpers.comparing import assert_bits_equal
from ..helpers.live import LiveBytes
from ..helpers.optimisers import adam
from ..helpers.training import record, train, trainer_of
from ..plans.events import make_plan

STAGES = 6


class Blocks(nn.Module):
    """A first layer, blocks that may be checkpoints, and a head over what is left of positions."""

    def __init__(self, first: nn.Module, block: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.first, self.head = first, nn.Linear(width, 10)
        self.blocks = nn.ModuleList(block() for _ in range(STAGES))
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(batch, 10)``."""
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x.mean(1) if x.dim() == 3 else x)


def mlp() -> tuple[Blocks, Tensor]:
    width = 96
    block = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
    )
    return Blocks(nn.Linear(width, width), block, width), torch.randn(64, width)


def transformer() -> tuple[Blocks, Tensor]:
    width, options = 64, {"dropout": 0.0, "batch_first": True, "norm_first": True}
    block = lambda: nn.TransformerEncoderLayer(width, 4, 128, **options)  # noqa: E731
    return Blocks(nn.Embedding(50, width), block, width), torch.randint(50, (8, 24))


MODELS = {"mlp": mlp, "transformer": transformer}


def cut(model: nn.Module, x: Tensor) -> dni_fx.Decoupled:
    return dni_fx.decouple(
        model,
        cuts=[f"blocks.{k}" for k in range(STAGES - 1)],
        example_inputs=(x,),
        gradients="local",
        context=dni_fx.one_hot(10),
        check=False,
    )


def single_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3, foreach=False)


def most_alive(step: Callable[[], Any], *known: Any) -> int:
    """Bytes, from the third step on."""
    step(), step()
    live = LiveBytes()
    live.watch(*known)
    with live:
        for _ in range(9):
            step()
    return live.most


def measured(name: str, way: str, folder: Path) -> int:
    """Bytes that training takes in one of the ways."""
    model, x = MODELS[name]()
    y = torch.randint(10, (len(x),))
    if way in ("backprop", "checkpoints"):
        model.checkpoints = way == "checkpoints"
        optimizer = single_adam(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        step()
        return most_alive(step, [*model.parameters()], [*optimizer.state.values()], x)
    decoupled = cut(model, x)
    if way.startswith("drop-in"):
        module, optimizer = decoupled.as_module(), single_adam(model.parameters())

        def train_drop_in() -> None:
            optimizer.zero_grad()
            with module.context(y):
                loss = F.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()

        train_drop_in()
        known = [*decoupled.parameters()], [*optimizer.state.values()], x
        return most_alive(train_drop_in, *known)
    options: dict[str, Any] = {"update": "at_once"}
    if way.startswith("resident"):
        options = {n: int(v) for n, v in (part.split("=") for part in way.split(", "))}
    options |= {"optimizer": single_adam, "metrics_every": 10**9, "store": folder}
    with contextlib.closing(dni_fx.Trainer(decoupled, F.cross_entropy, **options)) as trainer:
        trainer.step(x, target=y)
        every = [*trainer.optimizers.values(), *trainer.synthesizer_optimizers.values()]
        known = [*decoupled.parameters()], [[*o.state.values()] for o in every], x
        return most_alive(lambda: trainer.step(x, target=y), *known)


WAYS = [
    "backprop",
    "checkpoints",
    f"drop-in, {STAGES} stages",
    'update="at_once"',
    "resident=1, sweep=1",
    "resident=1, sweep=4",
    "resident=2, sweep=2",
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_what_was_forecast_within_a_tenth(name: str, way: str, tmp_path: Path) -> None:
    told = forecast(weighed_plan(cut(*MODELS[name]()).graphs))[way].memory
    assert told == pytest.approx(measured(name, way, tmp_path), rel=0.1)


def test_another_optimiser_or_way_is_not_within_a_tenth(tmp_path: Path) -> None:
    """The control."""
    plan = weighed_plan(cut(*mlp()).graphs)
    found = measured("mlp", "backprop", tmp_path)
    assert forecast(plan, moments=1)["backprop"].memory < 0.9 * found
    assert forecast(plan)["resident=1, sweep=1"].memory < 0.9 * found


def test_kinds_of_optimisers_are_told_apart() -> None:
    weights = [nn.Parameter(torch.zeros(3, 3))]
    for moments, optimizer in (
        (0, torch.optim.SGD(weights, 0.1)),
        (1, torch.optim.SGD(weights, 0.1, momentum=0.9)),
        (2, torch.optim.AdamW(weights)),
        (3, torch.optim.Adam(weights, amsgrad=True)),
        (2, torch.optim.LBFGS(weights)),  # that cannot be seen
    ):
        optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook of the user's was called"))
        assert moments_of(optimizer) == moments
        assert not optimizer.state
        assert weights[0].grad is None


def test_a_cap_is_kept_and_told_and_changes_no_number(tmp_path: Path) -> None:
    model, x = mlp()
    y = torch.randint(10, (len(x),))
    ways = forecast(weighed_plan(cut(model, x).graphs))
    cap = 1.2 * ways["resident=2, sweep=2"].memory
    assert cap < ways["backprop"].memory
    trainer = dni_fx.Trainer(
        cut(model, x), F.cross_entropy, optimizer=single_adam, memory_cap=cap, store=tmp_path
    )
    with contextlib.closing(trainer):
        assert trainer.forecast is not None
        chosen = trainer.forecast.chosen
        assert chosen is not None
        assert chosen.resident in (1, 2)
        assert "taken" in str(trainer.forecast)
        assert trainer.beside.visiting.most == chosen.resident
        trainer.step(x, target=y)
        every = [*trainer.optimizers.values(), *trainer.synthesizer_optimizers.values()]
        known = [*model.parameters()], [[*o.state.values()] for o in every], x
        assert most_alive(lambda: trainer.step(x, target=y), *known) <= cap
        with pytest.raises(DecouplingError, match=r"reckoned for inputs of .* largest batch"):
            trainer.step(torch.cat([x, x]), target=torch.cat([y, y]))
    assert measured("mlp", "backprop", tmp_path) > cap  # the control


def test_under_a_cap_weights_are_those_without_one(tmp_path: Path) -> None:
    plain = train(trainer_of("local", optimizer=adam), 4)
    options: dict[str, Any] = {"memory_cap": "1MB", "sweep": 2, "resident": 1, "store": tmp_path}
    with contextlib.closing(trainer_of("local", optimizer=adam, **options)) as trainer:
        train(trainer, 4)
        assert trainer.beside.executor.residency.away
        trainer.gather()
        assert_bits_equal(record(trainer), record(plain), "under a cap")


@pytest.mark.parametrize(
    ("cap", "says"),
    [
        ("500B", r"weights alone.*make the model on 'meta'"),
        (9000, r"cannot be kept: the least .* is .*kB \(resident=1, sweep=1\).*a cap of .* would"),
        ("much", r"memory_cap='much': expected bytes"),
        (0, "memory_cap=0: expected bytes"),
    ],
)
def test_caps_that_cannot_be_kept_are_refused(cap: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DecouplingError, match=says):
        trainer_of("local", optimizer=adam, memory_cap=cap, store=tmp_path)


def test_host_memory_is_no_store_for_a_model_in_it() -> None:
    with pytest.raises(DecouplingError, match=r'update="at_once".*with store=, a folder'):
        trainer_of("local", optimizer=adam, memory_cap=6000)
    trainer = trainer_of("local", optimizer=adam, memory_cap="1GB")
    assert trainer.beside.visiting.most is None


def test_the_best_that_fits_is_named() -> None:
    cost = StageCost(1.0, 2.0, 0.1, 0.2, parameter_bytes=4000, activation_bytes=5000)
    plan = make_plan([cost] * 8)
    told = dni_fx.simulate(plan).on_one_device(memory_cap=1e6)
    assert told.best == told["backprop"]
    assert told.sentence.startswith("Best within 1.00 MB: backprop")
    tight = forecast(plan, memory_cap=20_000, store_bandwidth=1e4)
    assert tight.best is not None
    assert tight.best.visits
    assert "with true gradients" not in tight.sentence
    none = forecast(plan, memory_cap=1000)
    assert none.best is None
    assert none.sentence.startswith("Nothing fits 1.00 kB")
    slow = forecast(plan, store_bandwidth=1.0)
    assert slow["resident=1, sweep=8"].seconds < slow["resident=1, sweep=1"].seconds / 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.memory_cap = 0.0  # type: ignore[misc]
    for wrong in ({"moments": -1}, {"store_bandwidth": 0}, {"memory_cap": "2"}):
        with pytest.raises(DecouplingError, match="expected a number"):
            forecast(plan, **wrong)  # type: ignore[arg-type]
