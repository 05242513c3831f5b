"""Every way to run the stages of a model, each as one function from what is trained to what became
of it.

A new executor is one more entry of :data:`EXECUTORS`; a new source, kind of inputs or small model
is in :data:`TASKS` because it is in the list that the code itself goes by.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dni_fx.errors import DecouplingError
from dni_fx.recurrent import decouple_through_time
from dni_fx.schedules import Threads
from dni_fx.sources import INPUTS, SOURCES, base_name

from ..models.cases import Case, seed_generator
from ..models.small import CHAIN, CONVOLUTIONS, DROPOUT, SKIPS, SMALL
from .optimisers import adam, sgd
from .processes import limited, once, torchrun
from .training import ONE_HOT, batch, decoupled_of, record, trainer_of

Record = dict[str, Any]
SIZES = (8, 8, 5) * 2


@dataclass(frozen=True)
class Task:
    """A small model to train for a few steps, and how.

    Attributes:
        labels: whether sources know them.
    """

    case: Case
    gradients: str
    inputs: str | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = adam
    labels: bool = True

    def __str__(self) -> str:
        parts = self.case.name, self.gradients, self.inputs, self.optimizer.__name__
        return "-".join(part for part in parts if part)

    @property
    def context(self) -> Any:
        """As ``decouple`` takes it."""
        return ONE_HOT if self.labels else None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of each step, whose random numbers are seeded."""
        for step, size in enumerate(SIZES):
            seed_generator(step)
            yield batch(step, size, self.case)


OPTIONED = [
    *("linear(rank=2)", "linear(groups=2)", "linear(pooled=True)", "mlp(width=4)"),
    *("conv(rank=2)", "conv(depthwise=True)", "each:linear(rank=2)"),
]
GRADIENTS = [*SOURCES, *OPTIONED, "joint:linear", "joint:critic", "each:linear", "each:mlp"]
PLAIN = ("linear", "mlp", "zero", "stale", "exact")
PAIRS = [(case, gradients) for case in SMALL for gradients in GRADIENTS]
EVERY = os.environ.get("DNI_FX_MATRIX") == "all"  # make matrix
# Every source, and every model, though not each on each: that takes ten minutes.
TASKS = [
    *(
        Task(case, gradients, optimizer=optimizer)
        for case, gradients in PAIRS
        for optimizer in (sgd, adam)
        if EVERY
        or (case is SKIPS and optimizer is adam)
        or (gradients in ("exact", "local") and optimizer is sgd)
        or (case is CHAIN and gradients in PLAIN)
        or (case is CONVOLUTIONS and optimizer is adam and base_name(gradients) == "conv")
    ),
    *(
        Task(case, "linear", inputs)
        for case in SMALL
        for inputs in INPUTS
        if EVERY or case is SKIPS
    ),
    *(Task(case, "linear", "mlp") for case in SMALL if not EVERY and case is not SKIPS),
]


@dataclass(frozen=True)
class Executor:
    """A way to run stages.

    Attributes:
        train: from a task, and a folder that all of pytest's workers share, to losses, weights and
            states of optimisers, as many of them as can be looked at.
        refuses: what its refusals say, as a pattern.
        at_once: stages run beside each other, so that answers have a delay of their own instead of
            a source's lag, and random numbers come in no order.
        labels: sources can know them.
        inputs: synthetic inputs are taken.
        waits: stages can wait for what later ones send.
    """

    name: str
    train: Callable[[Task, Path], Record]
    refuses: str = "(?!)"
    at_once: bool = False
    labels: bool = True
    inputs: bool = True
    waits: bool = True

    def takes(self, task: Task) -> bool:
        """Whether such a task makes sense."""
        return not (self.at_once and task.case is DROPOUT) and (self.inputs or not task.inputs)


def in_turn(task: Task, shared: Path | None = None, schedule: Any = "sequential") -> Record:
    """Stages one after the other: what all others are compared with."""
    with contextlib.closing(_trainer(task, schedule=schedule)) as trainer:
        losses = [trainer.step(x, target=y).loss for x, y in task.batches()]
        trainer.drain()
        return {"losses": losses, **record(trainer)}


def on_threads(task: Task, shared: Path | None = None) -> Record:
    """A thread for each stage, which wait for each other's answers."""
    with limited(20):
        found = in_turn(task, schedule=Threads(staleness=0))
    del found["losses"]  # which come when they are ready
    return found


def in_visits(task: Task, shared: Path | None = None, **options: Any) -> Record:
    """Each stage updated before the next one runs."""
    trainer = _trainer(task, update="at_once", **options)
    with contextlib.closing(trainer):
        losses = [trainer.step(x, target=y).loss for x, y in task.batches()]
        trainer.gather()
        return {"losses": losses, **record(trainer)}


def out_of_memory(task: Task, shared: Path | None = None) -> Record:
    """One stage in memory at a time, the others in files."""
    with tempfile.TemporaryDirectory() as folder:
        return in_visits(task, resident=1, store=folder)


def as_drop_in(task: Task, shared: Path | None = None) -> Record:
    """An ordinary loop over the drop-in module."""
    decoupled = decoupled_of(task.gradients, task.case, inputs=task.inputs, context=task.context)
    module: Any = decoupled.as_module()
    optimizer, losses = task.optimizer(list(module.named_parameters())), []
    for x, y in task.batches():
        optimizer.zero_grad()
        with module.context(y if task.labels else None):
            loss = task.case.loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": losses, "decoupled": decoupled.state_dict()}


class Windowed(nn.Module):
    """A model of single batches as one of windows of one step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[0])


def in_windows(task: Task, shared: Path | None = None) -> Record:
    """Each batch as a window that ends its sequence."""
    model = task.case.build()
    trainer = decouple_through_time(
        Windowed(model),
        window=1,
        loss=task.case.loss,
        optimizer=task.optimizer,
        gradients=task.gradients,
        cuts=[f"inner.{name}" for name in task.case.cuts],
        batch_first=False,
        input_gradients=True,
        check=False,
    )
    trainer.prepare(batch(0, case=task.case)[0][None])  # its sources follow from the generator
    losses = [trainer.step(x[None], target=y, done=True).loss for x, y in task.batches()]
    return {"losses": losses, "decoupled": _model(model.state_dict())}


def on_ranks(task: Task, processes: int, shared: Path) -> Record:
    """Stages on several processes, which go through all tasks in one start."""
    folder = shared / f"tasks-on-{processes}"
    once(folder, torchrun(processes, "tests.matrix.tasks_on_ranks", str(folder)), limit=500)
    path = folder / "records.pt"
    assert path.exists(), (folder / "output.txt").read_text()[-3000:]
    found = _loaded(path)[str(task)]
    if isinstance(found, str):
        raise DecouplingError(found)
    return {"decoupled": _model(found)}


@functools.cache
def _loaded(path: Path) -> dict[str, Any]:
    return torch.load(path)


def _trainer(task: Task, **options: Any) -> Any:
    return trainer_of(
        task.gradients,
        task.case,
        inputs=task.inputs,
        optimizer=task.optimizer,
        context=task.context,
        **options,
    )


def _model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in state.items()}


SEVERAL_STAGES = r"is used by (several stages|stages \d, \d|stage_0, stage_3)"
ONE_VISIT = f"{SEVERAL_STAGES}|in one visit"
EXECUTORS = [
    Executor("visits", in_visits, ONE_VISIT, inputs=False, waits=False),
    Executor("resident", out_of_memory, ONE_VISIT, inputs=False, waits=False),
    Executor("threads", on_threads, SEVERAL_STAGES, at_once=True),
    Executor(
        "drop-in",
        as_drop_in,
        r"waits, or asks for|for each of \d consumers",
        inputs=False,
    ),
    Executor(
        "windows",
        in_windows,
        "waits for a message|needs labels|needs the number of the model's outputs|each:|joint:",
        labels=False,
        inputs=False,
    ),
    *(
        Executor(
            f"ranks-{n}",
            lambda task, shared, n=n: on_ranks(task, n, shared),
            SEVERAL_STAGES,
            at_once=True,
        )
        for n in (2, 4)
    ),
]
