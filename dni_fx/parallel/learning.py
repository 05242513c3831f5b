"""What one stage learns beside the others: answers settled, gradients checked, and stepped."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DecouplingError
from ..runtime.finite import all_finite, refuse, value_places
from ..runtime.objective import Loss, Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..runtime.whole import whole
from .desk import Desk
from .job import Job
from .monitoring import Stopwatch
from .owning import Owned
from .rates import Posted


class StageLearner:
    """The updates of one stage and its sources.

    Args:
        optimizers: of all stages that are trained here.
        discount: what comes d steps late counts ``discount ** d`` in a source's regression.
        own_random: whether the stage draws from a stream of its own, which follows from the seed
            and the stage alone.

    Attributes:
        random: the state of that stream, between two regions; None where there is none.
        watch: measures the time that it takes.
        own: optimisers of the stage's own copies of synthetic inputs, by name.
        posted: optimisers whose settings come with the batches, by name of the stage or source.
        fraction: of the batch's rows that this process works on.
        group: of the processes that share the stage, over which gradients are summed.
        losses: regressions of the sources that are pulled back and not stepped, by name.
        loss: of the newest batch, where the model's output is.
        late: whether the gradients of the next update hold a late one already.
        updates: number of updates of the stage's parameters.
        delays: how often the sources have learnt from an answer so many steps after its batch.
        delay: how many steps after its batch the last late gradient came; None before.
        clip_norm: largest norm of the gradients, as the newest batch was posted with it.
        owned: what nobody else may change, where a thread of the stage's own works.
    """

    def __init__(
        self,
        desk: Desk,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        discount: float,
        own_random: bool,
    ) -> None:
        self.name = f"stage_{desk.index}"
        self.desk, self.objective, self.optimizers = desk, objective, optimizers
        self.metrics, self.discount = metrics, discount
        seed = (torch.initial_seed() + 7919 * (desk.index + 1)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        self.random = generator.get_state() if own_random else None
        self.watch = Stopwatch(desk.index)
        self.own: dict[str, torch.optim.Optimizer] = {}
        self.posted: dict[str, Posted] = {}
        self.fraction = 1.0
        self.group: Any = None
        self.losses: list[tuple[str, Tensor]] = []
        self.loss: Tensor | None = None
        self.late = False
        self.updates = 0
        self.delays = Counter[int]()
        self.delay: int | None = None
        self.clip_norm = optimizers.clip_norm
        self.owned = Owned()

    def scaled(self, objective: Objective) -> Loss:
        """The loss of the rows that are here: a mean, which counts as much as they are of the
        batch.
        """

        def scaled(output: object, target: object) -> Tensor:
            value = objective.scaled(output, target)
            return value if self.fraction == 1 else value * self.fraction

        return scaled

    def parameters(self) -> list[nn.Parameter]:
        """What the stage's optimiser owns."""
        return self.optimizers.parameters_of(self.name)

    def take_rates(self, job: Job) -> None:
        """A batch begins, with the settings that its optimisers had when it was posted."""
        for name, changes in job.rates.items():
            self.posted[name].take(changes)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """That which steps the stage, with the settings of the newest batch; None where there are
        no parameters.
        """
        posted = self.posted.get(self.name)
        return self.optimizers.stages.get(self.name) if posted is None else posted.double

    def drop_gradients(self) -> None:
        """Those of a finished update."""
        for parameter in self.parameters():
            parameter.grad = None

    def held_gradients(self, steps: int) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Copies of those of an update that is unfinished after so many steps; none if it is."""
        held = steps % self.objective.accumulate != 0
        grads = [(p, p.grad if held else None) for p in self.parameters()]
        return [(p, None if g is None else g.clone()) for p, g in grads]

    @contextlib.contextmanager
    def running(self, what: str, step: int) -> Iterator[None]:
        """The stage's own random numbers, where it has them, and the time that it takes."""
        with self.watch.spending(what, step):
            if self.random is None:
                yield
                return
            outside = torch.get_rng_state()
            torch.set_rng_state(self.random)
            try:
                yield
            finally:
                self.random = torch.get_rng_state()
                torch.set_rng_state(outside)

    def settle(self, limit: int) -> None:
        """Pull back what was late, train the sources, and answer, for the batches up to one."""
        ledger = self.desk.ledger
        for job in ledger.up_to(limit):
            complete = job.answers.is_complete
            if job.setting.share > 0 and not complete:
                continue
            with self.running("backward", job.step):
                self._settle(job)
            if not ledger.owed[job.step]:
                if complete and not job.waits:
                    ledger.close(job.step)
                else:
                    job.state.forget(tuple(job.batch.sources.groups))

    def _settle(self, job: Job) -> None:
        newest, at_once = self.desk.steps - 1, self.objective.accumulate == 1
        late = job.waits and job.answers.is_complete and not job.is_locked
        if late and self.late and at_once:
            self.update()  # a step of its own
            self.drop_gradients()
        self.late |= late
        job.state.now = newest
        waited = job.waits
        job.batch.advance()
        if waited and not job.waits:
            self.delay = newest - job.step
        self.desk.answer(job)
        if self.losses and at_once:
            self.update_sources()  # every answer makes a step of its own
        self._learn(job, newest - job.step)
        if job.measure:
            self.metrics.found.update(job.batch.sources.compare(job.step))

    def _learn(self, job: Job, delay: int) -> None:
        """Train the sources whose message is there, and finite: they keep averages of it."""
        message = job.learnt_from()
        if not all_finite([t for _, t in message]):
            self._refuse(message, job.step)
        if losses := job.learn():
            self.delays[delay] += 1
            weight = self.discount**delay * self.fraction
            torch.autograd.backward([loss * weight if weight != 1 else loss for _, loss in losses])
            self.losses += [(n, loss.detach()) for n, loss in losses]

    def give_up(self, most: int) -> None:
        """Do not answer the oldest where more batches than that still wait for values."""
        unseen = self.desk.ledger.unseen()
        for job in unseen[: max(0, len(unseen) - most)]:
            job.answers.lose()
            for stage in self.desk.ledger.close(job.step):
                self.desk.outbox.answer(stage, job.step, None)

    def check(self, places: list[tuple[str, Tensor]]) -> None:
        """Whether what a batch has written is finite; else raise ``NonFiniteError``."""
        if not all_finite([t for _, t in places]):
            self._refuse(places, self.desk.steps - 1)

    def update(self) -> None:
        """Step the optimisers where an update is due, if all gradients and regressions are finite;
        else raise ``NonFiniteError``.
        """
        steps = self.desk.steps
        if steps % self.objective.accumulate:
            return
        gradients = self._sum_gradients(self.parameters())
        losses = [r for _, r in self.losses] + ([] if self.loss is None else [self.loss])
        if not all_finite([*losses, *gradients]):
            self._refuse(self._places(), steps - 1)
        if gradients and self.name in self.optimizers.stages:
            self.owned.check_weights()
            with self.watch.spending("update", steps - 1):
                self.optimizers.clip(self.name, self.clip_norm)
                self._step(self.name, self.optimizers.stages[self.name])
            self.updates += 1
            self.owned.note()
        self.late = False
        self.update_sources()

    def update_sources(self) -> None:
        """Step the optimisers of the sources that have learnt."""
        for name in dict.fromkeys(n for n, _ in self.losses):
            optimizer = self.own.get(name) or self.optimizers.sources.get(name)
            if optimizer is None:
                raise DecouplingError(
                    f"the source at {name!r} has learnt, but has no optimiser: its parameters must "
                    "be found by source.named_parameters() when the trainer is made (assign them "
                    "as nn.Parameter)"
                )
            self._sum_gradients(p for group in optimizer.param_groups for p in group["params"])
            self._step(name, optimizer)
            optimizer.zero_grad()
        self.losses = []

    def _step(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        posted = self.posted.get(name)
        if posted is None or posted.optimizer is not optimizer:
            with whole([optimizer]):
                optimizer.step()
        else:
            with whole([optimizer, posted.double]):
                posted.step()

    def _sum_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients if self.group is not None else ():
            dist.all_reduce(gradient, group=self.group)
        return gradients

    def _places(self) -> list[tuple[str, Tensor]]:
        """What may not be finite, with its name."""
        places: list[tuple[str, Tensor]] = []
        for job in self.desk.ledger.pending.values():
            groups = tuple(job.batch.sources.groups)
            places += [*value_places(job.state.sent), *job.state.places(groups)]
        places += [] if self.loss is None else [("the loss", self.loss)]
        places += [(f"the regression of the source at interface {n!r}", r) for n, r in self.losses]
        named = self.optimizers.parameters.get(self.name, [])
        grads = [(f"the gradient of parameter {n!r}", p.grad) for n, p in named]
        return places + [(n, g) for n, g in grads if g is not None]

    def _refuse(self, places: list[tuple[str, Tensor]], step: int) -> None:
        refuse(places, f"{self.name}, step {step + 1}", "this stage was not updated")
