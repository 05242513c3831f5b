"""What one stage learns beside the others: gradients gathered, checked, and stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..runtime.finite import all_finite, refuse, value_places
from ..runtime.objective import Objective
from ..runtime.optimizing import StageOptimizers
from .job import Job
from .monitoring import Stopwatch

Reduce = Callable[[list[nn.Parameter]], None]


@dataclass
class Delays:
    """How many steps after its batch the sources have learnt from an answer."""

    total: int = 0
    count: int = 0
    largest: int = 0

    def add(self, delay: int) -> None:
        """Note one."""
        self.total, self.count = self.total + delay, self.count + 1
        self.largest = max(self.largest, delay)

    @property
    def mean(self) -> float | None:
        """Their mean, None where there are none."""
        return self.total / self.count if self.count else None


class StageLearner:
    """The updates of one stage and its sources.

    Args:
        name: of the stage.
        objective: the loss, and how many steps make one update.
        optimizers: of all stages that are trained here.
        discount: what comes d steps late counts ``discount ** d`` in a source's regression.
        watch: measures the time of updates.

    Attributes:
        own: optimisers of the stage's own copies of synthetic inputs, by name.
        share: of the batch's rows that this process works on.
        reduce: sums gradients over the processes that share the stage.
        losses: regressions of the sources that are pulled back and not stepped, by name.
        late: whether the gradients of the next update hold a late one already.
        updates: number of updates of the stage's parameters.
        delays: of what the sources have learnt from.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        optimizers: StageOptimizers,
        discount: float,
        watch: Stopwatch,
    ) -> None:
        self.name, self.objective, self.optimizers = name, objective, optimizers
        self.discount, self.watch = discount, watch
        self.own: dict[str, torch.optim.Optimizer] = {}
        self.share = 1.0
        self.reduce: Reduce | None = None
        self.losses: list[tuple[str, Tensor]] = []
        self.late = False
        self.updates = 0
        self.delays = Delays()

    def scaled_loss(self, output: object, target: object) -> Tensor:
        """Of the rows that are worked on here: a mean, which counts as much as they are of the
        batch.
        """
        value = self.objective.scaled(output, target)
        return value if self.share == 1 else value * self.share

    def parameters(self) -> list[nn.Parameter]:
        """What the stage's optimiser owns."""
        return self.optimizers.parameters_of(self.name)

    def drop_gradients(self) -> None:
        """Those of a finished update."""
        for parameter in self.parameters():
            parameter.grad = None

    def learn(self, job: Job, delay: int) -> None:
        """Train the sources whose message is there.

        Args:
            job: the batch.
            delay: how many steps ago it was run.

        Raises:
            NonFiniteError: what they would learn from is not finite: they keep averages of it.
        """
        heard = job.heard_places()
        if not all_finite([t for _, t in heard]):
            self._refuse(heard, job.step)
        if losses := job.learn():
            self.delays.add(delay)
            weight = self.discount**delay * self.share
            torch.autograd.backward([loss * weight if weight != 1 else loss for _, loss in losses])
            self.losses += [(n, loss.detach()) for n, loss in losses]

    def update(self, steps: int, loss: Tensor | None, pending: Iterable[Job]) -> None:
        """Step the optimisers where an update is due, once everything is known to be finite.

        Args:
            steps: batches that the stage has begun.
            loss: the last one, where the model's output is.
            pending: batches that are not finished.

        Raises:
            NonFiniteError: a gradient or regression is not finite; the stage is not updated.
        """
        if steps % self.objective.accumulate:
            return
        parameters = self.parameters()
        if self.reduce is not None:
            self.reduce(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        found = [*(r for _, r in self.losses), *([] if loss is None else [loss]), *gradients]
        if not all_finite(found):
            self._refuse(self._places(loss, pending), steps - 1)
        if gradients and self.name in self.optimizers.stages:
            with self.watch.spending("update", steps - 1):
                self.optimizers.step_stage(self.name)
            self.updates += 1
        self.late = False
        self.update_sources()

    def update_sources(self) -> None:
        """Step the optimisers of the sources that have learnt.

        Raises:
            DecouplingError: one of them has none.
        """
        for name in dict.fromkeys(n for n, _ in self.losses):
            optimizer = self.own.get(name) or self.optimizers.sources.get(name)
            if optimizer is None:
                raise DecouplingError(
                    f"the source at {name!r} has learnt, but has no optimiser: its parameters must "
                    "be found by source.named_parameters() when the trainer is made (assign them "
                    "as nn.Parameter)"
                )
            if self.reduce is not None:
                self.reduce([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
            optimizer.zero_grad()
        self.losses = []

    def _places(self, loss: Tensor | None, pending: Iterable[Job]) -> list[tuple[str, Tensor]]:
        places: list[tuple[str, Tensor]] = []
        for job in pending:
            places += [*value_places(job.state.sent), *job.places()]
        places += [("the loss", loss)] if loss is not None else []
        places += [(f"the regression of the source at interface {n!r}", r) for n, r in self.losses]
        named = self.optimizers.parameters.get(self.name, [])
        grads = [(f"the gradient of parameter {n!r}", p.grad) for n, p in named]
        return places + [(n, g) for n, g in grads if g is not None]

    def _refuse(self, places: list[tuple[str, Tensor]], step: int) -> None:
        refuse(places, f"{self.name}, step {step + 1}", "this stage was not updated")
