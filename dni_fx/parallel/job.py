"""One batch in one stage that runs beside the others: whom it exchanges letters with, what they
answered, and the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.answers import Answers, mean_of
from ..runtime.batch_state import BatchState, Setting
from ..runtime.stage_batch import StageBatch
from ..sources import InputSource, Served
from ..sources.base import like
from ..sources.keeping import kept_weights
from .owning import Modes
from .rates import Changes

Values = dict[str, Any]


class Routes:
    """Who sends what to whom: one stage's part in the exchange about a batch.

    Attributes:
        needs: the stage that makes each value that it takes.
        producers: stages whose values it takes; each is answered.
        consumers: stages that take its values; each answers.
        awaited: producers whose values are waited for; those of the others are predicted.
        asked: by producer, the kinds of message that its sources ask of this stage.
        error_to: stages that hear the output's error without sending a value here.
        error_from: the stage that the output's error comes from; None where nobody asks for it.
        chain: for every interface of a locked step, whom the stage answers, and who answers it:
            the user of a value that is last in program order answers the one before it, and so on
            back to where the value was made, which keeps autograd's order of addition.
        answering: stages that something comes back from.
        answered: stages that something is sent back to.
    """

    def __init__(self, setting: Setting, index: int) -> None:
        stages, makers, last = setting.stages, setting.makers, setting.last
        locked, asking = setting.share > 0, setting.by_producer
        self.needs = {n: makers[n] for n in stages[index].inputs if n in makers}
        self.producers = sorted(set(self.needs.values()))
        takes = [{makers.get(n) for n in s.inputs} for s in stages]
        self.consumers = [k for k, made_in in enumerate(takes) if index in made_in]
        self.awaited = {p for n, p in self.needs.items() if n not in setting.inputs or locked}
        self.asked = {p: _asked(asking[p], index, index == last) for p in asking}
        errors = [p for p, kinds in self.asked.items() if "error" in kinds]
        self.error_to = [p for p in errors if p not in self.producers]
        waits = any("error" in s.source.asks.hears for s in asking[index])
        self.error_from = last if waits and index != last else None
        self.chain: dict[str, tuple[int, int | None]] = {}
        for interface in setting.split.interfaces if locked else ():
            users = [interface.producer, *interface.consumers]
            if index in users:
                place = users.index(index)
                before, after = users[max(place - 1, 0)], [*users, None][place + 1]
                self.chain[interface.name] = (before, after)
        ends = [*self.consumers, *(after for _, after in self.chain.values()), self.error_from]
        self.answering = {k for k in ends if k is not None}
        befores = [before for before, _ in self.chain.values()]
        self.answered = {*self.producers, *befores, *self.error_to} - {index}


def _asked(groups: list[Served], consumer: int, is_last: bool) -> list[str]:
    """Kinds of message that a producer's sources ask of a consumer."""
    kinds = [(k, s) for s in groups for k in s.source.asks.hears]
    asked = [k for k, s in kinds if (is_last if k == "error" else consumer in s.consumers)]
    return list(dict.fromkeys(asked))


@dataclass(frozen=True)
class Answer:
    """What one stage says to another about one batch.

    Attributes:
        gradients: for the values that it took; in a locked step with what later users answered.
        parts: in a locked step, of these what this stage alone added.
        estimates: losses ``(batch,)`` or logits, by kind.
        error: the loss's gradient for the output's logits, from the last stage.
    """

    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    estimates: dict[str, Tensor] = field(default_factory=dict)
    error: Tensor | None = None


class ArrivedAnswers(Answers):
    """What other stages have answered to one stage about one batch.

    Attributes:
        arrived: the answers by stage; None of a stage that has nothing to say.
    """

    def __init__(self, setting: Setting, state: BatchState, index: int, routes: Routes) -> None:
        super().__init__(setting, state)
        self.index, self.routes = index, routes
        self.arrived: dict[int, Answer | None] = {}
        self._true: dict[str, Tensor] = {}  # of the last stage, by kind

    def hear(self, stage: int, answer: Answer | None) -> None:
        """An answer has come; None where that stage was not updated with this batch."""
        self.arrived[stage] = answer
        if answer is None:
            return
        progress, locked = self.state.progress, self.setting.share > 0
        parts = answer.parts if locked else answer.gradients
        progress.parts.update({(n, stage): p for n, p in parts.items() if p is not None})
        if answer.error is not None:
            self.state.error = answer.error
        if locked:
            progress.gradients.update(answer.gradients)
            return
        for interface in self.setting.split.interfaces:
            if interface.producer == self.index and stage in interface.consumers:
                said = [self.arrived.get(c) for c in interface.consumers]
                if all(a is not None for a in said):
                    given = [a.gradients.get(interface.name) for a in said if a is not None]
                    found = [g for g in given if g is not None]
                    total = functools.reduce(torch.add, found) if found else None
                    progress.gradients[interface.name] = total

    def lose(self) -> None:
        """Nothing more is to come."""
        for stage in self.routes.answering:
            self.arrived.setdefault(stage, None)

    @property
    def lost(self) -> set[int]:
        """Stages that have nothing to say."""
        return {k for k, answer in self.arrived.items() if answer is None}

    @property
    def is_complete(self) -> bool:
        """Whether everybody who answers has done so."""
        return self.routes.answering <= self.arrived.keys()

    def answer(self, stage: int) -> tuple[bool, Answer | None]:
        """What to send back to a stage, once it is known.

        Returns:
            Whether it is known, and the answer; None where there is nothing to say.
        """
        setting, progress, index = self.setting, self.state.progress, self.index
        locked = setting.share > 0
        if not locked and index not in setting.active:
            return True, None
        if index not in progress.finished:
            gone = not locked and index not in progress.tapes  # its own answer cannot come any more
            return gone, None
        asked = self.routes.asked[stage]
        estimates = {k: self.estimate(k, index) for k in asked if k in ("loss", "logits")}
        known = {k: e for k, e in estimates.items() if e is not None}
        if len(known) < len(estimates):
            return bool(self.lost) and self.is_complete, None
        error = self.state.error if "error" in asked and index == setting.last else None
        gradients, parts = dict[str, Tensor | None](), dict[str, Tensor]()
        for interface in setting.split.interfaces:
            name = interface.name
            before = self.routes.chain.get(name, (interface.producer, None))[0]
            if index in interface.consumers and before == stage:
                gradient = progress.gradients.get(name)
                if gradient is not None and not locked:  # in the value's own layout, as .grad is
                    gradient = like(gradient, self.state.known()[name])
                gradients[name] = gradient
            if locked and interface.producer == stage and (name, index) in progress.parts:
                parts[name] = progress.parts[name, index]
        return True, Answer(gradients, parts, known, error)

    def has_answered(self, stage: int) -> bool:
        """Whether a stage has sent back its gradients."""
        return self.arrived.get(stage) is not None

    def has_heard(self, group: Served) -> bool:
        """Whether every consumer has sent its gradient."""
        return super().has_heard(group) if self.setting.share == 0 else self.is_complete

    def cannot_hear(self, group: Served) -> bool:
        """Whether a consumer was not updated with this batch, or its answer is lost."""
        return bool(self.lost & set(group.consumers))

    def is_lost(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether somebody who was to answer did not."""
        hears = any(k != "error" for k in kinds)
        return (hears and self.cannot_hear(group)) or (
            "error" in kinds and self.routes.error_from in self.lost
        )

    def is_there(self, group: Served, kinds: tuple[str, ...]) -> bool:
        """Whether everything of these kinds has come."""
        estimated = [k for k in kinds if k in ("loss", "logits")]
        estimates = [self.estimate(k, c) for k in estimated for c in group.consumers]
        return all(e is not None for e in estimates) and super().is_there(group, kinds)

    def is_ready(self, group: Served) -> bool:
        """Whether what a source waits for has come, or never will."""
        kinds = group.source.asks.awaited
        return self.is_lost(group, kinds) or self.is_there(group, kinds)

    def estimate(self, kind: str, stage: int) -> Tensor | None:
        """As the stage answered; of this one, from its own sources, else from what came."""
        if stage != self.index:
            answer = self.arrived.get(stage)
            return None if answer is None else answer.estimates.get(kind)
        if self.index == self.setting.last:
            if kind not in self._true and self.state.loss is not None:
                self._true[kind] = self.true(kind)
            return self._true.get(kind)
        own = self.predicted(kind, self.setting.by_producer[self.index])
        if own:
            return mean_of(own)
        behind = [self.estimate(kind, c) for c in self.routes.consumers]
        found = [e for e in behind if e is not None]
        return None if not found or len(found) < len(behind) else mean_of(found)


@dataclass(eq=False)
class Job:
    """A batch for one stage.

    Attributes:
        setting: what holds for the batch.
        index: of the stage.
        step: number of the batch, from 0.
        routes: whom the stage exchanges letters with about it.
        inputs: synthetic inputs by interface name, the stage's own copies where it has such.
        teaches: those of them that learn in this stage; others are only used.
        planned: what the plan calls the sources, by the names of the batch's own graph.
        measure: whether predictions are compared with what arrives.
        values, target, context: what the state begins with, of the rows that the stage works on.
        casts: the caller's autocast, for a thread of the stage's own.
        rates: what the caller has changed in the optimisers' settings since the batch before, by
            name, for a thread of the stage's own.
        modes: of the model's modules, for such a thread, too.
        clip_norm: largest norm of the stage's gradients; None for no bound.
        left_out: whether there was no time for it, and others are only told so.
    """

    setting: Setting
    index: int
    step: int
    routes: Routes
    inputs: dict[str, InputSource]
    teaches: Set[str]
    planned: dict[str, str]
    measure: bool
    values: InitVar[Values]
    target: InitVar[Any]
    context: InitVar[Any]
    casts: list[torch.autocast] = field(default_factory=list)
    rates: dict[str, Changes] = field(default_factory=dict)
    modes: Modes = field(default_factory=dict)
    clip_norm: float | None = None
    left_out: bool = False

    def __post_init__(self, values: Values, target: Any, context: Any) -> None:
        self.state = BatchState(dict(values), context, target, self.step, self.step)
        self.answers = ArrivedAnswers(self.setting, self.state, self.index, self.routes)
        self.batch = StageBatch(self.setting, self.index, self.state, self.answers, asks_again=True)

    @property
    def is_locked(self) -> bool:
        """Whether the step ends only when all answers are there."""
        groups = self.batch.sources.groups
        return self.setting.share > 0 or any(s.source.asks.lag == 0 for s in groups)

    @property
    def waits(self) -> bool:
        """Whether a backward is still to come."""
        return bool(self.state.progress.tapes)

    def start(self, received: Values, send: Callable[[Values], None]) -> None:
        """Run forward, ask the sources, and pull back what is known at once.

        Args:
            received: what the producers sent; what is predicted may be missing.
            send: called with the stage's values, as soon as they are known.
        """
        state, locked = self.state, self.setting.share > 0
        state.values.update(received)
        self._predict_inputs()
        names = [n for n in self.batch.stage.outputs if n != "output"]
        self.batch.run(self._delays(), lambda: send({n: state.values[n] for n in names}))
        self.batch.sources.ask_to_learn(self._delays())
        state.note_sent(self.setting)
        if not locked:
            self.batch.advance()

    def drop(self) -> None:
        """Leave the batch out, and let go of it."""
        self.left_out = True
        self.state.values, self.state.context, self.state.target = {}, None, None

    def _predict_inputs(self) -> None:
        model_inputs = tuple(self.state.values[n] for n in self.setting.split.model_inputs)
        for name in self.batch.stage.inputs:
            learns = name in self.teaches
            if name in self.inputs and (self.setting.share == 0 or learns):
                source = self.inputs[name]
                with torch.set_grad_enabled(learns), kept_weights(source):
                    self.state.input_predictions[name] = source.predict(model_inputs)

    def _delays(self) -> dict[int, int]:
        """Others answer late, always; the stage itself where a source of its own waits for that."""
        every = range(len(self.setting.stages))
        if self.setting.share > 0:
            return dict.fromkeys(every, 0)
        late = max((s.source.asks.lag or 0 for s in self.batch.sources.groups), default=0)
        return dict.fromkeys(every, 1) | {self.index: late}

    def learn(self) -> list[tuple[str, Tensor]]:
        """Train every source whose message is there, and the synthetic inputs.

        Returns:
            Losses with their graph, by the plan's name of each source.
        """
        losses = self.batch.sources.learn() + self.state.teach_inputs(self.inputs)
        return [(self.planned[name], loss) for name, loss in losses]

    def see(self, values: Values) -> None:
        """Values that were predicted have come."""
        self.state.values.update(values)
        self._forget_predictions(lambda name: name not in self.teaches)

    def miss(self, producer: int) -> None:
        """Values that were predicted will not come."""
        self._forget_predictions(lambda name: self.routes.needs.get(name) == producer)

    def _forget_predictions(self, which: Callable[[str], bool]) -> None:
        for name in list(filter(which, self.state.input_predictions)):
            del self.state.input_predictions[name]

    def learnt_from(self) -> list[tuple[str, Tensor]]:
        """What sources learn from, with its name."""
        state = self.state
        arrived = state.progress.gradients.items()
        found = [(f"the gradient of interface {n!r}", g) for n, g in arrived if g is not None]
        seen = [n for n in state.input_predictions if n in state.values]
        return found + [(f"the value of interface {n!r}", state.values[n]) for n in seen]
