"""``check_finite="deferred"``: what was not finite is found a step later, and leaves nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.schedules import Calibration, RandomUpdates, Threads
from dni_fx.sources import SOURCES, base_name

from ..helpers.comparing import assert_bits_equal
from ..helpers.executors import OPTIONED
from ..helpers.optimisers import adam, sgd
from ..helpers.training import batch, record, train, trainer_of
from ..models.small import CHAIN, SKIPS, Chain
from .test_fused_steps import plain

STEPS = 5
LATE = ("delayed", "corrected")
NAMES = [n for n in (*SOURCES, *OPTIONED) if base_name(n) != "conv" and n not in LATE]
BAD = torch.full((8, 6), torch.nan)
interpreted = plain  # compiled steps run as they are recorded


def pair(gradients: Any = "linear", case: Any = CHAIN, **options: Any) -> tuple[Any, Any]:
    """A trainer that looks at its steps later, and its twin."""
    made = [trainer_of(gradients, case, check_finite=c, **options) for c in ("deferred", "step")]
    return made[0], made[1]


def whole(trainer: Any) -> dict[str, Any]:
    """All that a step may change, unfinished gradients and random states included; copied."""
    state = copy.deepcopy(trainer.state_dict())
    return state | {"global": torch.get_rng_state()}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(NonFiniteError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("gradients", NAMES)
def test_good_steps_are_bit_for_bit_those_that_are_checked_at_once(gradients: str) -> None:
    deferred, twin = pair(gradients, SKIPS, optimizer=adam)
    for trainer in (deferred, twin):
        torch.manual_seed(2)
        train(trainer, STEPS, case=SKIPS)
    assert_bits_equal(record(deferred), record(twin), gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip_norm": 0.1},
        {"schedule": RandomUpdates(0.5)},
        {"schedule": Calibration(every=2)},
        {"inputs": "mlp"},
        {"compile": True},
        {"compile": True, "metrics_every": 2},
    ],
    ids=str,
)
def test_whatever_else_is_asked_for(options: dict[str, Any], interpreted: None) -> None:
    """Good steps, a bad one, and good ones again: as if the bad ones had never been."""
    torch.manual_seed(1)
    model = Chain(dropout=0.5)
    deferred, _ = pair(model=model, optimizer=adam, **options)
    _, twin = pair(model=copy.deepcopy(model), optimizer=adam, **options)
    for trainer in (deferred, twin):
        torch.manual_seed(2)
        train(trainer, STEPS)
    before, (x, y) = whole(deferred), batch(STEPS)
    deferred.step(BAD, target=y)
    said = refused(lambda: deferred.step(x, target=y))
    assert f"step {STEPS + 1}: the value of interface" in said
    assert "is NaN; nothing was updated" in said
    assert f"looked at in step {STEPS + 2}, which was not made, either" in said
    assert_bits_equal(whole(deferred), before, "undone")
    for trainer in (deferred, twin):
        torch.manual_seed(3)
        train(trainer, 3)
    deferred.drain()
    assert_bits_equal(record(deferred), record(twin), "gone on")


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_the_first_step_is_undone_as_well(optimizer: Any) -> None:
    """States that were born in it are gone again."""
    trainer, _ = pair(optimizer=optimizer)
    before, (_, y) = whole(trainer), batch(0)
    trainer.step(BAD, target=y)
    assert "step 1: " in refused(trainer.drain)
    assert_bits_equal(whole(trainer), before, "undone")
    assert trainer.drain() == 0


@pytest.mark.parametrize(
    "look",
    [
        lambda trainer, x, y: trainer.state_dict(),
        lambda trainer, x, y: trainer.drain(),
        lambda trainer, x, y: trainer.diagnose(x, target=y),
        lambda trainer, x, y: trainer.fit([(x[:3], y[:3])], progress=False),
        lambda trainer, x, y: trainer.step(x.clone().requires_grad_(), target=y),
    ],
    ids=["state_dict", "drain", "diagnose", "fit", "an input with a gradient"],
)
def test_nothing_is_saved_or_measured_before_it_is_known(look: Any) -> None:
    trainer, _ = pair()
    train(trainer, 2)
    before, (x, y) = whole(trainer), batch(2)
    trainer.step(BAD, target=y)
    assert "step 3: " in refused(lambda: look(trainer, x, y))
    assert_bits_equal(whole(trainer), before, "undone")


def test_fit_looks_at_its_last_step() -> None:
    trainer, _ = pair()
    _, y = batch(0)
    assert "looked at later" in refused(lambda: trainer.fit([(BAD, y)], progress=False))
    assert trainer.steps == 0


def test_loading_leaves_the_last_step_as_it_is() -> None:
    trainer, _ = pair()
    train(trainer, 2)
    state, (x, y) = copy.deepcopy(trainer.state_dict()), batch(2)
    trainer.step(BAD, target=y)
    trainer.load_state_dict(state)
    trainer.step(x, target=y)
    assert trainer.drain() == 0


def test_a_batch_that_is_written_over_meanwhile_is_still_named() -> None:
    trainer, _ = pair()
    (x, y), held = batch(0), BAD.clone()
    trainer.step(held, target=y)
    held.copy_(x)
    assert "is NaN" in refused(trainer.drain)


def test_an_error_that_the_bad_step_has_caused_is_not_blamed() -> None:
    """The model itself fails on what the step before has made of its weights."""
    trainer, _ = pair()
    train(trainer, 2)
    before, (x, y) = whole(trainer), batch(2)

    def picky(output: Tensor, target: Tensor) -> Tensor:
        if trainer.decoupled.model[3].weight.isnan().any():
            raise ValueError("weights are NaN")
        return F.cross_entropy(output, target)

    trainer.loss = picky
    trainer.step(BAD, target=y)
    assert "step 3: " in refused(lambda: trainer.step(x, target=y))
    assert_bits_equal(whole(trainer), before, "undone")
    trainer.loss = lambda output, target: F.cross_entropy(output, target[:3])
    with pytest.raises(ValueError, match="batch_size"):
        trainer.step(x, target=y)
    assert_bits_equal(whole(trainer), before, "an error of its own")


def test_norms_that_overflow_are_no_reason_to_leave_a_step_out() -> None:
    """Asked of numbers of several kinds at once; made again, the step is found in order."""
    trainers = pair(model=None, optimizer=partial(torch.optim.SGD, lr=0.0))
    huge = torch.full((8, 6), 1e30, dtype=torch.float64)
    for trainer in trainers:
        trainer.decoupled.model[3].bias.register_hook(lambda g: g + 3e38)
        _, y = batch(0)
        trainer.step(huge.float() * 0 + 1, target=y)
        trainer.step(huge.float() * 0 + 1, target=y)
        trainer.drain()
    assert trainers[0].steps == trainers[1].steps == 2
    assert_bits_equal(record(trainers[0]), record(trainers[1]), "made again")


class Reads(TorchDispatchMode):
    """Which tensors the host reads: what it would wait for on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(args[0])
        return operator(*args, **(kwargs or {}))


def test_a_step_reads_nothing_but_the_verdict_on_the_one_before() -> None:
    """The control: a step that is checked at once reads its own."""
    options = {"metrics_every": 10**9, "synthesizer_optimizer": sgd}
    for trainer, own in zip(pair(**options), (False, True), strict=True):
        train(trainer, 2)
        x, y = batch(2)
        last = trainer._stepping._deferral and trainer._stepping._deferral.last
        with Reads() as reads:
            trainer.step(x, target=y)
        seen = [t for t in reads.seen if not t.dtype.is_signed or t.is_floating_point()]
        assert len(seen) == 1, "labels are looked at on a CPU alone"
        assert own or seen[0] is last.verdict.tensor


@pytest.mark.parametrize("name", LATE)
def test_late_sources_are_refused(name: str) -> None:
    trainer = trainer_of(name, check_finite="deferred")
    x, y = batch(0)
    with pytest.raises(DecouplingError, match="is late: batches would be under way"):
        trainer.step(x, target=y)


def test_what_is_no_way_to_check() -> None:
    with pytest.raises(DecouplingError, match="check_finite= is 'step' or 'deferred', not 'later'"):
        trainer_of(check_finite="later")
    for beside in ({"schedule": Threads()}, {"sweep": 2}):
        with pytest.raises(DecouplingError, match="each updated by itself: leave one of them out"):
            trainer_of(check_finite="deferred", **beside)


def test_a_step_that_is_not_undone_is_seen() -> None:
    """The control of all of these: without the check, weights are spoilt."""
    trainer, _ = pair()
    train(trainer, 1)
    trainer.step(BAD, target=batch(0)[1])
    assert trainer.decoupled.model[3].weight.isnan().all()
    refused(trainer.drain)
    assert trainer.decoupled.model[3].weight.isfinite().all()
