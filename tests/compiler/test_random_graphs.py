"""Random models, cut at random legal places: exact mode, replay and composed stages against eager
PyTorch, bit for bit.

``DNI_FX_RANDOM_GRAPHS`` sets the number of models (600 by default); they run in shards of up to
300, each from its own seed.
"""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from torch import nn

import dni_fx
from dni_fx.passes.trace.reach import Reach
from dni_fx.passes.trace.symbols import TracedInt

from ..helpers import oracles
from ..helpers.comparing import assert_bits_equal, frozen
from ..helpers.optimisers import sgd
from ..models.cases import Case
from ..models.random_models import Program, RandomModel, programs

COUNT = int(os.environ.get("DNI_FX_RANDOM_GRAPHS", "600"))
SHARD = 300
DTYPE = torch.float64
BY_MODE = "computes something else in eval mode"


def case_of(program: Program) -> Case:
    """The program's model, cut at legal places that its numbers pick; without cuts where no place
    is legal.
    """
    inputs = functools.partial(_inputs, program)
    whole = Case("random", lambda: RandomModel(program), inputs, ())
    model: Any = whole.build(DTYPE)
    note(model.code)
    args, _, _ = oracles.draw(whole, 3, DTYPE, 0)
    legal = [point.name for point in dni_fx.list_cut_points(model, args) if point.legal]
    chosen = {number % len(legal) for number in program.cuts} if legal else set()
    cuts = tuple(legal[index] for index in sorted(chosen))
    note(f"cuts: {cuts}")
    by_mode = "self.training" in model.code or any(
        isinstance(m, nn.Dropout | nn.BatchNorm1d) for m in model.modules()
    )
    return Case("random", whole.make, inputs, cuts, notes=BY_MODE if by_mode else "")


def agree(got: oracles.Record, want: oracles.Record, what: str) -> None:
    """Equal bit for bit. Where backprop leaves a parameter without gradient, a replayed one may be
    zero in every bit.

    (The value crosses a cut, but nothing that the loss depends on: a source has to say something,
    and says zero.)
    """
    for path, gradient in got["step 0"]["gradients"].items():
        if path not in want["step 0"]["gradients"]:
            assert_bits_equal(
                gradient, torch.zeros_like(gradient), f"{what}: {path}, without gradient in eager"
            )
    known = {
        name: g
        for name, g in got["step 0"]["gradients"].items()
        if name in want["step 0"]["gradients"]
    }
    assert_bits_equal({**got["step 0"], "gradients": known}, want["step 0"], what)


def check(case: Case, replay: Callable[..., oracles.Record] = oracles.replay_run) -> None:
    """All oracles on one model, one optimiser step. It is decoupled once, before anything calls
    it: its sources play exact mode first.
    """
    options: dict[str, Any] = {"steps": 1, "batch": 3}
    decoupled = oracles.transform(case, DTYPE, oracles.Replay, batch=3)
    want = oracles.backprop_run(case, DTYPE, sgd, **options)
    start = copy.deepcopy(decoupled.state_dict())
    sources: list[Any] = list(decoupled.synthesizers.values())
    for source in sources:
        source.exact = True
    exact = oracles.exact_run(case, DTYPE, sgd, decoupled=decoupled, **options)
    assert_bits_equal(exact["step 0"], want["step 0"], "exact")
    for source in sources:
        source.exact = False
    decoupled.load_state_dict(start)
    agree(replay(case, DTYPE, sgd, decoupled=decoupled, **options), want, "replay")
    modes = ("train", "eval") if case.notes == BY_MODE else ("train",)
    oracles.composed_check(case, DTYPE, decoupled=decoupled, batches=(2,), modes=modes, seed=1)
    called_by_itself(case, decoupled)


def called_by_itself(case: Case, decoupled: dni_fx.Decoupled) -> None:
    """The traced model, called by its user, is as one that was never traced."""
    model = case.build(DTYPE)
    model.load_state_dict(decoupled.model.state_dict())
    for batch in (2, 3):
        args, _, _ = oracles.draw(case, batch, DTYPE, 0)
        outputs = []
        for each in (decoupled.model.train(), model.train()):
            oracles.seed_generator(0)
            outputs.append(frozen(each(*args)))
        assert_bits_equal(*outputs, f"the model itself, batch {batch}")


def runs(program: Program) -> bool:
    """Whether PyTorch itself takes the program, forward and backward."""
    whole = Case("random", lambda: RandomModel(program), functools.partial(_inputs, program), ())
    try:
        oracles.backprop_run(whole, DTYPE, sgd, steps=1, batch=3)
    except RuntimeError:
        return False
    return True


def _inputs(
    program: Program, batch: int, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(torch.randn(batch, 4, dtype=dtype) for _ in range(program.inputs)), {}


def run(
    count: int, replay: Callable[..., oracles.Record] = oracles.replay_run, number: int = 0
) -> Counter[str]:
    """Check ``count`` random models; stops at the first mismatch, shrunk.

    Returns:
        How many ran, how many of them no cut was legal in, stages and interfaces in all, and
        mismatches.
    """
    seen: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(programs)
    def one(program: Program) -> None:
        try:
            case = case_of(program)  # nothing has called the program yet
            if case.cuts:
                check(case, replay)
        except Exception:
            if not runs(program):
                seen["refused by eager"] += 1
                return
            seen["mismatches"] += 1
            raise
        seen["models" if case.cuts else "without a legal cut"] += 1
        seen["cuts"] += len(case.cuts)

    try:
        one()
    finally:
        print(f"random graphs: {dict(seen)}, mismatches: {seen['mismatches']}")
    return seen


@pytest.mark.matrix
@pytest.mark.parametrize("shard", range(-(-COUNT // SHARD)))
def test_random_graphs(
    shard: int, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, Any], None]
) -> None:
    count = min(SHARD, COUNT - shard * SHARD)
    with capsys.disabled():
        seen = run(count, number=shard)
    for name, number in seen.items():
        record_property(name, number)
    assert seen["mismatches"] == 0
    assert seen["models"] >= 0.85 * count  # in the others nothing trainable reaches an output


def test_the_random_graphs_see_what_a_cache_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: traced sizes hash as their values do, so a cache keyed by shapes takes
    them, and nobody takes them out again.
    """
    steps = (("linear", 0, 0, 1), ("cached", 0, 0, 0), ("activation", 0, 0, 0))
    program = Program(1, steps, (0,), "tuple", (1,))
    monkeypatch.setattr(f"{__name__}.note", print)  # hypothesis takes notes in its tests only
    case = case_of(program)
    assert case.cuts
    check(case)
    monkeypatch.setattr(TracedInt, "__hash__", lambda size: hash(size.look()))
    monkeypatch.setattr(Reach, "send_stand_ins", lambda _: None)
    monkeypatch.setattr(Reach, "restore", lambda _: [])
    with pytest.raises(RuntimeError, match="concrete integers"):
        check(case)


def test_the_random_graphs_see_a_wrong_gradient() -> None:
    """Negative control: a source whose gradient is wrong in the sixth digit."""

    def wrong(decoupled: dni_fx.Decoupled, *step: Any) -> None:
        oracles.hand_over_true_gradients(decoupled, *step)
        sources: list[Any] = list(decoupled.synthesizers.values())
        for source in sources:
            source.gradients = tuple(gradient * (1 + 1e-6) for gradient in source.gradients)

    def replay(*args: Any, **options: Any) -> oracles.Record:
        return oracles.replay_run(*args, before_step=wrong, **options)

    with pytest.raises(AssertionError, match="replay"):
        run(20, replay)
