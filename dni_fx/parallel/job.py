"""One batch in one stage that runs beside the others: the kernel, and what it exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reports.steps import InterfaceReport
from ..runtime.batch_state import BatchState, Setting
from ..runtime.stage_batch import StageBatch
from ..sources import InputSource
from ..sources.keeping import kept_weights
from .arrived import ArrivedAnswers
from .routes import Routes

Values = dict[str, Any]


class Job:
    """A batch for one stage.

    Args:
        setting: what holds for the batch.
        index: of the stage.
        step: number of the batch, from 0.
        routes: whom the stage exchanges messages with about it.
        inputs: synthetic inputs by interface name, the stage's own copies where it has such.
        teaches: those of them that learn in this stage; others are only used.
        planned: what the plan calls the sources, by the names of the batch's own graph.

    Attributes:
        values: the model's inputs by name, of the rows that the stage works on.
        context: what sources see besides values.
        target: what the loss takes.
        measure: whether predictions are compared with what arrives.
        casts: the caller's autocast, for a thread of the stage's own.
    """

    def __init__(
        self,
        setting: Setting,
        index: int,
        step: int,
        routes: Routes,
        inputs: dict[str, InputSource],
        teaches: set[str],
        planned: dict[str, str],
    ) -> None:
        self.setting, self.index, self.step = setting, index, step
        self.routes, self.inputs, self.teaches = routes, inputs, teaches
        self.planned = planned
        self.state = BatchState(started=step, now=step)
        self.answers = ArrivedAnswers(setting, self.state, index, routes)
        self.batch = StageBatch(setting, index, self.state, self.answers, asks_again=True)
        self.values: Values = {}
        self.context: Any = None
        self.target: Any = None
        self.measure = False
        self.casts: list[torch.autocast] = []

    @property
    def is_locked(self) -> bool:
        """Whether the step ends only when all answers are there."""
        groups = self.batch.sources.groups
        return self.setting.share > 0 or any(s.source.asks.lag == 0 for s in groups)

    @property
    def waits(self) -> bool:
        """Whether a backward is still to come."""
        return bool(self.state.progress.tapes)

    # ---- the stage runs --------------------------------------------------------------------------

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

    def advance(self, now: int) -> None:
        """Pull back what was late, if what it waits for is there."""
        self.state.now = now
        self.batch.advance()

    def learn(self) -> list[tuple[str, Tensor]]:
        """Train every source whose message is there, and the synthetic inputs.

        Returns:
            Losses with their graph, by the plan's name of each source.
        """
        losses = self.batch.sources.learn() + self.state.teach_inputs(self.inputs)
        return [(self.planned[name], loss) for name, loss in losses]

    # ---- messages --------------------------------------------------------------------------------

    def see(self, values: Values) -> None:
        """Values that were predicted have come."""
        self.state.values.update(values)
        for name in [n for n in self.state.input_predictions if n not in self.teaches]:
            del self.state.input_predictions[name]

    def miss(self, producer: int) -> None:
        """Values that were predicted will not come."""
        needs, predicted = self.routes.needs, self.state.input_predictions
        for name in [n for n in predicted if needs.get(n) == producer]:
            del predicted[name]

    # ---- what is known ---------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop what nothing that is still under way needs."""
        self.state.forget(tuple(self.batch.sources.groups))

    def compare(self) -> dict[str, InterfaceReport]:
        """How near each prediction is to what arrived."""
        return self.batch.sources.compare(self.step)

    def heard_places(self) -> list[tuple[str, Tensor]]:
        """What sources learn from, with its name: they keep averages of it."""
        state = self.state
        arrived = state.progress.gradients
        heard = [
            (f"the gradient of interface {n!r}", g) for n, g in arrived.items() if g is not None
        ]
        seen = [n for n in state.input_predictions if n in state.values]
        return heard + [(f"the value of interface {n!r}", state.values[n]) for n in seen]

    def places(self) -> list[tuple[str, Tensor]]:
        """What must be finite besides values, with its name."""
        return self.state.places(tuple(self.batch.sources.groups))
