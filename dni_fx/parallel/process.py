"""One process's side of a distributed run: its optimisers, its workers, its links to the others."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..runtime.emitted import detached, keep_modes
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Flow, Mode
from .agreement import Agreement, agree, digest_of, model_of
from .executors import OneByOne
from .mailbox import Address, Mail, ParallelError
from .placement import Placement, Places, find_places
from .sharing import Peers, owned_tensors, share_batches, share_stage
from .streams import Links, newest_number
from .worker import StageWorker

EVALUATION = "evaluation"


class Process:
    """Trains the stages of this process beside the other processes.

    Args:
        timeout: seconds without a sign of life after which another process is given up.

    Raises:
        DecouplingError: a timeout that is no time.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        objective: Objective,
        optimizers: StageOptimizers,
        metrics: Metrics,
        *,
        peers: Peers,
        flow: Flow,
        placement: Placement | None,
        timeout: float,
    ) -> None:
        if not isinstance(timeout, int | float) or timeout <= 0:
            raise DecouplingError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.decoupled, self.objective = decoupled, objective
        self.optimizers, self.metrics = optimizers, metrics
        self.peers, self.flow, self.placement = peers, flow, placement
        self.timeout = float(timeout)
        self.mail = Mail(1.5 * self.timeout)  # that a process hangs is known before, and by name
        self.links: Links | None = None
        self.rows: tuple[dict[str, Any], ...] = ()
        self._agreement: Agreement | None = None
        self._told = 0.0
        self._places: Places | None = None
        self._executor: OneByOne | None = None
        self._evaluations = self._shared = 0

    @property
    def places(self) -> Places:
        """Which rank runs which stage; known once the model is traced."""
        if self._places is None:
            rank, world = self.peers.rank, self.peers.world
            self._places = find_places(self.decoupled, self.placement, rank, world, self.flow)
        return self._places

    @property
    def workers(self) -> Mapping[int, StageWorker]:
        """The stages here at work, by index; none before the first step."""
        return {} if self._executor is None else self._executor.workers

    def status_rows(self) -> tuple[dict[str, Any], ...]:
        """How the stages here are doing, and those elsewhere were when last heard of."""
        self.rows = tuple(_status_of(w, self.peers.rank) for w in self.workers.values())
        streams = () if self.links is None else self.links.streams.values()
        return (*self.rows, *(row for stream in streams for row in stream.rows))

    def newest_loss(self) -> tuple[int, float]:
        """Of the newest batch that the last stage has run, and the number of steps, as far as it is
        known here; else 0 steps and nan.
        """
        worker = self.workers.get(len(self.decoupled.stages) - 1)
        if worker is None or worker.learner.loss is None:
            return (0, math.nan) if self.links is None else self.links.loss
        scale = self.objective.accumulate / worker.learner.fraction
        return worker.desk.steps, worker.learner.loss.item() * scale

    def prepare(self) -> None:
        """Make the optimisers of the stages here, or have them adopt what a new graph uses."""
        if self.decoupled.is_traced:
            mine = [self.decoupled.stages[k] for k in self.places.stages_of(self.peers.rank)]
            self.optimizers.prepare(self.decoupled.graphs, mine)

    def step(self, steps: int, mode: Mode, values: dict[str, Any], target: Any) -> StepReport:
        """One batch, after so many, through the stages here."""
        executor = self.connect(steps, values, target)
        self.prepare()
        self._share_rows(steps, values)
        if self._agreement is not None:
            self._agreement.begin_step(steps, values, target)
        executor.step(executor.make_jobs(steps, mode, values, target))
        if self.links is not None and time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            self.status_rows()
            self.links.give_sign(self.rows)
        report = executor.report(steps + 1)
        if len(self.decoupled.stages) - 1 not in self.workers:
            report = replace(report, loss=torch.tensor(self.newest_loss()[1]))
        return report

    def _share_rows(self, step: int, values: dict[str, Any]) -> None:
        self.places.note_size(step, values, self.flow.queue)
        for index, worker in self.workers.items():
            worker.learner.fraction = self.places.fraction(index)

    def drain(self) -> int:
        """See :meth:`dni_fx.distributed.Trainer.drain`."""
        with self.telling():
            return 0 if self._executor is None else self._executor.drain()

    def meet(self, what: str, steps: int, drain: bool = True) -> None:
        """All make a call in which they wait for each other; see :meth:`Agreement.call`.

        Args:
            what: its name.
            steps: number of steps made.
            drain: whether to finish what is under way; else that is done only where values may have
                been dropped, which who is behind must know.
        """
        with self.telling():
            drains = self.drain if drain or self.flow.policy == "drop_oldest" else lambda: None
            if self._agreement is None:
                drains()
            else:
                self._agreement.call(what, steps, drains)

    def forward(self, steps: int, values: dict[str, Any], what: str = "forward()") -> Any:
        """The model's output where the last stage is, of this process's rows.

        Args:
            steps: number of steps made.
            values: the model's inputs by name.
            what: how the call is named to the others.
        """
        with self.telling():
            self.connect(steps)
            self.meet(what, steps)
            self._evaluations += 1
            self._share_rows(-self._evaluations, values)
            with torch.no_grad(), keep_modes():
                return self._evaluate_stages(values)

    def _evaluate_stages(self, values: dict[str, Any]) -> Any:
        """The stages here, one after the other, on what the stages before them send."""
        stages = self.decoupled.stages
        made = {name: k for k, s in enumerate(stages) for name in s.outputs}
        for index in self.workers:
            stage = stages[index]
            mine = dict(self.places.rows_of(index, values, None)[0])
            for producer in sorted({made[n] for n in stage.inputs if n in made}):
                address = Address(EVALUATION, producer, index)
                mine |= self.mail.await_letter(address, f"the values of stage_{producer}").payload
            result = detached(stage.module(*(mine[n] for n in stage.inputs)))
            if index == len(stages) - 1:
                return result
            found = dict(zip(stage.outputs, result, strict=True))
            for taker, other in enumerate(stages):
                if payload := {n: found[n] for n in other.inputs if n in found}:
                    address = Address(EVALUATION, index, taker)
                    self.mail.send(address, -self._evaluations, payload)
        return None

    def gather(self, steps: int) -> None:
        """Bring every stage's parameters and buffers into this process's model."""
        if self.peers.world > 1:
            self.connect(steps)
        self.meet("gather()", steps)
        if self.peers.world > 1:
            for stage, tensor in owned_tensors(self.decoupled):
                owner = min(self.places.ranks[stage])
                dist.broadcast(tensor.detach(), group=self.peers.group, group_src=owner)

    def share(self, steps: int, batches: Iterable[Any]) -> Iterator[Any]:
        """See :meth:`dni_fx.distributed.Trainer.share`."""
        if self.flow.policy != "wait":
            raise DecouplingError(
                "share() makes rank 0 wait for the slowest process: read the data in every process"
            )
        self.connect(steps)
        self.mail.check()
        if self.links is None:
            return iter(batches)
        self._shared += 1
        return share_batches(batches, self.links, 2 * self.flow.queue, self._shared)

    def connect(
        self, steps: int, values: dict[str, Any] | None = None, target: Any = None
    ) -> OneByOne:
        """The stages here; at the first call, in every process: agree, connect, start."""
        if self._executor is None:
            self.prepare()
            agree(
                self.peers,
                self._in_common(steps),
                None if values is None else digest_of(values, target),
            )
            peers, places = self.peers, self.places
            team = OneByOne(
                self.decoupled,
                self.objective,
                self.optimizers,
                self.metrics,
                self.flow,
                places.stages_of(peers.rank),
                self.mail,
                steps,
                own_random=peers.parallel,
                rows_of=places.rows_of,
            )
            shared = dict.fromkeys(ranks for ranks in places.ranks if len(ranks) > 1)
            groups = {ranks: peers.subgroup(ranks) for ranks in shared}
            for index, worker in team.workers.items():
                if group := groups.get(places.ranks[index]):
                    share_stage(self.decoupled, worker, group)
            if peers.world > 1:
                number = 1 + max(peers.gather(newest_number(), "the first step"))
                what = (self.mail, places, peers.group, self.timeout)
                self.links = Links(*what, owner=self, number=number)
                self._agreement = Agreement(self.mail, self.links, self.timeout)
            self._executor = team
        return self._executor

    def _in_common(self, steps: int) -> dict[str, Any]:
        """What must be the same in all processes."""
        return {
            "version of dni_fx or torch": (
                importlib.import_module("dni_fx").__version__,
                torch.__version__,
            ),
            "model": model_of(self.decoupled),
            "plan": self.decoupled.plan.to_json(),
            "queue, policy, staleness or discount": self.flow,
            "placement": self.places.ranks,
            "accumulate": self.objective.accumulate,
            "number of steps": steps,
        }

    def close(self) -> None:
        """See :meth:`dni_fx.distributed.Trainer.close`."""
        closed = ParallelError("the trainer was closed: make another one to go on")
        if self.mail.failure is not None:
            self.tell(closed)
        elif self.links is not None:
            self.links.close()
        self.mail.fail(closed)

    def tell(self, error: BaseException) -> None:
        """This process ends its part, and whoever waits for it learns why."""
        if self.links is not None:
            self.mail.fail(error)
            self.links.leave(f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Errors end the run of all processes."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise


def _status_of(worker: StageWorker, rank: int) -> dict[str, Any]:
    """How one stage is doing."""
    learner, desk, delays = worker.learner, worker.desk, worker.learner.delays
    spent = dict(learner.watch.seconds)
    total = sum(spent.values())
    return {
        "stage": worker.name,
        "rank": rank,
        "steps": desk.steps,
        "updates": learner.updates,
        "missed": worker.missed,
        "queued": {f"stage_{c}": n for c, n in desk.outbox.count().items()},
        "pending": len(desk.ledger.pending),
        "staleness": sum(d * n for d, n in delays.items()) / delays.total() if delays else None,
        "staleness_max": max(delays, default=0),
        "seconds": spent,
        "rate": learner.watch.rate(),
        "idle": spent.get("wait", 0.0) / total if total else None,
    }
