"""One batch in one stage that runs beside the others: the kernel, and what it exchanges."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.batch_state import BatchState, Setting
from ..runtime.stage_batch import StageBatch
from ..sources import InputSource
from ..sources.keeping import kept_weights
from .arrived import ArrivedAnswers, Routes

Values = dict[str, Any]


@dataclass(eq=False)
class Job:
    """A batch for one stage.

    Attributes:
        setting: what holds for the batch.
        index: of the stage.
        step: number of the batch, from 0.
        routes: whom the stage exchanges messages with about it.
        inputs: synthetic inputs by interface name, the stage's own copies where it has such.
        teaches: those of them that learn in this stage; others are only used.
        planned: what the plan calls the sources, by the names of the batch's own graph.
        measure: whether predictions are compared with what arrives.
        values: the model's inputs by name, of the rows that the stage works on.
        target: what the loss takes.
        context: what sources see besides values.
        casts: the caller's autocast, for a thread of the stage's own.
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
    values: Values
    target: Any
    context: Any
    casts: list[torch.autocast] = field(default_factory=list)
    left_out: bool = False

    def __post_init__(self) -> None:
        self.state = BatchState(started=self.step, now=self.step)
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
        state.values = {n: self.values[n] for n in self.setting.split.model_inputs} | received
        state.context, state.target = self.context, self.target
        self.drop()  # the state has them, and forgets them in time
        self._predict_inputs()
        names = [n for n in self.batch.stage.outputs if n != "output"]
        self.batch.run(self._delays(), lambda: send({n: state.values[n] for n in names}))
        self.batch.sources.ask_to_learn(self._delays())
        state.note_sent(self.setting)
        if not locked:
            self.batch.advance()

    def drop(self) -> None:
        """Let go of the batch: it is run, or left out."""
        self.values, self.context, self.target = {}, None, None

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
