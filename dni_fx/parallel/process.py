"""One process's side of a distributed run: its optimisers, its workers, its links to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..decoupled import Decoupled, Stage
from ..errors import DecouplingError
from ..reports.steps import StepReport
from ..runtime import trainer as training
from ..runtime.emitted import detached, keep_modes
from ..schedules import Threads
from .limits import Flow
from .mailbox import Address, Mail, ParallelError
from .monitoring import Stopwatch
from .peers import Peers
from .placement import Placement, Places
from .sharing import RankCrew, find_places, share_batches
from .streams import Links
from .worker import StageWorker

EVALUATION = "evaluation"


class Process(training.Trainer):
    """Trains the stages of this process beside the other processes.

    It is part of a :class:`dni_fx.distributed.Trainer`, which offers what makes sense where no
    process has the whole model.

    Args:
        decoupled, loss: as for :class:`dni_fx.Trainer`.
        peers: the processes.
        flow: how far stages may drift apart.
        placement: a rank, or several, for every stage.
        timeout: seconds without a sign of life after which another process is given up.
        **options: of :class:`dni_fx.Trainer`.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        peers: Peers,
        flow: Flow,
        placement: Placement | None,
        timeout: float,
        **options: Any,
    ) -> None:
        if not isinstance(timeout, int | float) or timeout <= 0:
            raise DecouplingError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.peers, self.flow, self.placement = peers, flow, placement
        self.timeout = float(timeout)
        self.mail = Mail(1.5 * self.timeout)  # that a process hangs is known before, and by name
        self._places: Places | None = None
        self.links: Links | None = None
        self._team: RankCrew | None = None
        self._evaluations = 0
        super().__init__(decoupled, loss, **options)
        if isinstance(self.schedule, Threads):
            raise DecouplingError(
                "schedules.Threads is for dni_fx.Trainer; here each process runs its stages in turn"
            )

    @property
    def places(self) -> Places:
        """Which rank runs which stage; known once the model is traced."""
        if self._places is None:
            self._places = find_places(self.decoupled, self.placement, self.peers.world, self.flow)
        return self._places

    @property
    def workers(self) -> Mapping[int, StageWorker]:
        """The stages here at work, by index; none before the first step."""
        return {} if self._team is None else self._team.workers

    def watches(self) -> list[Stopwatch]:
        """Of the stages here."""
        return [worker.watch for worker in self.workers.values()]

    def status_rows(self) -> list[dict[str, Any]]:
        """How the stages here are doing, as a ``Status`` takes it."""
        return [
            w.status() | {"rank": self.peers.rank, "rate": w.watch.rate(w.begun)}
            for w in self.workers.values()
        ]

    def parameters_of(self, index: int) -> training.NamedParameters:
        """The parameters that the optimiser of a stage here trains."""
        return self._stage_parameters.get(f"stage_{index}", [])

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """See :meth:`dni_fx.distributed.Trainer.step`."""
        with self._telling():
            values = self.decoupled.bind(*args, **kwargs)
            team = self.connect()
            self._adopt_parameters()
            team.set_size(self.steps, values)
            team.step(team.make_jobs(self.steps, self._mode(), values, target))
        self._measure_next = False
        self.steps += 1
        return team.report(self.steps)

    def drain(self) -> int:
        """See :meth:`dni_fx.distributed.Trainer.drain`."""
        with self._telling():
            return 0 if self._team is None else self._team.drain()

    def meet(self) -> None:
        """Before processes wait for each other: those behind must know which values were dropped
        for good.
        """
        if self.flow.policy == "drop_oldest":
            self.drain()

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :meth:`dni_fx.distributed.Trainer.evaluate`."""
        with self._telling():
            values = self.decoupled.bind(*args, **kwargs)
            team = self.connect()
            self.drain()
            self._evaluations += 1
            team.set_size(-self._evaluations, values)
            with torch.no_grad(), keep_modes():
                return self._evaluate_stages(team, values)

    def _evaluate_stages(self, team: RankCrew, values: dict[str, Any]) -> Any:
        """The stages here, one after the other, on what the stages before them send."""
        stages = [(s.module, s.inputs, s.outputs) for s in self.decoupled.stages]
        made = {name: k for k, (_, _, outputs) in enumerate(stages) for name in outputs}
        for index, worker in team.workers.items():
            module, inputs, outputs = stages[index]
            mine = dict(team.rows_of(worker, values, None)[0])
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

    def share(self, batches: Iterable[Any]) -> Iterator[Any]:
        """See :meth:`dni_fx.distributed.Trainer.share`."""
        if self.flow.policy != "wait":
            raise DecouplingError(
                "share() makes rank 0 wait for the slowest process: read the data in every process"
            )
        self.connect()
        self.mail.check()
        if self.links is None:
            return iter(batches)
        return share_batches(batches, self.mail, self.links, self.peers, 2 * self.flow.queue)

    # ---- beginning and end -----------------------------------------------------------------------

    def connect(self) -> RankCrew:
        """The workers here; at the first call, in every process: agree, connect, start."""
        if self._team is None:
            self._make_optimizers()
            self._agree()
            self._team = RankCrew(self, self.places, self.peers, self.mail, self.flow)
            if self.peers.world > 1:
                group = self.peers.group
                self.links = Links(self.mail, self.places, group, self.timeout, owner=self)
        return self._team

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
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def _own_stages(self) -> tuple[Stage, ...]:
        mine = self.places.stages_of(self.peers.rank)
        return tuple(self.decoupled.stages[k] for k in mine)
