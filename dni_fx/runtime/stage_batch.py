"""One batch in one stage, apart from the others: what it needs, what it sends, and what comes back.

Stages that run at once see nothing of each other but letters: values go forward, and every value is
answered. An answer carries the gradient for what was received, and whatever else the sources before
it ask for; it is empty where the stage was not updated. In a locked step (exact gradients, or a
share of them) autograd's order of addition is kept: the stage that uses a value last answers the
one that uses it before, and so on back to where the value was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..decoupled import Decoupled
from ..schedules import Mode
from ..sources import Prediction, Served, awaited_kinds, message_kinds
from ..sources.base import like
from .answers import Messages
from .emitted import kept_weights
from .in_turn import Loss, Run

Payload = dict[str, Any]
GRADIENT = "gradient of "
PART = "part of "  # in a locked step, where a gradient holds what later consumers answered, too


class StageRun(Run):
    """What happens to one batch in one stage.

    Args:
        decoupled: the model, with the graph that fits the batch active.
        index: of the stage.
        step: number of the batch, from 0.
        loss, mode, plain_loss: as for :class:`~dni_fx.runtime.in_turn.Run`.

    Attributes:
        producers: stages whose values it takes; each is answered.
        consumers: stages that take its values; each answers.
        teaches: synthetic inputs that learn in this stage; others are only used.
        measure: whether predictions are compared with what arrives.
        on_values: called with what is sent, as soon as it is known.
    """

    _progress = (*Run._progress, "heard", "lost", "arrived")

    def __init__(
        self,
        decoupled: Decoupled,
        index: int,
        step: int,
        loss: Loss,
        mode: Mode,
        plain_loss: Loss,
    ) -> None:
        super().__init__(decoupled, loss, mode, plain_loss, ask=not decoupled.is_exact)
        self.index, self.step = index, step
        self.stage = self.stages[index]
        self.is_last = index == len(self.stages) - 1
        everyone = self.served
        self.served = tuple(s for s in everyone if s.producer == index)
        self.by_producer = {index: list(self.served)}
        made = {n: s.index for s in self.stages for n in s.outputs}
        self.needs = {n: made[n] for n in self.stage.inputs if n in made}
        self.producers = sorted(set(self.needs.values()))
        self.consumers = [
            s.index for s in self.stages if any(made.get(n) == index for n in s.inputs)
        ]
        self.awaited = {p for n, p in self.needs.items() if n not in self.inputs or self.share > 0}
        self.asked = {p: _asked(everyone, p, index, self.is_last) for p in range(len(self.stages))}
        self.error_to = [
            p for p, kinds in self.asked.items() if "error" in kinds and p not in self.producers
        ]
        self.error_from = (
            len(self.stages) - 1 if _asks_error(self.served) and not self.is_last else None
        )
        self.chain = self._chain() if self.share > 0 else {}
        self.asked_again: dict[str, Prediction] = {}
        self.asked_as: dict[str, int] = {}  # versions of the sources' weights
        self.heard: set[int] = set()
        self.lost: set[int] = set()
        self.arrived: dict[tuple[str, int], Any] = {}
        self.messages = Replies(self)
        self.teaches = {n for n in self.stage.inputs if n in self.inputs}
        self.measure = False
        self.casts: list[torch.autocast] = []  # of the caller, for a thread of the stage's own
        self.on_values: Callable[[Payload], None] | None = None

    # ---- who writes to whom ----------------------------------------------------------------------

    def _chain(self) -> dict[str, tuple[int, int | None]]:
        """For every interface that the stage takes part in: whom it answers in a locked step, and
        who answers it.
        """
        found = {}
        for interface in self.split.interfaces:
            users = [interface.producer, *interface.consumers]
            if self.index in users:
                place = users.index(self.index)
                after = users[place + 1] if place + 1 < len(users) else None
                found[interface.name] = (users[place - 1] if place else self.index, after)
        return found

    @property
    def answering(self) -> set[int]:
        """Stages that something comes back from."""
        chained = {after for _, after in self.chain.values() if after is not None}
        extra = set() if self.error_from is None else {self.error_from}
        return {*self.consumers, *chained, *extra}

    @property
    def answered(self) -> set[int]:
        """Stages that something is sent back to."""
        return {*self.producers, *(before for before, _ in self.chain.values()), *self.error_to} - {
            self.index
        }

    # ---- the stage runs --------------------------------------------------------------------------

    def start(self, values: Payload, received: Payload, context: Any, target: Any) -> None:
        """Run forward, ask the sources, and pull back what is known at once.

        Args:
            values: the model's inputs by name.
            received: what the producers sent; what is predicted may be missing.
            context: what sources see besides values.
            target: what the loss takes.
        """
        self.values = {n: values[n] for n in self.split.model_inputs} | received
        self.context, self.target = context, target
        self.now = self.started = self.step
        self.needed = {self.index}
        self._predict_inputs()
        self._hold_stage(self.stage, self._delays())
        self._ask_to_learn(self._delays())
        if self.index not in self.active and self.share == 0:
            self._forwarded()
        known = self._known()
        self.sent = {n: known[n] for n in self.carried if n in known}
        if self.share == 0:
            self.advance(self.step)

    def _predict_inputs(self) -> None:
        model_inputs = tuple(self.values[n] for n in self.split.model_inputs)
        for name in self.stage.inputs:
            if name in self.inputs and (self.share == 0 or name in self.teaches):
                with torch.set_grad_enabled(name in self.teaches), kept_weights(self.inputs[name]):
                    self.input_predictions[name] = self.inputs[name].predict(model_inputs)

    @staticmethod
    def _hears_late(group: Served, delays: dict[int, int]) -> bool:
        return False  # it is asked again then, see below

    def _ask(self, group: Served, values: dict[str, Any]) -> Prediction:
        self.asked_as[group.name] = _version(group.source)
        return super()._ask(group, values)

    def _to_teach(self, group: Served) -> Prediction:
        """What the source says of then now, if it has learnt since: a late message must not correct
        an outdated guess.

        Else a source that is right by now would be driven on by what was wrong before, d steps
        long, and oscillate.
        """
        if _version(group.source) != self.asked_as[group.name]:
            self.asked_again[group.name] = self._ask(group, self.sent)
        return self.asked_again.get(group.name, self.predictions[group.name])

    def _forwarded(self) -> None:
        if self.on_values is not None:
            self.on_values({n: self.values[n] for n in self.stage.outputs if n in self.values})

    def _delays(self) -> dict[int, int]:
        """Others answer late, always; the stage itself where a source of its own waits for that."""
        late = max((s.source.lag or 0 for s in self.served), default=0)
        delays = dict.fromkeys(range(len(self.stages)), 0 if self.share > 0 else 1)
        return delays | {self.index: 0 if self.share > 0 else late}

    @property
    def is_locked(self) -> bool:
        """Whether the step ends only when all answers are there."""
        return self.share > 0 or any(s.source.lag == 0 for s in self.served)

    # ---- letters ---------------------------------------------------------------------------------

    def see(self, values: Payload) -> None:
        """Values that were predicted have come."""
        self.values.update(values)
        for name in [n for n in self.input_predictions if n not in self.teaches]:
            del self.input_predictions[name]

    def miss(self, producer: int) -> None:
        """Values that were predicted will not come."""
        for name in [n for n in self.input_predictions if self.needs.get(n) == producer]:
            del self.input_predictions[name]

    def hear(self, stage: int, payload: Payload | None) -> None:
        """An answer has come; None where that stage was not updated with this batch."""
        self.heard.add(stage)
        if payload is None:
            self.lost.add(stage)
            return
        for key, value in payload.items():
            if key.startswith(GRADIENT):
                name = key.removeprefix(GRADIENT)
                self.arrived[name, stage] = value
                if value is not None and self.share == 0:
                    self.parts[name, stage] = value
            elif key.startswith(PART):
                self.parts[key.removeprefix(PART), stage] = value
            elif key == "error":
                self.error = value
            else:
                self.arrived[key, stage] = value
        for interface in self.split.interfaces:
            name = interface.name
            if self.share > 0:
                if (name, stage) in self.arrived:
                    self.gradients[name] = self.arrived[name, stage]
            elif (
                interface.producer == self.index
                and set(interface.consumers) <= self.heard - self.lost
            ):
                found = [
                    g for c in interface.consumers if (g := self.arrived.get((name, c))) is not None
                ]
                self.gradients[name] = _total(found)

    def lose(self) -> None:
        """Nothing more is to come."""
        missing = self.answering - self.heard
        self.heard |= missing
        self.lost |= missing

    @property
    def is_answered(self) -> bool:
        """Whether everybody who answers has done so."""
        return self.answering <= self.heard

    def answer(self, stage: int) -> tuple[bool, Payload | None]:
        """What to send back to a stage, once it is known.

        Returns:
            Whether it is known, and the answer.
        """
        if self.share == 0 and self.index not in self.active:
            return True, None
        if self.index not in self.finished:
            gone = (
                self.share == 0 and self.index not in self.tapes
            )  # its own answer can not come any more
            return gone, None
        payload: Payload = {}
        for kind in self.asked[stage]:
            if kind == "error":
                if self.is_last:
                    payload[kind] = self.error
            elif kind != "gradient":
                estimate = self.messages._estimate(kind, self.index)
                if estimate is None:
                    lost = bool(self.lost) and self.is_answered
                    return lost, None
                payload[kind] = estimate
        for interface in self.split.interfaces:
            name = interface.name
            before = self.chain[name][0] if name in self.chain else interface.producer
            if self.index in interface.consumers and before == stage:
                gradient = self.gradients.get(name)
                if (
                    gradient is not None and self.share == 0
                ):  # in the value's own layout, as .grad would be
                    gradient = like(gradient, self._known()[name])
                payload[GRADIENT + name] = gradient
            if self.share > 0 and interface.producer == stage and (name, self.index) in self.parts:
                payload[PART + name] = self.parts[name, self.index]
        return True, payload

    # ---- what Run asks ---------------------------------------------------------------------------

    def _is_ready(self, group: Served) -> bool:
        kinds = awaited_kinds(group.source)
        return self.messages.is_lost(group, kinds) or self.messages.is_there(group, kinds)

    def has_heard(self, group: Served) -> bool:
        """Whether every consumer has sent its gradient."""
        return super().has_heard(group) if self.share == 0 else self.is_answered

    def has_answered(self, stage: int) -> bool:
        """Whether a stage has sent back its gradients."""
        return stage in self.heard - self.lost

    def cannot_hear(self, group: Served) -> bool:
        """Whether a consumer was not updated with this batch, or its answer is lost."""
        return bool(self.lost & set(group.consumers))


class Replies(Messages):
    """The messages of one stage's batch: what the stages behind it have answered."""

    run: StageRun

    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether somebody who was to answer did not."""
        run = self.run
        hears = [k for k in kinds if k != "error"]
        lost = bool(hears) and run.cannot_hear(group)
        return lost or ("error" in kinds and run.error_from in run.lost)

    def is_there(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether everything of these kinds has come."""
        estimates = [
            self._estimate(k, c) for k in kinds if k in ("loss", "logits") for c in group.consumers
        ]
        return all(e is not None for e in estimates) and super().is_there(group, kinds)

    def _estimate(self, kind: str, stage: int) -> Tensor | None:
        run = self.run
        if stage != run.index:
            return run.arrived.get((kind, stage))
        if run.is_last:
            return super()._estimate(kind, stage)
        answers = [run.predictions[s.name] for s in run.served if s.name in run.predictions]
        own = [e for a in answers if (e := a.loss if kind == "loss" else a.logits) is not None]
        behind = [] if own else [run.arrived.get((kind, c)) for c in run.consumers]
        found = own or [e for e in behind if e is not None]
        return None if not found or len(found) < len(behind) else _mean(found)


def _version(source: nn.Module) -> int:
    """Another number whenever a parameter has been written to."""
    return sum(p._version for p in source.parameters())


def _asked(served: tuple[Served, ...], producer: int, consumer: int, last: bool) -> tuple[str, ...]:
    """Kinds of message that a producer's sources ask of a consumer."""
    kinds: dict[str, None] = {}
    for group in served:
        if group.producer == producer:
            for kind in (*message_kinds(group.source), *awaited_kinds(group.source)):
                if last if kind == "error" else consumer in group.consumers:
                    kinds[kind] = None
    return tuple(kinds)


def _asks_error(served: tuple[Served, ...]) -> bool:
    return any("error" in (*message_kinds(s.source), *awaited_kinds(s.source)) for s in served)


def _total(gradients: list[Tensor]) -> Tensor | None:
    total = None
    for gradient in gradients:
        total = gradient if total is None else total + gradient
    return total


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)
