"""One stage at work beside the others: waits for what it needs, runs its batches, and learns from
the answers.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import NonFiniteError
from ..runtime.emitted import all_finite
from ..runtime.stage_batch import Payload, StageRun
from .limits import Flow
from .mailbox import ANSWER, VALUE, Address, Letter, Mail, Stopwatch

if TYPE_CHECKING:
    from ..runtime.trainer import Trainer


class StageWorker:
    """A stage's side of decoupled training.

    Args:
        trainer: whose optimisers, loss and options are used.
        index: of the stage.
        mail: the letters.
        flow: how far it may run ahead.
        lag: steps after which answers are learnt from; None: whenever they come.
        own_random: whether the stage has a stream of random numbers of its own.

    Attributes:
        pending: batches that something is still expected for, by step, oldest first.
        updates: number of updates of the stage's parameters.
        missed: number of batches left out.
    """

    def __init__(
        self,
        trainer: Trainer,
        index: int,
        mail: Mail,
        flow: Flow,
        lag: int | None = None,
        own_random: bool = False,
    ) -> None:
        self.trainer, self.index, self.mail, self.flow, self.lag = trainer, index, mail, flow, lag
        self.name = f"stage_{index}"
        self.queue = max(flow.queue, 0 if lag is None else lag + 1)
        self.pending: dict[int, StageRun] = {}
        self.under_way: dict[
            int, set[int]
        ] = {}  # by consumer: steps of values that were sent and not answered
        self.backlog: dict[
            int, deque[tuple[int, Payload]]
        ] = {}  # by consumer: values that there is no room for
        self.owed: dict[
            int, dict[int, bool]
        ] = {}  # by step: whom to answer, and whether its value has come
        self.ahead: dict[
            tuple[int, int], Payload
        ] = {}  # values of batches to come, by producer and step
        self.consumers: set[int] = set()
        self.answering: set[int] = set()  # stages that something comes back from
        self.producers: set[int] = set()
        self.ended: dict[
            int, int
        ] = {}  # producers that will send nothing of the batches before one
        self.early: dict[
            int, list[tuple[int, Payload | None]]
        ] = {}  # answers about batches to come
        self.draining = False
        self.predicted: set[int] = set()  # producers whose values are not waited for
        self.updates = self.missed = self.delay_sum = self.delay_count = self.delay_max = (
            self.begun
        ) = 0
        self.watch = Stopwatch(index)
        self.random: torch.Tensor | None = None
        if own_random:
            generator = torch.Generator().manual_seed(
                (torch.initial_seed() + 7919 * (index + 1)) % 2**63
            )
            self.random = generator.get_state()
        self.kept: list[
            tuple[nn.Parameter, torch.Tensor | None]
        ] = []  # gradients that a step must not change
        self.late = False  # whether the gradients of the next update hold a late one already
        self.team = [self]  # all workers in the same thread
        self.own_inputs: dict[
            int, nn.Module
        ] = {}  # its copies of synthetic inputs that others use, by identity
        self.own_optimizers: dict[str, torch.optim.Optimizer] = {}
        self.share = 1.0  # of the batch's rows
        self.reduce: Callable[[list[nn.Parameter]], None] | None = (
            None  # over the processes that share the stage
        )
        self.steps = trainer.steps
        self.losses: list[tuple[str, torch.Tensor]] = []
        self.loss: torch.Tensor | None = None
        self.output: Any = None

    # ---- one batch -------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop the gradients of a finished update; a late one that came since makes its own."""
        if self.late:
            self.update()
        if self.steps % self.trainer.accumulate == 0:
            self._drop_gradients()

    def begin(self, run: StageRun, values: Payload, context: Any, target: Any) -> bool:
        """Take what the batch needs, run forward and pull back what is known at once.

        Returns:
            Whether the batch was run; not if what it needs was dropped.
        """
        self._meet(run)
        self.steps = run.step
        self.begun += 1
        if self.flow.policy == "wait":
            for consumer in run.consumers:
                sent = self.under_way.setdefault(consumer, set())
                what = f"an answer of stage_{consumer}"
                self._until(lambda sent=sent: len(sent) < self.queue, what)  # type: ignore[misc]
        received = self._receive(run)
        self.steps += 1
        if received is None:
            self._leave_out(run)
            return False
        run.on_values = lambda found: self._send_values(run, found)
        self.owed[run.step] = {p: p in run.awaited or p not in run.producers for p in run.answered}
        self.pending[run.step] = run
        if run.share > 0 and self.index not in run.active:  # all have to run for the true gradient
            self.kept = [
                (p, None if p.grad is None else p.grad.clone()) for p in self._parameters()
            ]
        with self._running("forward", run.step):
            run.start(values, received, context, target)
        run.on_values = None  # no circle: a batch's tensors go when the batch does
        for producer in self.predicted:
            if (known := self.ahead.pop((producer, run.step), None)) is not None:
                self._see(run, producer, known)
            elif self.ended.get(producer, 0) > run.step:
                self._miss(run, producer)
        for stage, payload in self.early.pop(run.step, ()):
            run.hear(stage, payload)
        if run.is_last:
            self.loss, self.output = run.loss, run.output
        self._answer(run)
        return True

    def skip(self, run: StageRun) -> None:
        """Leave out a batch that there is no time for, and say so to everybody who waits."""
        self._meet(run)
        self.steps = run.step + 1
        for producer in run.awaited:
            address = Address(VALUE, producer, self.index)
            while (letter := self.mail.peek(address)) is not None and letter.step <= run.step:
                self.mail.take(address)
                if letter.payload is not None:
                    self._send(ANSWER, producer, letter.step, None)
        self._leave_out(run)
        self._collect()

    def _meet(self, run: StageRun) -> None:
        """Remember who takes part."""
        self.producers |= set(run.producers)
        self.consumers |= set(run.consumers)
        self.answering |= run.answering
        self.predicted = set(run.producers) - run.awaited

    def _leave_out(self, run: StageRun) -> None:
        self.missed += 1
        self.early.pop(run.step, None)
        for producer in self.predicted:
            if self.ahead.pop((producer, run.step), None) is not None:
                self._send(ANSWER, producer, run.step, None)
        for stage in run.error_to:
            self._send(ANSWER, stage, run.step, None)
        for consumer in run.consumers:  # which may be the next one in this thread
            self._send(VALUE, consumer, self.steps, None)

    def finish(self, run: StageRun) -> None:
        """Learn from the answers that are there, or due, and update."""
        if run.step in self.pending and run.is_locked:
            self._until(lambda: run.is_answered, f"the answers to batch {run.step}")
        if self.lag is None:
            self._collect()
            if self.flow.policy == "drop_oldest":
                self._give_up()
            elif waiting := [r for r in self.pending.values() if self._unseen(r)][: -self.queue]:
                self._until(
                    lambda: not any(self._unseen(r) for r in waiting),
                    "the values that were predicted",
                )
            self._settle(run.step)
        else:
            self._settle_until(run.step - (0 if run.is_locked else self.lag))
        for parameter, gradient in self.kept:
            parameter.grad = gradient
        self.kept = []
        self.update()

    def drain(self, step: int) -> None:
        """Settle one of the batches that are pending."""
        if step in self.pending:
            self._settle_until(step)
            self.update()

    def end(self) -> None:
        """No batch comes for now: what was not sent is not sent any more, and nobody need wait for
        it.
        """
        self.draining = True
        for consumer in sorted(self.consumers):
            for step, _ in self.backlog.pop(consumer, ()):
                self._hear(step, consumer, None)
            self._send(VALUE, consumer, self.steps, None)

    def rest(self) -> None:
        """After the last batch is settled: until nobody has anything to say to this stage, or to
        hear from it.
        """
        self._until(
            lambda: (
                not any(self.under_way.values())
                and all(self.ended.get(p, 0) >= self.steps for p in self.producers)
            ),
            "the end of what is under way",
        )
        self.draining = False
        self.clear()

    # ---- values ----------------------------------------------------------------------------------

    def _receive(self, run: StageRun) -> Payload | None:
        received: Payload = {}
        taken = []
        for producer in sorted(run.awaited):
            found = self.ahead.pop((producer, run.step), None) or self._next(producer, run.step)
            if found is not None:
                taken.append(producer)
                received.update(found)
        if len(taken) == len(run.awaited):
            return received
        for producer in taken:
            self._send(ANSWER, producer, run.step, None)
        return None

    def _next(self, producer: int, step: int) -> Payload | None:
        """A producer's values of a batch; None where a later letter shows that they were dropped."""
        address = Address(VALUE, producer, self.index)
        while True:
            what = f"the values of stage_{producer} for batch {step}"
            self._until(lambda: self.mail.peek(address) is not None, what)
            letter = self.mail.peek(address)
            assert letter is not None
            if letter.step > step:
                return None
            self.mail.take(address)
            self._note_end(producer, letter)
            if letter.payload is not None and letter.step == step:
                return dict(letter.payload)
            if (
                letter.payload is not None
            ):  # of a batch that was left out since another stage's values were missing
                self._send(ANSWER, producer, letter.step, None)

    def _note_end(self, producer: int, letter: Letter) -> None:
        """Nothing of the batches before a letter's comes after it."""
        self.ended[producer] = letter.step

    def _miss(self, run: StageRun, producer: int) -> None:
        """Values that were predicted will not come."""
        if self.owed.get(run.step, {}).get(producer) is False:
            del self.owed[run.step][producer]
            run.miss(producer)

    def _send_values(self, run: StageRun, values: Payload) -> None:
        for consumer in run.consumers:
            names = [n for n in run.stages[consumer].inputs if n in values]
            payload = {n: values[n] for n in names}
            sent = self.under_way.setdefault(consumer, set())
            if len(sent) < self.queue:
                sent.add(run.step)
                self._send(VALUE, consumer, run.step, payload)
                continue
            waiting = self.backlog.setdefault(consumer, deque())
            waiting.append((run.step, payload))
            if len(waiting) > self.flow.queue:
                dropped, _ = waiting.popleft()
                self._hear(dropped, consumer, None)

    def _see(self, run: StageRun, producer: int, values: Payload) -> None:
        """Values that were predicted have come: their producer waits for the answer."""
        run.see(values)
        if run.step in self.owed:
            self.owed[run.step][producer] = True
            self._answer(run)

    def _unseen(self, run: StageRun) -> bool:
        return not all(self.owed.get(run.step, {}).values())

    # ---- answers ---------------------------------------------------------------------------------

    def _answer(self, run: StageRun) -> None:
        """Send what is known and not sent yet."""
        owed = self.owed.get(run.step, {})
        for stage in [s for s, came in owed.items() if came]:
            known, payload = run.answer(stage)
            if known:
                del owed[stage]
                self._send(ANSWER, stage, run.step, payload)

    def _collect(self) -> bool:
        """Open the letters that have come. Returns whether there were any."""
        found = False
        for stage in sorted(self.answering):
            while (letter := self.mail.take(Address(ANSWER, stage, self.index))) is not None:
                found = True
                self._hear(letter.step, stage, letter.payload)
                sent, waiting = self.under_way.get(stage, set()), self.backlog.get(stage)
                sent.discard(letter.step)
                while waiting and len(sent) < self.queue:
                    step, payload = waiting.popleft()
                    sent.add(step)
                    self._send(VALUE, stage, step, payload)
        for producer in sorted(self.producers):
            while (letter := self.mail.peek(Address(VALUE, producer, self.index))) is not None:
                if not self._is_due(producer, letter):
                    break
                self.mail.take(Address(VALUE, producer, self.index))
                found = True
                self._note_end(producer, letter)
                for older in [
                    r for s, r in self.pending.items() if s < letter.step
                ]:  # their values were dropped
                    self._miss(older, producer)
                if letter.payload is None:
                    continue
                run = self.pending.get(letter.step)
                if run is not None and producer in self.owed.get(letter.step, {}):
                    self._see(run, producer, letter.payload)
                elif letter.step >= self.steps:
                    self.ahead[producer, letter.step] = letter.payload
                else:
                    self._send(ANSWER, producer, letter.step, None)
        return found

    def _is_due(self, producer: int, letter: Letter) -> bool:
        """Whether a value was predicted, or belongs to an earlier step: whoever waits, it is
        opened.
        """
        return self.draining or producer in self.predicted or letter.step < self.steps

    def _hear(self, step: int, stage: int, payload: Payload | None) -> None:
        run = self.pending.get(step)
        if run is not None:
            run.hear(stage, payload)
        elif step >= self.steps:  # of a stage that did not wait for this one's values
            self.early.setdefault(step, []).append((stage, payload))

    def _settle_until(self, step: int) -> None:
        """Wait for everything that is due for the batches up to one, and learn from it."""
        due = [r for s, r in self.pending.items() if s <= step]
        self._until(
            lambda: all(r.is_answered and not self._unseen(r) for r in due),
            f"what comes back for batch {step}",
        )
        self._settle(step)

    def _settle(self, limit: int) -> None:
        """Pull back what was late, train the sources, and answer, for the batches up to one."""
        for step, run in [(s, r) for s, r in self.pending.items() if s <= limit]:
            if run.share > 0 and not run.is_answered:
                continue
            with self._running("backward", step):
                late = bool(run.tapes) and run.is_answered and not run.is_locked
                if late and self.late and self.trainer.accumulate == 1:
                    self.update()  # every late gradient makes a step of its own
                    self._drop_gradients()
                self.late |= late
                run.advance(self.steps - 1)
                self._answer(run)
                if self.losses and self.trainer.accumulate == 1:
                    self._update_sources()  # every answer makes a step of its own
                self._check_heard(run)
                if losses := run.fit():
                    delay = self.steps - 1 - step
                    self.delay_sum, self.delay_count = self.delay_sum + delay, self.delay_count + 1
                    self.delay_max = max(self.delay_max, delay)
                    weight = self.flow.discount**delay * self.share
                    torch.autograd.backward(
                        [loss * weight if weight != 1 else loss for _, loss in losses]
                    )
                    self.losses += [(n, loss.detach()) for n, loss in losses]
                if run.measure:
                    self.trainer._measured.update(run.compare(step))
            if run.is_answered and not run.tapes and not self.owed.get(step):
                del self.pending[step]
                self.owed.pop(step, None)
            elif not self.owed.get(step):
                run.forget()

    def _give_up(self) -> None:
        """Batches whose values come so late that as many newer ones wait: their answers are not
        sent.
        """
        unseen = [r for r in self.pending.values() if self._unseen(r)]
        for run in unseen[: max(0, len(unseen) - self.flow.queue)]:
            run.lose()
            for stage, came in self.owed.pop(run.step, {}).items():
                if came:
                    self._send(ANSWER, stage, run.step, None)
            self.pending.pop(run.step)

    # ---- updates ---------------------------------------------------------------------------------

    def _drop_gradients(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.trainer._stage_parameters.get(self.name, [])]

    def update(self) -> None:
        """Step the optimisers where an update is due, once everything is known to be finite."""
        trainer = self.trainer
        if self.steps % trainer.accumulate:
            return
        parameters = self._parameters()
        if self.reduce is not None:
            self.reduce(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._check_finite(gradients)
        if gradients and self.name in trainer.optimizers:
            with self._timed("update", self.steps - 1):
                if trainer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, trainer.clip_norm)
                trainer.optimizers[self.name].step()
            self.updates += 1
        self.late = False
        self._update_sources()

    def _update_sources(self) -> None:
        for name in dict.fromkeys(n for n, _ in self.losses):
            optimizer = self.own_optimizers.get(name) or self.trainer.synthesizer_optimizers.get(
                name
            )
            if optimizer is not None:
                if self.reduce is not None:
                    self.reduce([p for group in optimizer.param_groups for p in group["params"]])
                optimizer.step()
                optimizer.zero_grad()
        self.losses = []

    def _check_heard(self, run: StageRun) -> None:
        """What sources learn from is finite: they keep averages of it."""
        heard = [
            (f"the gradient of interface {n!r}", g)
            for n, g in run.gradients.items()
            if g is not None
        ]
        heard += [
            (f"the value of interface {n!r}", run.values[n])
            for n in run.input_predictions
            if n in run.values
        ]
        if not all_finite([t for _, t in heard]):
            self._refuse(run.step, heard)

    def _refuse(self, step: int, places: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in places:
            if not bool(tensor.isfinite().all()):
                kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
                raise NonFiniteError(
                    f"{self.name}, step {step + 1}: {name} is {kind}; this stage was not updated. "
                    "Look at the batch, lower the learning rates or set clip_norm="
                )

    def _check_finite(self, gradients: list[torch.Tensor]) -> None:
        found = [loss for _, loss in self.losses]
        found += [] if self.loss is None else [self.loss]
        if all_finite([*found, *gradients]):
            return
        places: list[tuple[str, torch.Tensor]] = []
        for run in self.pending.values():
            values = {n: v.nan_to_num(nan=torch.nan, neginf=0.0) for n, v in run.sent.items()}
            places += [(f"the value of interface {n!r}", v) for n, v in values.items()]
            places += run.places()
        places += [("the loss", self.loss)] if self.loss is not None else []
        places += [
            (f"the regression of the source at interface {n!r}", loss) for n, loss in self.losses
        ]
        named = self.trainer._stage_parameters.get(self.name, [])
        places += [
            (f"the gradient of parameter {n!r}", p.grad) for n, p in named if p.grad is not None
        ]
        self._refuse(self.steps - 1, places)

    # ---- waiting and measuring -------------------------------------------------------------------

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        """Open letters, and learn from them where no staleness is fixed, until something is so.

        Those of all stages in this thread: what is waited for may wait for an answer that another
        of them owes.
        """
        self._collect()
        while not ready():
            for worker in reversed(self.team):
                worker.attend()
            with self._timed("wait", self.steps):
                self.mail.wait(
                    lambda: ready() or any(w.has_letters() for w in self.team),
                    f"{self.name}: {what}",
                )
            self._collect()

    def attend(self) -> None:
        """Open what has come while there is no batch: others may wait for what is owed for it."""
        self._collect()
        if self.lag is None:
            self._settle(self.steps)

    def has_letters(self) -> bool:
        """Whether something has come that was not opened."""
        if any(self.mail.boxes.get(Address(ANSWER, s, self.index)) for s in self.answering):
            return True
        newest = ((p, self.mail.boxes.get(Address(VALUE, p, self.index))) for p in self.producers)
        return any(box and self._is_due(p, box[0]) for p, box in newest)

    def _send(self, kind: str, stage: int, step: int, payload: Payload | None) -> None:
        self.mail.send(Address(kind, self.index, stage), step, payload)

    def _timed(self, what: str, step: int) -> contextlib.AbstractContextManager[None]:
        return self.watch.spending(what, step)

    @contextlib.contextmanager
    def _running(self, what: str, step: int) -> Iterator[None]:
        """The stage's own random numbers, where it has them, and the time that it takes."""
        with self._timed(what, step):
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

    def status(self) -> dict[str, Any]:
        """What :meth:`~dni_fx.distributed.Trainer.status` tells of the stage."""
        spent = dict(self.watch.seconds)
        total = sum(spent.values())
        return {
            "stage": self.name,
            "steps": self.steps,
            "updates": self.updates,
            "missed": self.missed,
            "queued": {
                f"stage_{c}": len(s) + len(self.backlog.get(c, ()))
                for c, s in self.under_way.items()
            },
            "pending": len(self.pending),
            "staleness": self.delay_sum / self.delay_count if self.delay_count else None,
            "staleness_max": self.delay_max,
            "seconds": spent,
            "idle": spent.get("wait", 0.0) / total if total else None,
        }
