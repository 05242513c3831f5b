"""An optimiser that fails half-way: all stages are as before the step, their states too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam
from ..helpers.training import record, train, trainer_of


def failing(base: Any, at: int, error: type[BaseException], **options: Any) -> Callable[[Any], Any]:
    """Makes optimisers of which the second fails in one step, after half of its parameters."""
    made: list[int] = []

    class Fails(base):  # type: ignore[misc]
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls != at:
                return super().step(closure)
            group = self.param_groups[0]
            every = group["params"]
            group["params"] = every[: len(every) // 2]
            try:
                super().step(closure)
            finally:
                group["params"] = every
            group["lr"] = 77.0
            raise error("half-way")

    def make(parameters: Any) -> Any:
        made.append(1)
        return (Fails if len(made) == 2 else base)(parameters, lr=0.01, **options)

    return make


@pytest.mark.parametrize("gradients", ["exact", "linear", "delayed"])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, ValueError])
def test_all_stages_are_as_before(gradients: str, at: int, error: type[BaseException]) -> None:
    trainer = trainer_of(gradients, optimizer=failing(torch.optim.Adam, at, error))
    train(trainer, at - 1)
    before, weights = _weights_and_states(trainer)
    with pytest.raises(error, match="half-way"):
        train(trainer, 1)
    after, _ = _weights_and_states(trainer)
    assert_bits_equal(after, before, f"{gradients}, step {at}")
    assert trainer.steps == at - 1
    train(trainer, 3)
    assert any(not torch.equal(weights[n], p) for n, p in trainer.decoupled.named_parameters())


def _weights_and_states(trainer: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    every = {**trainer.optimizers, **trainer.synthesizer_optimizers}
    states = {
        name: {
            "lr": optimizer.param_groups[0]["lr"],
            "state": [
                {k: v.clone() for k, v in state.items()} for state in optimizer.state.values()
            ],
        }
        for name, optimizer in every.items()
    }
    weights = {n: p.detach().clone() for n, p in trainer.decoupled.named_parameters()}
    buffers = {n: b.clone() for n, b in trainer.decoupled.named_buffers()}
    return {"states": states, "weights": weights, "buffers": buffers}, weights


def test_a_hook_that_fails() -> None:
    trainer = train(trainer_of("linear", optimizer=adam), 3)
    before, _ = _weights_and_states(trainer)

    def fail(*_: Any) -> None:
        raise ValueError("a hook broke")

    handle = trainer.optimizers["stage_1"].register_step_post_hook(fail)
    with pytest.raises(ValueError, match="a hook broke"):
        train(trainer, 1)
    assert_bits_equal(_weights_and_states(trainer)[0], before, "after a hook")
    handle.remove()
    train(trainer, 1)


def test_a_signal_between_updates_comes_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own optimisers are not copied: all stages have stepped then."""
    trainer, twin = (train(trainer_of("linear", optimizer=adam), 3) for _ in range(2))
    kind = type(trainer.optimizers["stage_1"])
    plain, sent = kind._init_group, list[None]()

    def interrupted(*args: Any, **options: Any) -> Any:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return plain(*args, **options)

    monkeypatch.setattr(kind, "_init_group", interrupted)

    def step_and_wait() -> None:
        train(trainer, 1)
        time.sleep(2.0)

    with pytest.raises(KeyboardInterrupt):
        step_and_wait()
    monkeypatch.undo()
    train(twin, 1)
    assert trainer.steps == 4
    assert_bits_equal(record(trainer), record(twin), "after Ctrl-C")


def test_on_threads_the_stage_is_as_before() -> None:
    trainer = trainer_of(
        "linear", optimizer=failing(torch.optim.Adam, 1, ValueError), schedule=Threads(staleness=0)
    )
    before = {n: p.clone() for n, p in trainer.decoupled.stages[1].named_parameters()}
    with pytest.raises(Exception, match="half-way"):
        train(trainer, 3).drain()
    after = dict(trainer.decoupled.stages[1].named_parameters())
    assert_bits_equal(after, before, "stage_1")
    trainer.close()
