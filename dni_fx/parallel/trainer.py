"""Stages on several processes of ``torch.distributed``, each at the speed of its own work.

    torchrun --standalone --nproc-per-node 2 train.py

Every process builds the same model, makes a :class:`Trainer`, and calls ``step`` with the same
batches. A process runs its own stages and optimises their parameters alone; values go forward and
answers come back while it works on. Without a process group the same script trains in one process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .. import compiler
from ..decoupled import Decoupled, Stage
from ..errors import DecouplingError
from ..plan import CutPlan
from ..reports.steps import StepReport
from ..runtime import trainer as training
from ..runtime.emitted import detached, keep_modes
from ..runtime.optimizing import MakeOptimizer
from ..runtime.stage_batch import Payload
from ..schedules import Schedule, Threads
from .checkpoints import Checkpoints
from .executors import Crew, shared_state
from .heartbeat import Pulse
from .limits import Flow
from .mailbox import Address, Mail, ParallelError
from .placement import Placement, Places, place_stages, slice_rows
from .streams import Links
from .worker import StageWorker

__all__ = ["ParallelError", "Status", "Trainer", "decouple", "start"]

EVALUATION, BATCH, TAKEN = "evaluation", "batch", "batch taken"


def start(timeout: float = 300.0) -> int:
    """Join the processes that torchrun has started; without torchrun do nothing.

    As ``init_process_group("gloo")``, but fit for restarts: with ``--max-restarts`` the store
    outlives a failure, and a process might look for the others where they were before it.

    Args:
        timeout: seconds to wait for the others, here and in collective operations.

    Returns:
        The rank; 0 in a process of its own.
    """
    if "RANK" not in os.environ:
        return 0
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    return int(rank)


def decouple(
    model: nn.Module, cuts: str | list[str] | CutPlan = "auto", *, group: Any = None, **options: Any
) -> Decoupled:
    """:func:`dni_fx.decouple` with one plan for all processes: that of rank 0, whose costs were
    measured there.

    Args:
        model: the same in every process.
        cuts, options: as for :func:`dni_fx.decouple`.
        group: the process group; the default one.

    Raises:
        DecouplingError: as :func:`dni_fx.decouple` does; without example inputs ``cuts`` must be
            names or a plan.
    """
    if not dist.is_initialized() or not isinstance(cuts, str):
        return compiler.decouple(model, cuts, **options)
    if options.get("example_inputs") is None and options.get("example_kwargs") is None:
        raise DecouplingError(
            "a plan for several processes is made before the first step: pass example_inputs="
        )
    told: list[Any] = [None]
    first = None
    if dist.get_rank(group) == 0:
        try:
            first = compiler.decouple(model, cuts, **options)
            told = [first.plan.to_json()]
        except DecouplingError as error:
            told = [error]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if isinstance(told[0], DecouplingError):
        raise told[0]
    options.pop("stages", None)
    return first or compiler.decouple(model, CutPlan.from_json(told[0]), **options)


@dataclass(frozen=True)
class Status:
    """How the stages of some processes are doing; prints as a table.

    Attributes:
        rows: for each stage what :meth:`StageWorker.status` tells, and its rank.
    """

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        head = (
            "stage",
            "rank",
            "steps",
            "updates",
            "missed",
            "steps/s",
            "under way",
            "staleness",
            "idle",
        )
        lines = [head]
        for row in self.rows:
            stale = (
                "-"
                if row["staleness"] is None
                else f"{row['staleness']:.1f} (at most {row['staleness_max']})"
            )
            idle = "-" if row["idle"] is None else f"{row['idle']:.0%}"
            queued = ", ".join(f"{n} to {stage}" for stage, n in row["queued"].items()) or "-"
            numbers = (str(row[n]) for n in ("steps", "updates", "missed"))
            lines.append(
                (
                    row["stage"],
                    str(row["rank"]),
                    *numbers,
                    f"{row['rate']:.1f}",
                    queued,
                    stale,
                    idle,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


class Trainer(training.Trainer):
    """Trains the stages of this process, beside the other processes.

    All processes must make their trainers in the same order, and the same number of steps with the
    same batches (of each the model's inputs and the target, whichever stage needs them). A step
    returns when this process's stages are done with the batch, which says nothing of the others.
    With ``gradients="exact"`` all wait for each other: that is the locked baseline, and equals
    backpropagation.

    Args:
        decoupled: the model, cut in the same way in every process; see :func:`decouple`.
        loss, optimizer, synthesizer_optimizer, clip_norm, accumulate, metrics_every: as for
        :class:`dni_fx.Trainer`. schedule: what each step does; all processes follow the same.
        placement: a rank for every stage, in order or by name; several ranks share a stage's
        batches, each working on
            its rows (with a fixed staleness only, and gradients summed over them). By default as
            many stages, in order, on each rank.
        queue: how many values of a stage may be under way to another stage, not answered yet.
        policy: what a stage does where so many are: ``"wait"``, or go on and ``"drop_oldest"``; see
            :class:`Flow`.
        staleness: after how many steps answers are learnt from; None: when they come. A number
            makes runs repeatable bit for bit; 0 waits for them within the step, and equals
            :class:`dni_fx.Trainer`.
        discount: ``discount ** d`` is the weight of an answer that is d steps late in a source's
            regression.
        timeout: seconds after which a process that neither answers nor shows any sign of life ends
            the run.
        group: the process group; the default one. Tensors of GPUs travel through the memory of
            their hosts.

    Raises:
        DecouplingError: arguments of the wrong kind; at the first step: stages that cannot be
            placed so.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        optimizer: MakeOptimizer,
        synthesizer_optimizer: MakeOptimizer = torch.optim.Adam,
        schedule: str | Schedule = "sequential",
        placement: Placement | None = None,
        queue: int = 4,
        policy: str = "wait",
        staleness: int | None = None,
        discount: float = 1.0,
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics_every: int = 50,
        timeout: float = 300.0,
        group: Any = None,
    ) -> None:
        self.flow = Flow(queue, policy, staleness, discount)
        if not isinstance(timeout, int | float) or timeout <= 0:
            raise DecouplingError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.group, self.timeout, self.placement = group, float(timeout), placement
        self.parallel = dist.is_initialized()
        self.rank = dist.get_rank(group) if self.parallel else 0
        self.world = dist.get_world_size(group) if self.parallel else 1
        self.mail = Mail(1.5 * self.timeout)  # that a process hangs is known before, and by name
        self.places: Places | None = None
        self.links: Links | None = None
        self._pulse: Pulse | None = None
        self._team: Crew | None = None
        self._evaluations = 0
        self._checkpoints = Checkpoints(self)
        self._subgroups: dict[tuple[int, ...], Any] = {}
        super().__init__(
            decoupled,
            loss,
            optimizer=optimizer,
            synthesizer_optimizer=synthesizer_optimizer,
            schedule=schedule,
            clip_norm=clip_norm,
            accumulate=accumulate,
            metrics_every=metrics_every,
        )
        if isinstance(self.schedule, Threads):
            raise DecouplingError(
                "schedules.Threads is for dni_fx.Trainer; here each process runs its stages in turn"
            )

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """One batch through this process's stages; the same batch in every process.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs of the model.

        Returns:
            Loss and outputs where the last stage is (nan and None elsewhere), of the rows that this
            process works on.

        Raises:
            ParallelError: another process failed, ended, or does not answer; which, and why.
            NonFiniteError: a value or gradient is NaN or infinite; that stage is not updated, and
                all processes end.
            DecouplingError: inputs that do not fit the plan, or a loss that is no scalar.
        """
        try:
            values = self.decoupled.bind(*args, **kwargs)
            team = self._team_now()
            self._adopt_parameters()
            self._size(self.steps, values)
            team.step(team.make_jobs(self.steps, self._mode(), values, target))
        except BaseException as error:
            self._tell(error)
            raise
        self._measure_next = False
        self.steps += 1
        return team.report(self.steps)

    def _meet(self) -> None:
        """Before processes wait for each other: those behind must know which values were dropped
        for good.
        """
        if self.flow.policy == "drop_oldest":
            self.drain()

    def drain(self) -> int:
        """Finish the batches that are under way; to be called in every process.

        With ``policy="drop_oldest"`` call it before collective operations of your own, too: a
        process behind waits for a newer value to learn that one was dropped, and this says that
        none comes. The trainer's own methods do so.

        Returns:
            How many there were here.
        """
        try:
            return 0 if self._team is None else self._team.drain()
        except BaseException as error:
            self._tell(error)
            raise

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, stage by stage on real values, without gradients and in the model's
        mode of now.

        To be called in every process with the same inputs; nothing needs to be gathered.

        Args:
            *args: positional inputs of the model.
            **kwargs: keyword inputs of the model.

        Returns:
            The output where the last stage is, of the rows that this process works on; None
            elsewhere.
        """
        try:
            values = self.decoupled.bind(*args, **kwargs)
            team = self._team_now()
            self.drain()
            self._evaluations += 1
            number = -self._evaluations
            self._size(number, values)
            stages = self.decoupled.graphs.variant.split.stages
            made = {n: s.index for s in stages for n in s.outputs}
            output = None
            with torch.no_grad(), keep_modes():
                for index, worker in team.workers.items():
                    mine, _, _ = team.rows_of(worker, values, None)
                    for producer in sorted({made[n] for n in stages[index].inputs if n in made}):
                        address = Address(EVALUATION, producer, index)
                        mine = (
                            mine
                            | self.mail.await_letter(
                                address, f"the values of stage_{producer}"
                            ).payload
                        )
                    result = detached(
                        stages[index].module(*(mine[n] for n in stages[index].inputs))
                    )
                    if index == len(stages) - 1:
                        output = result
                        continue
                    found = dict(zip(stages[index].outputs, result, strict=True))
                    for other in stages:
                        names = [n for n in other.inputs if n in found]
                        if names:
                            payload = {n: found[n] for n in names}
                            self.mail.send(Address(EVALUATION, index, other.index), number, payload)
            return output
        except BaseException as error:
            self._tell(error)
            raise

    def share(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Rank 0's batches, in every process, for data that only rank 0 can read; to be iterated
        everywhere.

        Args:
            batches: of any nesting; what other ranks pass is not looked at. Tensors arrive on the
                CPU, or on the device of the same kind.

        Raises:
            DecouplingError: the policy is ``"drop_oldest"``: rank 0 would have to wait for the
                slowest process.
        """
        if self.flow.policy != "wait":
            raise DecouplingError(
                "share() makes rank 0 wait for the slowest process: read the data in every process"
            )
        self._team_now()
        if self.links is None:
            yield from batches
        elif self.rank == 0:
            taken = dict.fromkeys(range(1, self.world), 0)
            for count, batch in enumerate(batches):

                def room(sent: int = count) -> bool:
                    for other in taken:
                        while self.mail.take(Address(TAKEN, other, 0)) is not None:
                            taken[other] += 1
                    return sent - min(taken.values()) <= 2 * self.flow.queue

                self.mail.wait(room, "word of the batches that others have taken")
                self.links.tell(taken, BATCH, count, [batch])
                yield batch
            self.links.tell(taken, BATCH, -1, [])
        else:
            while True:
                letter = self.mail.await_letter(Address(BATCH, 0, self.rank), "a batch of rank 0")
                self.links.tell([0], TAKEN, letter.step, None)
                if letter.step < 0:
                    return
                yield letter.payload[0]

    def close(self) -> None:
        """Finish what is under way, and wait for the other processes to close, too; to be called in
        every process.
        """
        if self._team is not None and self.mail.failure is None:
            self.drain()
            self._checkpoints.wait()
        try:
            if self.links is not None and self.mail.failure is None:
                self.links.close()
        finally:
            if self._pulse is not None:
                self._pulse.stop()
            self.links = self._pulse = None
        self.mail.fail(ParallelError("the trainer was closed: make another one to go on"))

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if error is None:
            self.close()
        else:
            self._tell(error)

    # ---- the whole model -------------------------------------------------------------------------

    def gather(self) -> dict[str, Any]:
        """Bring every stage's parameters and buffers into this process's model; to be called in
        every process.

        Returns:
            ``model.state_dict()``, under the model's own names, complete.
        """
        self.drain()
        if self.parallel and self.world > 1:
            self._team_now()
            assert self.places is not None
            owners = {id(t): min(self.places.ranks[k]) for k, t in self._owned_tensors()}
            with torch.no_grad():
                for tensor in [*self.decoupled.model.parameters(), *self.decoupled.model.buffers()]:
                    if id(tensor) in owners:
                        dist.broadcast(
                            tensor.detach(), group=self.group, group_src=owners[id(tensor)]
                        )
        return self.decoupled.model.state_dict()

    def _owned_tensors(self) -> list[tuple[int, torch.Tensor]]:
        """Parameters and buffers with the first stage that uses them, the same in every process."""
        split = self.decoupled.graphs.variant.split
        known = [*self.decoupled.model.parameters(), *self.decoupled.model.buffers()]
        used = [
            {id(t) for t in [*s.module.parameters(), *s.module.buffers()]} for s in split.stages
        ]
        named = [set(stage.parameters) for stage in split.stages]
        names = {id(p): n for n, p in self.decoupled.model.named_parameters()}
        found = []
        for tensor in known:
            where = [
                k
                for k, ids in enumerate(used)
                if id(tensor) in ids or names.get(id(tensor)) in named[k]
            ]
            if where:
                found.append((where[0], tensor))
        return found

    def mean(self, value: float, weight: float = 1.0) -> float:
        """The mean of a number over the processes that have one; to be called in every process,
        outside the hot loop.

        Args:
            value: a loss, say; nan where this process has none.
            weight: how much it counts.
        """
        self._meet()
        known = value == value
        total = torch.tensor(
            [value * weight if known else 0.0, weight if known else 0.0], dtype=torch.float64
        )
        if self.parallel:
            dist.all_reduce(total, group=self.group)
        return float(total[0] / total[1]) if total[1] else float("nan")

    # ---- what goes on ----------------------------------------------------------------------------

    def status(self, everywhere: bool = False) -> Status:
        """Throughput, queues, staleness and idle share of the stages here, or (called in every
        process) everywhere.
        """
        rows = []
        for worker in self._team.workers.values() if self._team else ():
            row = worker.status()
            began = worker.watch.began
            seconds = time.perf_counter() - began if began is not None else 0.0
            rows.append(
                {**row, "rank": self.rank, "rate": worker.begun / seconds if seconds else 0.0}
            )
        if everywhere and self.parallel:
            self._meet()
            every: list[Any] = [None] * self.world
            dist.all_gather_object(every, rows, group=self.group)
            rows = sorted(
                (r for part in every for r in part), key=lambda r: (int(r["stage"][6:]), r["rank"])
            )
        return Status(tuple(rows))

    def save_timeline(self, path: str | Path) -> None:
        """Write what every stage did when, for Chrome's ``chrome://tracing`` or Perfetto; in every
        process.

        Args:
            path: of the JSON file, which rank 0 writes; of each stage the newest spans.
        """
        offset = time.time() - time.perf_counter()
        events = [
            {"name": s.what, "cat": "dni_fx", "ph": "X", "ts": (s.start + offset) * 1e6, "dur": (s.end - s.start) * 1e6,
             "pid": self.rank, "tid": s.stage, "args": {"batch": s.step}}
            for worker in (self._team.workers.values() if self._team else ())
            for s in worker.watch.spans
        ]  # fmt: skip
        every: list[Any] = [events]
        if self.parallel:
            self._meet()
            every = [None] * self.world
            dist.all_gather_object(every, events, group=self.group)
        if self.rank == 0:
            text = json.dumps({"traceEvents": [e for part in every for e in part]})
            temporary = Path(f"{path}.{os.getpid()}")
            temporary.write_text(text)
            temporary.replace(path)

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(
        self, directory: str | Path, *, extra: Any = None, asynchronous: bool = False, keep: int = 2
    ) -> Path:
        """Write a checkpoint, after finishing what is under way; to be called in every process, at
        the same step.

        It holds stages, sources, optimisers, random states, the number of steps and ``extra``. It
        is there as a whole or not at all, whenever a process ends.

        Args:
            directory: where all checkpoints of the run are, on a file system that all processes
                see.
            extra: anything to be pickled that ``resume`` gives back, such as a loader's state; of
                rank 0.
            asynchronous: copy the state and write it while training goes on.
            keep: how many checkpoints stay.

        Returns:
            The checkpoint, ``directory/step-000000100`` after 100 steps.
        """
        self.drain()
        self._team_now()
        return self._checkpoints.save(directory, extra, asynchronous, keep)

    def resume(self, directory: str | Path) -> Any:
        """Go on from the newest complete checkpoint, if there is one; to be called in every
        process.

        The plan must be the same; stages may be on other ranks. ``trainer.steps`` says where the
        data goes on.

        Args:
            directory: as for :meth:`save`.

        Returns:
            What ``save`` was given as ``extra``; None also where there is no checkpoint.

        Raises:
            DecouplingError: the checkpoint belongs to another model or plan; nothing is loaded
                then.
        """
        self.drain()
        self._team_now()
        return self._checkpoints.resume(directory)

    def stage_state(self, index: int) -> dict[str, Any]:
        """Optimiser, sources and unfinished gradients of a stage that is here."""
        name, learners = f"stage_{index}", self._learners_of(index)
        optimizer = self.optimizers.get(name)
        open_ = self.steps % self.accumulate != 0
        parameters = self._stage_parameters.get(name, [])
        return {
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "sources": {n: s.state_dict() for n, s in learners.items()},
            "source_optimizers": {
                n: self.synthesizer_optimizers[n].state_dict()
                for n in learners
                if n in self.synthesizer_optimizers
            },
            "gradients": {n: p.grad for n, p in parameters if p.grad is not None} if open_ else {},
            "steps": self.steps,
        }

    def load_stage_state(self, index: int, state: dict[str, Any]) -> None:
        """Put back what :meth:`stage_state` returned."""
        name, learners = f"stage_{index}", self._learners_of(index)
        if name in self.optimizers:
            self.optimizers[name].load_state_dict(state["optimizer"])
        for n, learner in learners.items():
            learner.load_state_dict(state["sources"][n])
        for n, saved in state["source_optimizers"].items():
            self.synthesizer_optimizers[n].load_state_dict(saved)
        for n, parameter in self._stage_parameters.get(name, []):
            parameter.grad = state["gradients"].get(n)
        self._team_now().workers[index].steps = state["steps"]

    def _learners_of(self, index: int) -> dict[str, nn.Module]:
        """Sources that a stage asks, and synthetic inputs that it is the first to use."""
        first = {f"{i.name}@input": i.consumers[0] for i in self.decoupled.interfaces}
        return {
            n: s for n, s in self.decoupled.named_learners([index]) if first.get(n, index) == index
        }

    def tensor_names(self) -> dict[int, str]:
        """The model's names of its parameters and buffers, by identity."""
        model = self.decoupled.model
        return {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}

    def place_of(self, index: int) -> int:
        """Which of the ranks that run a stage this one is."""
        assert self.places is not None
        return self.places.ranks[index].index(self.rank)

    def state_dict(self) -> dict[str, Any]:
        """Not of a single process: see :meth:`save`."""
        raise DecouplingError(
            "no process has the whole state: save(directory) writes it, and gather() is the model's"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Not into a single process: see :meth:`resume`."""
        raise DecouplingError(
            "no process has the whole state: resume(directory) reads what save(directory) wrote"
        )

    # ---- setting up ------------------------------------------------------------------------------

    def _own_stages(self) -> tuple[Stage, ...]:
        self._find_places()
        assert self.places is not None
        return tuple(self.decoupled.stages[k] for k in self.places.stages_of(self.rank))

    def _find_places(self) -> None:
        if self.places is not None:
            return
        places = place_stages(self.placement, [s.name for s in self.decoupled.stages], self.world)
        for name, where in shared_state(self.decoupled):
            if len({places.ranks[k] for k in where}) > 1:
                stages = ", ".join(f"stage_{k}" for k in where)
                raise DecouplingError(
                    f"{name!r} is used by {stages}, which are placed on different ranks: put them "
                    "on one (placement=), or keep them in one stage "
                    "(dni_fx.plan_cuts(keep_together=...))"
                )
        if places.divided and self.flow.staleness is None:
            raise DecouplingError(
                f"stage_{places.divided[0]} is shared by ranks "
                f"{list(places.ranks[places.divided[0]])}, which must update in step: pass "
                "staleness=, say 2"
            )
        self.places = places

    def _team_now(self) -> Crew:
        """The workers here; at the first call, in every process: agree, connect, start."""
        if self._team is not None:
            return self._team
        self._make_optimizers()
        assert self.places is not None
        if self.parallel:
            self._agree()
            for ranks in dict.fromkeys(self.places.ranks):
                if len(ranks) > 1:
                    every = [
                        r if self.group is None else dist.get_global_rank(self.group, r)
                        for r in ranks
                    ]
                    self._subgroups[ranks] = dist.new_group(every)
        team = Crew(
            self, self.places.stages_of(self.rank), self.mail, self.flow, own_random=self.parallel
        )
        team.rows_of = self._rows_of  # type: ignore[method-assign]
        for worker in team.workers.values():
            self._share(worker)
        if self.parallel and self.world > 1:
            self.links = Links(self.mail, self.places, self.group, self.timeout)
            self._pulse = Pulse(self.mail, self.links.name, self.rank, self.world, self.timeout)
        self._team = team
        return team

    def _agree(self) -> None:
        mine = (self.decoupled.plan.to_json(), self.flow, self.places.ranks if self.places else ())
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, mine, group=self.group)
        for what, index in (
            ("plan", 0),
            ("queue, policy, staleness or discount", 1),
            ("placement", 2),
        ):
            other = [r for r in range(self.world) if every[r][index] != every[0][index]]
            if other:
                raise DecouplingError(
                    f"rank {other[0]} has another {what} than rank 0: build the same model "
                    "everywhere, and cut it with dni_fx.distributed.decouple, which makes one plan "
                    "for all"
                )

    def _share(self, worker: StageWorker) -> None:
        """Start equal, and sum gradients, where several processes work on one stage."""
        assert self.places is not None
        ranks = self.places.ranks[worker.index]
        if len(ranks) == 1:
            return
        group, learners = (
            self._subgroups[ranks],
            dict(self.decoupled.named_learners([worker.index])),
        )
        tensors = [t for k, t in self._owned_tensors() if k == worker.index]
        tensors += [
            t for learner in learners.values() for t in [*learner.parameters(), *learner.buffers()]
        ]
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=group, group_src=0)

        def reduce(parameters: Sequence[nn.Parameter]) -> None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            for gradient in gradients:
                dist.all_reduce(gradient, group=group)

        worker.reduce = reduce

    def _size(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember a batch's size where some stage works on rows of it."""
        assert self.places is not None
        if not self.places.divided:
            return
        tensors = [v for v in values.values() if isinstance(v, torch.Tensor) and v.dim()]
        size = tensors[0].shape[0] if tensors else 0
        least = max(len(r) for r in self.places.ranks)
        if size < least:
            raise DecouplingError(
                f"a batch of {size} has no row for each of {least} ranks that share a stage"
            )
        self.places.sizes[step] = size
        self.places.sizes.pop(step - 4 * self.flow.queue - 64, None)
        for index, worker in self._team.workers.items() if self._team else ():
            first, end = self.places.rows(index, self.rank, size)
            worker.share = (end - first) / size

    def _rows_of(
        self, worker: StageWorker, values: Payload, target: Any
    ) -> tuple[Payload, Any, Any]:
        assert self.places is not None
        if len(self.places.ranks[worker.index]) > 1:
            size = next(
                v.shape[0] for v in values.values() if isinstance(v, torch.Tensor) and v.dim()
            )
            first, end = self.places.rows(worker.index, self.rank, size)
            values, target = (slice_rows(part, first, end, size) for part in (values, target))
        return values, self._context(target), target

    def _tell(self, error: BaseException) -> None:
        """Whoever waits for this process learns why it ends."""
        if self.links is not None and self.mail.failure is None:
            self.mail.fail(error)
            self.links.fail(f"{type(error).__name__}: {error}")
