"""``Trainer(compile=)``: the recorded step is the kernel's, whatever comes between two steps.

Most tests run the recorded operators as they are, in double precision; one compiles them.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx.errors import NonFiniteError
from dni_fx.schedules import Threads
from dni_fx.sources import SOURCES

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam, sgd
from ..helpers.training import batch, largest_difference, record, train, trainer_of
from ..models.small import Block

STEPS = 8
RECORDED = ["linear", "mlp", "auto", "local", "distill", "reconstruct", "zero"]
CHEAP = ["linear(rank=2)", "linear(groups=2)", "linear(pooled=True)", "mlp(width=4)"]
AGREE = 1e-12


@pytest.fixture(autouse=True)
def plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded graph itself, unless a test is about compiling."""
    if not request.node.name.startswith("test_compiled"):
        monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every warning is the test's own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def double(dropout: float = 0.0) -> nn.Module:
    """The chain, with batch norm and dropout, always with the same weights."""
    torch.manual_seed(3)
    return nn.Sequential(*(Block(6, dropout) for _ in range(3)), nn.Linear(6, 3)).double()


def pair(gradients: Any = "linear", dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
    """A trainer whose steps are recorded, and its twin."""
    made = [
        trainer_of(gradients, model=double(dropout), compile=c, metrics_every=10**9, **options)
        for c in (True, False)
    ]
    return made[0], made[1]


def assert_agree(fused: Any, twin: Any, programs: int = 1) -> None:
    """Both have the same weights and states, and one of them by programs."""
    assert len(fused.fused.programs) == programs
    assert largest_difference(record(fused), record(twin)) < AGREE


@pytest.mark.parametrize("gradients", [*RECORDED, *CHEAP])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_every_source(gradients: str, optimizer: Any) -> None:
    fused, twin = pair(gradients, optimizer=optimizer, synthesizer_optimizer=optimizer)
    assert_agree(train(fused, STEPS), train(twin, STEPS))


@pytest.mark.parametrize("gradients", [n for n in SOURCES if n not in RECORDED])
def test_other_sources_run_eagerly_and_say_so(gradients: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fused, twin = pair(gradients)
            train(fused, 4)
        except dni_fx.DecouplingError:
            pytest.skip("not for this model")
    ours = [str(w.message) for w in said if "compile=" in str(w.message)]
    assert len(ours) == 1 or fused.fused.programs
    train(twin, 4)
    for trainer in (fused, twin):
        trainer.drain()
    assert largest_difference(record(fused), record(twin)) < AGREE


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, dampening=0.3),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, betas=(0.5, 0.7), eps=1e-3),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ],
)
def test_updates_are_those_of_torch(make: Any) -> None:
    fused, twin = pair(optimizer=make)
    assert_agree(train(fused, STEPS), train(twin, STEPS))


def test_another_rate_is_noticed() -> None:
    """The control of the comparison."""
    fused, twin = pair()
    train(fused, STEPS)
    for optimizer in twin.optimizers.values():
        optimizer.param_groups[0]["lr"] *= 1.001
    assert largest_difference(record(fused), record(train(twin, STEPS))) > 1e-6


def test_random_numbers_and_reports_are_those_of_eager_steps() -> None:
    fused, twin = pair(dropout=0.5)
    reports = []
    for trainer in (fused, twin):
        torch.manual_seed(0)
        for step in range(STEPS):
            x, y = batch(step, dtype=torch.float64)
            report = trainer.step(x, target=y)
        reports.append(report)
        reports.append(torch.rand(3))
    assert_agree(fused, twin)
    assert torch.equal(reports[1], reports[3])
    assert abs(float(reports[0].loss - reports[2].loss)) < AGREE
    assert largest_difference(reports[0].outputs, reports[2].outputs) < AGREE
    assert reports[0].step == reports[2].step == STEPS


def test_what_is_not_finite_is_refused_by_name_and_changes_nothing() -> None:
    fused, twin = train(pair()[0], 4), train(pair()[1], 4)
    before = record(fused)
    x, y = batch(9, dtype=torch.float64)
    x[0, 0] = torch.nan
    messages = []
    for trainer in (fused, twin):
        with pytest.raises(NonFiniteError) as caught:
            trainer.step(x, target=y)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert_bits_equal(record(fused), before, "after a NaN")
    assert_agree(train(fused, 3), train(twin, 3))


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_clipped_steps_are_those_of_torch(optimizer: Any) -> None:
    fused, twin = pair(optimizer=optimizer, clip_norm=0.05)
    assert_agree(train(fused, STEPS), train(twin, STEPS))
    assert "clip_norm" in fused.fused.programs[0].graph.code
    free, _ = pair(optimizer=optimizer)
    assert largest_difference(record(fused), record(train(free, STEPS))) > 1e-6


def test_a_bound_is_an_input_and_having_one_is_not() -> None:
    fused, twin = pair(clip_norm=0.05)
    for trainer in (fused, twin):
        for bound in (0.05, 0.02, 1e3):
            trainer.clip_norm = bound
            train(trainer, 3)
    assert_agree(fused, twin)
    control = record(train(pair(clip_norm=0.05)[0], 9))
    assert largest_difference(record(fused), control) > 1e-6
    for trainer in (fused, twin):
        trainer.clip_norm = None
        train(trainer, 3)
    assert_agree(fused, twin)


def test_what_is_not_finite_is_refused_where_gradients_are_clipped() -> None:
    fused, _ = pair(clip_norm=0.05)
    before = record(train(fused, 4))
    x, y = batch(9, dtype=torch.float64)
    x[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        fused.step(x, target=y)
    assert fused.fused.programs
    assert_bits_equal(record(fused), before, "after a NaN")


def test_rates_are_inputs_and_settings_are_not() -> None:
    fused, twin = pair(optimizer=adam)
    for trainer in (fused, twin):
        for step in range(6):
            for optimizer in trainer.optimizers.values():
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            train(trainer, 1)
    assert_agree(fused, twin)
    for trainer in (fused, twin):
        trainer.optimizers["stage_1"].param_groups[0]["weight_decay"] = 0.1
        train(trainer, 3)
    assert_agree(fused, twin)


SCALE = 1.0


def scaled(output: Tensor, target: Tensor) -> Tensor:
    """A loss with a setting of its module's."""
    return F.cross_entropy(output, target) * SCALE


def change_global(trainer: Any) -> None:
    """What the loss reads."""
    global SCALE
    SCALE = 3.0


def change_dropout(trainer: Any) -> None:
    """An attribute of a module."""
    trainer.decoupled.model[1].dropout.p = 0.25


def change_mode(trainer: Any) -> None:
    """Another graph of the model."""
    trainer.decoupled.model.eval()


def freeze(trainer: Any) -> None:
    """A parameter that is trained no longer."""
    trainer.decoupled.model[0].linear.bias.requires_grad_(False)


def load(trainer: Any) -> None:
    """States are new tensors afterwards."""
    trainer.load_state_dict(trainer.state_dict())


def change_source(trainer: Any) -> None:
    """An attribute that a source computes with."""
    for source in trainer.decoupled.sources.values():
        source.factor = 0.5


def freeze_source(trainer: Any) -> None:
    """Sources that predict on, and learn nothing."""
    trainer.decoupled.synthesizers.requires_grad_(False)


def leave_out(trainer: Any) -> None:
    """A parameter that an optimiser steps no longer."""
    optimizer = trainer.optimizers["stage_1"]
    group = optimizer.param_groups[0]
    optimizer.state.pop(group["params"][0])
    group["params"] = group["params"][1:]


def hear(trainer: Any) -> None:
    """A hook on a gradient."""
    trainer.decoupled.model[1].linear.weight.register_hook(lambda g: g * 0.5)


class Halved(dni_fx.sources.Linear):
    """A source with a plain number."""

    factor = 1.0

    def __init__(self, specs: Any, context: Any = None) -> None:
        super().__init__(specs, context)
        self.factor = 1.0

    def predict(self, values: Any, context: Any = None) -> Any:
        """Scaled."""
        found = super().predict(values, context)
        return dni_fx.sources.Prediction(
            tuple(g * self.factor for g in found.gradients), found.state
        )


@pytest.mark.parametrize(
    "change",
    [
        change_global, change_dropout, change_mode, freeze, load, change_source, freeze_source,
        leave_out,
    ],
)  # fmt: skip
def test_what_changes_between_steps_is_noticed(change: Any) -> None:
    global SCALE
    SCALE = 1.0
    fused, twin = pair(Halved, dropout=0.5, loss=scaled)
    for trainer in (fused, twin):
        SCALE = 1.0
        train(trainer, 4)
        change(trainer)
        train(trainer, 4)
    assert largest_difference(record(fused), record(twin)) < AGREE
    assert fused.fused.programs


def test_targets_of_another_kind_have_programs_of_their_own() -> None:
    """In another dtype, and where the target was the input itself."""

    def reconstructs(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target[:, :3].to(output.dtype))

    made = []
    for compile_ in (True, False):
        trainer = trainer_of(
            "zero", model=double(), compile=compile_, metrics_every=10**9, context=None,
            loss=reconstructs,
        )  # fmt: skip
        for step in range(9):
            x, _ = batch(step, dtype=torch.float64)
            other = batch(step + 50, dtype=torch.float64)[0]
            trainer.step(x, target=(x, other, other.float())[step // 3])
        made.append(trainer)
    assert_agree(*made, programs=3)


def test_a_parameter_without_state_waits_for_an_eager_step() -> None:
    fused, twin = pair(optimizer=adam)
    for trainer in (fused, twin):
        train(trainer, 4)
        trainer.optimizers["stage_1"].state.clear()
        train(trainer, 4)
    assert_agree(fused, twin)


def test_hooks_on_gradients_are_heard() -> None:
    fused, twin = pair(loss=scaled)
    train(fused, 4)
    train(twin, 4)
    for trainer in (fused, twin):
        hear(trainer)
    with pytest.warns(UserWarning, match="hooks"):
        train(fused, 3)
    assert largest_difference(record(fused), record(train(twin, 3))) < AGREE


def noisy(output: Tensor, target: Tensor) -> Tensor:
    """A loss with random numbers that no graph draws."""
    return F.cross_entropy(output, target) * random.random()


def test_random_numbers_of_python_are_drawn_anew() -> None:
    made = []
    fused, twin = pair(loss=noisy)
    for trainer in (fused, twin):
        random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.append(record(train(trainer, 5)))
    assert_bits_equal(*made, "with random.random()")
    assert not fused.fused.programs


def test_a_last_smaller_batch_has_a_program_of_its_own() -> None:
    fused, twin = pair()
    assert_agree(
        train(fused, STEPS, sizes=(8, 8, 5)), train(twin, STEPS, sizes=(8, 8, 5)), programs=2
    )


def test_going_on_from_a_state() -> None:
    fused, _ = pair(optimizer=adam)
    train(fused, 5)
    other, _ = pair(optimizer=adam)
    train(other, 1).load_state_dict(fused.state_dict())
    assert_bits_equal(record(train(other, 4)), record(train(fused, 4)), "resumed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 2}, "accumulate"),
        ({"optimizer": lambda p: torch.optim.RMSprop(p, 0.01)}, "RMSprop"),
        ({"optimizer": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True)}, "amsgrad"),
        ({"loss": lambda o, y: F.cross_entropy(o, y) if o.sum() < 1e9 else o.sum()}, "recorded"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly_with_one_warning(options: Any, words: str) -> None:
    fused, twin = pair(**options)
    with pytest.warns(UserWarning, match=words) as said:
        train(fused, 6)
    assert len(said) == 1
    assert not fused.fused.programs
    assert_bits_equal(record(fused), record(train(twin, 6)), words)


def test_the_program_speaks_of_the_models_parameters() -> None:
    fused, _ = pair()
    train(fused, 3)
    code = fused.fused.programs[0].graph.code
    assert "model_0_linear_weight" in code
    assert "rate0" in code


def test_refused_arguments() -> None:
    with pytest.raises(dni_fx.DecouplingError, match="dict of options"):
        trainer_of("linear", compile="fast")
    with pytest.raises(dni_fx.DecouplingError, match="Threads"):
        trainer_of("linear", compile=True, schedule=Threads())


def test_compiled_steps_agree_with_eager_ones() -> None:
    validates = torch.distributions.Distribution._validate_args
    made = [trainer_of("linear", metrics_every=10**9, compile=c) for c in (True, False)]
    fused, twin = (train(trainer, 20) for trainer in made)
    assert len(fused.fused.programs) == 1
    # Not Adam: behind a batch norm biases have no gradient but rounding, which it would enlarge.
    assert largest_difference(record(fused), record(twin)) < 1e-5
    moved = record(twin)["decoupled"], record(trainer_of("linear"))["decoupled"]
    assert largest_difference(*moved) > 1e-3
    assert torch.distributions.Distribution._validate_args == validates
