"""One process's side of a distributed run: its optimisers, its workers, its links to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..runtime.emitted import detached, keep_modes
from ..runtime.objective import Metrics, Objective
from ..runtime.optimizing import StageOptimizers
from ..schedules import Mode
from .executors import OneByOne, Team
from .limits import Flow
from .mailbox import Address, Mail, ParallelError
from .monitoring import Stopwatch
from .peers import Peers
from .placement import Placement, Places
from .sharing import Rows, find_places, share_batches, share_stage
from .streams import Links
from .worker import StageWorker

EVALUATION = "evaluation"


class Process:
    """Trains the stages of this process beside the other processes.

    Args:
        decoupled: the model.
        objective: the loss, and what sources see of the target.
        optimizers: of the stages here, and their sources.
        metrics: when predictions are compared, and what was found.
        peers: the processes.
        flow: how far stages may drift apart.
        placement: a rank, or several, for every stage.
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
        self._places: Places | None = None
        self._rows: Rows | None = None
        self._executor: OneByOne | None = None
        self._evaluations = 0

    @property
    def places(self) -> Places:
        """Which rank runs which stage; known once the model is traced."""
        if self._places is None:
            self._places = find_places(self.decoupled, self.placement, self.peers.world, self.flow)
        return self._places

    @property
    def workers(self) -> Mapping[int, StageWorker]:
        """The stages here at work, by index; none before the first step."""
        return {} if self._executor is None else self._executor.team.workers

    def watches(self) -> list[Stopwatch]:
        """Of the stages here."""
        return [worker.learner.watch for worker in self.workers.values()]

    def status_rows(self) -> list[dict[str, Any]]:
        """How the stages here are doing, as a ``Status`` takes it."""
        return [_status_of(w) | {"rank": self.peers.rank} for w in self.workers.values()]

    def prepare(self) -> None:
        """Make the optimisers of the stages here, once the model is traced; later, have them adopt
        what a new graph uses.
        """
        if not self.decoupled.is_traced:
            return
        mine = [self.decoupled.stages[k] for k in self.places.stages_of(self.peers.rank)]
        self.optimizers.prepare(self.decoupled.graphs, mine)

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, steps: int, mode: Mode, values: dict[str, Any], target: Any) -> StepReport:
        """One batch through the stages here.

        Args:
            steps: number of batches before this one.
            mode: what the schedule says of it.
            values: the model's inputs by name.
            target: what the loss and the context take.
        """
        executor = self.connect(steps)
        self.prepare()
        self._share_rows(steps, values)
        executor.step(executor.team.make_jobs(steps, mode, values, target))
        return executor.team.report(steps + 1)

    def _share_rows(self, step: int, values: dict[str, Any]) -> None:
        assert self._rows is not None
        self._rows.set_size(step, values)
        for index, worker in self.workers.items():
            worker.learner.share = self._rows.share(index)

    def drain(self) -> int:
        """See :meth:`dni_fx.distributed.Trainer.drain`."""
        with self.telling():
            return 0 if self._executor is None else self._executor.drain()

    def meet(self) -> None:
        """Before processes wait for each other: those behind must know which values were dropped
        for good.
        """
        if self.flow.policy == "drop_oldest":
            self.drain()

    def evaluate(self, steps: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :meth:`dni_fx.distributed.Trainer.evaluate`."""
        with self.telling():
            values = self.decoupled.bind(*args, **kwargs)
            self.connect(steps)
            self.drain()
            self._evaluations += 1
            self._share_rows(-self._evaluations, values)
            with torch.no_grad(), keep_modes():
                return self._evaluate_stages(values)

    def _evaluate_stages(self, values: dict[str, Any]) -> Any:
        """The stages here, one after the other, on what the stages before them send."""
        stages = [(s.module, s.inputs, s.outputs) for s in self.decoupled.stages]
        made = {name: k for k, (_, _, outputs) in enumerate(stages) for name in outputs}
        assert self._rows is not None
        for index in self.workers:
            module, inputs, outputs = stages[index]
            mine = dict(self._rows.of(index, values, None)[0])
            for producer in sorted({made[n] for n in inputs if n in made}):
                address = Address(EVALUATION, producer, index)
                mine |= self.mail.await_letter(address, f"the values of stage_{producer}").payload
            result = detached(module(*(mine[n] for n in inputs)))
            if index == len(stages) - 1:
                return result
            found = dict(zip(outputs, result, strict=True))
            for taker, (_, wanted, _) in enumerate(stages):
                payload = {n: found[n] for n in wanted if n in found}
                if payload:
                    address = Address(EVALUATION, index, taker)
                    self.mail.send(address, -self._evaluations, payload)
        return None

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
        return share_batches(batches, self.mail, self.links, self.peers, 2 * self.flow.queue)

    # ---- beginning and end -----------------------------------------------------------------------

    def connect(self, steps: int) -> OneByOne:
        """The stages here; at the first call, in every process: agree, connect, start.

        Args:
            steps: batches that are done already.
        """
        if self._executor is None:
            self.prepare()
            self._agree()
            peers, places = self.peers, self.places
            self._rows = Rows(places, peers.rank, self.flow.queue)
            team = Team(
                self.decoupled,
                self.objective,
                self.optimizers,
                self.metrics,
                self.flow,
                places.stages_of(peers.rank),
                self.mail,
                steps,
                own_random=peers.parallel,
                rows_of=self._rows.of,
            )
            shared = [ranks for ranks in dict.fromkeys(places.ranks) if len(ranks) > 1]
            groups = {ranks: peers.subgroup(ranks) for ranks in shared}
            for index, worker in team.workers.items():
                if group := groups.get(places.ranks[index]):
                    share_stage(self.decoupled, worker, group)
            self._executor = OneByOne(team)
            if peers.world > 1:
                self.links = Links(self.mail, places, peers.group, self.timeout, owner=self)
        return self._executor

    def _agree(self) -> None:
        """All processes must cut, place and wait in the same way."""
        kinds = ("plan", "queue, policy, staleness or discount", "placement")
        mine = (self.decoupled.plan.to_json(), self.flow, self.places.ranks)
        every = self.peers.gather(mine)
        for index, what in enumerate(kinds):
            other = [r for r, told in enumerate(every) if told[index] != every[0][index]]
            if other:
                raise DecouplingError(
                    f"rank {other[0]} has another {what} than rank 0: build the same model "
                    "everywhere, and cut it with dni_fx.distributed.decouple, which makes one plan "
                    "for all"
                )

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


def _status_of(worker: StageWorker) -> dict[str, Any]:
    """How one stage is doing."""
    learner, desk = worker.learner, worker.desk
    spent = dict(learner.watch.seconds)
    total = sum(spent.values())
    return {
        "stage": worker.name,
        "steps": worker.steps,
        "updates": learner.updates,
        "missed": worker.missed,
        "queued": {f"stage_{c}": n for c, n in desk.outbox.count().items()},
        "pending": len(desk.ledger.pending),
        "staleness": learner.delays.mean,
        "staleness_max": learner.delays.largest,
        "seconds": spent,
        "rate": learner.watch.rate(worker.begun),
        "idle": spent.get("wait", 0.0) / total if total else None,
    }
