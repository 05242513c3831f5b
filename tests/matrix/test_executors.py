"""Stages one after the other, on threads, on ranks, as a drop-in and in windows give the same bits:
they differ in who carries values and in which order stages run, and in nothing else.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dni_fx.errors import DecouplingError
from dni_fx.sources import base_name

from ..helpers.comparing import assert_bits_equal
from ..helpers.executors import EXECUTORS, PLAIN, TASKS, Executor, Record, Task, in_turn
from ..helpers.optimisers import sgd
from ..helpers.training import decoupled_of, largest_difference
from ..models.small import CHAIN, CONVOLUTIONS, SMALL

PAIRS = [(executor, task) for task in TASKS for executor in EXECUTORS if executor.takes(task)]
IN_TURN = Executor("in turn", in_turn)
ROUNDED = {
    "mix"
}  # adds the gradients of a value's consumers in another order where they come apart


def outcome(executor: Executor, task: Task, shared: Path) -> Record | DecouplingError:
    """What training gives, or the refusal."""
    try:
        return executor.train(task, shared)
    except DecouplingError as error:
        return error


@functools.cache
def reference(task: Task) -> Record | DecouplingError:
    """What stages in turn give."""
    return outcome(IN_TURN, task, Path())


@functools.cache
def backpropagation(task: Task) -> Record:
    """What the model without cuts gives, trained by an ordinary loop."""
    model, losses = task.case.build(), []
    optimizer = task.optimizer(list(model.named_parameters()))
    for x, y in task.batches():
        optimizer.zero_grad()
        loss = task.case.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": losses,
        "decoupled": {f"model.{name}": value for name, value in model.state_dict().items()},
    }


def assert_agree(got: Record, want: Record, what: str, tolerance: float = 0.0) -> None:
    """What an executor can tell is what is expected of it."""
    for part in got.keys() & want.keys():
        a, b = got[part], want[part]
        if isinstance(a, dict):
            a, b = ({name: x[name] for name in a if name in b} for x in (a, b))
            assert a or not want[part], f"{what}: nothing to compare in {part}"
        if tolerance:
            assert largest_difference(a, b) < tolerance, f"{what}: {part}"
        else:
            assert_bits_equal(a, b, f"{what}: {part}")


@functools.cache
def is_late(gradients: str) -> bool:
    """Whether a source's answer comes steps later, which on threads and ranks is another matter."""
    case = CONVOLUTIONS if base_name(gradients) == "conv" else CHAIN
    return any(source.asks.lag for source in decoupled_of(gradients, case).sources.values())


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("executor", "task"), PAIRS, ids=[f"{task}-{executor.name}" for executor, task in PAIRS]
)
def test_every_executor_gives_the_bits_of_stages_in_turn(
    executor: Executor, task: Task, shared: Path
) -> None:
    want = reference(replace(task, labels=executor.labels))
    got = outcome(executor, replace(task, labels=executor.labels), shared)
    what = f"{task} on {executor.name}"
    if isinstance(got, DecouplingError):
        refused = re.search(executor.refuses, str(got))
        assert refused or isinstance(want, DecouplingError), f"{what}: {got}"
        return
    assert not isinstance(want, DecouplingError), f"{what} takes what stages in turn do not: {want}"
    if executor.at_once and is_late(task.gradients):
        start = decoupled_of(task.gradients, task.case).state_dict()
        assert largest_difference(got["decoupled"], {n: start[n] for n in got["decoupled"]}) > 1e-4
    else:
        rounded = executor.at_once and task.gradients in ROUNDED
        assert_agree(got, want, what, tolerance=1e-5 if rounded else 0.0)


@pytest.mark.matrix
@pytest.mark.parametrize("executor", [IN_TURN, *EXECUTORS], ids=lambda e: e.name)
@pytest.mark.parametrize("task", [t for t in TASKS if t.gradients == "exact"], ids=str)
def test_exact_gradients_are_backpropagation(executor: Executor, task: Task, shared: Path) -> None:
    if not executor.takes(task):
        pytest.skip("random numbers come in no order")
    got = outcome(executor, task, shared)
    if not isinstance(got, DecouplingError):
        assert_agree(got, backpropagation(task), f"{task} on {executor.name}")


@pytest.mark.parametrize("gradients", PLAIN)
@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: e.name)
def test_no_executor_refuses_what_is_plain(
    executor: Executor, gradients: str, shared: Path
) -> None:
    if not executor.waits and gradients in ("exact", "stale"):
        pytest.skip("they wait")
    task = Task(CHAIN, gradients, labels=executor.labels)
    assert_agree(executor.train(task, shared), reference(task), f"{task} on {executor.name}")


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: e.name)
def test_an_executor_that_does_something_else_is_seen(executor: Executor, shared: Path) -> None:
    """The negative control: other gradients, and the same from a step too few."""
    task = Task(CHAIN, "exact" if executor.waits else "local", optimizer=sgd)
    got = executor.train(task, shared)
    with pytest.raises(AssertionError, match="differ"):
        assert_agree(got, reference(replace(task, gradients="zero")), "other gradients")
    assert_agree(got, reference(task), "the same")


def test_all_is_taken_from_the_lists_of_the_code() -> None:
    assert {task.case.name for task in TASKS} == {case.name for case in SMALL}
    assert len({str(task) for task in TASKS}) == len(TASKS)
    every: Any = [executor.name for executor in EXECUTORS]
    assert len(set(every)) == len(every)
    assert torch.get_num_threads() == 1
