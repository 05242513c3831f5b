"""A batch is let go of when nothing needs it any more, also while its answers are under way."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dni_fx
from dni_fx.parallel.executors import OneByOne
from dni_fx.parallel.job import Job
from dni_fx.parallel.mailbox import Mail
from dni_fx.schedules import Flow, Mode

X, Y = torch.randn(6, 4), torch.arange(6) % 3


def team(staleness: int) -> tuple[OneByOne, dni_fx.Trainer]:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    decoupled = dni_fx.decouple(model, ["1", "3"], example_inputs=(X,), gradients="linear")
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=torch.optim.SGD)
    parts = (decoupled, trainer.objective, trainer.optimizing, trainer.metrics)
    return OneByOne(*parts, Flow(staleness=staleness), range(3), Mail()), trainer


def begun(executor: OneByOne, trainer: dni_fx.Trainer, step: int) -> weakref.ref[Any]:
    """A batch of its own is run; only the team may still hold its input."""
    x, y = X.clone(), Y.clone()
    values = trainer.decoupled.bind(x)
    executor.step(executor.make_jobs(step, Mode(), values, y))
    return weakref.ref(x)


def test_the_input_of_a_batch_whose_answers_are_due_later_is_let_go_of() -> None:
    executor, trainer = team(staleness=2)
    inputs = [begun(executor, trainer, step) for step in range(4)]
    gc.collect()
    pending = {s for w in executor.workers.values() for s in w.desk.ledger.pending}
    assert pending  # some of them are under way
    assert [ref() is None for ref in inputs[:-2]] == [True, True]
    executor.drain()


def test_a_batch_that_is_left_out_holds_nothing() -> None:
    executor, trainer = team(staleness=0)
    values = trainer.decoupled.bind(X)
    job: Job = executor.make_jobs(0, Mode(), values, Y)[0]
    state = job.state
    assert state.values  # control: before
    assert state.target is not None
    job.drop()
    assert job.left_out
    assert (state.values, state.context, state.target) == ({}, None, None)
