"""What holds for one batch in all of its stages, and what is known of it so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..graphs.graphs import Graphs
from ..passes.cut.emission import StageFunctions
from ..passes.cut.expecting import Expected
from ..passes.cut.splitting import Split, StageGraph
from ..passes.trace.state import Changes
from ..schedules import Mode
from ..sources import InputSource, Prediction, Served
from .delays import Ahead, find_delays
from .loss_reach import CheckedLoss
from .objective import Loss, Objective
from .tape import Rerun, Tape

_DECOUPLED = Mode()  # all stages, nothing of the true gradient


@dataclass(frozen=True)
class Setting:
    """What is fixed before a batch is run: the graph that fits it, its sources, its loss.

    Attributes:
        split: the batch's own graph; another may be active when the batch is finished.
        functions: the emitted functions of every stage.
        served: the sources that are asked; none in exact mode.
        inputs: synthetic inputs by interface name.
        loss: the loss that is pulled back.
        objective: with the user's own loss, asked for one value per sample where a source wants it.
        share: how much of the true gradient is used; above 0 the step is locked.
        active: stages that are updated.
        expected: where gradients must arrive in each stage once all that it sends has one.
        changes: what a call of the model does besides returning something.
        ahead: moves a stage's weights to where its late gradient will meet them; None where nobody
            asks for that.
    """

    split: Split
    functions: tuple[StageFunctions, ...]
    served: tuple[Served, ...]
    inputs: dict[str, InputSource]
    loss: Loss
    objective: Objective
    share: float
    active: frozenset[int]
    expected: tuple[Expected, ...]
    changes: Changes
    ahead: Ahead | None = None

    @classmethod
    def of(
        cls,
        graphs: Graphs,
        objective: Objective,
        mode: Mode = _DECOUPLED,
        served: tuple[Served, ...] | None = None,
        loss: Loss | None = None,
        all_cuts: bool = True,
        here: Collection[int] | None = None,
        ahead: Ahead | None = None,
    ) -> Setting:
        """For a batch whose graph is active.

        Args:
            graphs, objective, mode: the model's, the loss, and what the schedule says of the step.
            served: by default all sources; in exact mode none, and with the true gradients.
            loss: by default the objective's scaled loss.
            all_cuts: whether the graph must have those of the plan.
            here: stages that run in turn with the last one; all by default.
            ahead: as the attribute.

        Raises:
            PlanMismatchError: it has not, or lacks a source.
        """
        functions, split, share = graphs.functions(all_cuts), graphs.variant.split, mode.true_share
        if served is None:
            exact = any(s.asks.exact for s in graphs.sources_by_name().values())
            served, share = ((), 1.0) if exact else (graphs.served(), share)
        every = range(len(split.stages))
        return cls(
            split=split,
            functions=functions,
            served=served,
            inputs=graphs.find_inputs(),
            loss=CheckedLoss(loss or objective.scaled, graphs, here),
            objective=objective,
            share=share,
            active=frozenset(every if mode.active is None else mode.active),
            expected=graphs.variant.expected,
            changes=graphs.variant.trace.changes,
            ahead=ahead,
        )

    @property
    def stages(self) -> tuple[StageGraph, ...]:
        """The stages' graphs, in program order."""
        return self.split.stages

    @cached_property
    def last(self) -> int:
        """The stage that holds the model's output."""
        return len(self.stages) - 1

    @cached_property
    def by_producer(self) -> dict[int, list[Served]]:
        """The sources that each stage asks."""
        return {k: [s for s in self.served if s.producer == k] for k in range(len(self.stages))}

    @cached_property
    def seen_besides(self) -> dict[int, list[str]]:
        """By stage, what sources see of the model's inputs that the stage does not take."""
        found: dict[int, list[str]] = {}
        for group in self.served:
            index, whose = group.producer, group.source.asks.inputs
            names = [] if whose is None else self.split.seen_by(index, whose)
            known = (*self.stages[index].inputs, *found.get(index, ()))
            found[index] = [*found.get(index, ()), *(n for n in names if n not in known)]
        return found

    @cached_property
    def wants_error(self) -> bool:
        """Whether a source asks for the error of the model's output."""
        return any("error" in s.source.asks.hears for s in self.served)

    @cached_property
    def divided(self) -> list[Served]:
        """Sources with a part for each of several consumers."""
        return [s for s in self.served if s.by_consumer]

    def is_heard(self, index: int) -> bool:
        """Whether somebody learns from what flows back to a stage's inputs, or its parameters might
        get other gradients without it.
        """
        expected = self.expected[index]
        # Else nothing in the stage might have a gradient.
        trained = any(p.requires_grad for p in expected.parameters.values())
        return index in self._heard or not (expected.is_plain and trained)

    @cached_property
    def _heard(self) -> frozenset[int]:
        listening = [s for s in self.served if "gradient" in s.source.asks.hears or s.by_consumer]
        if self.inputs:
            return frozenset(range(len(self.stages)))
        return frozenset(c for s in listening for c in s.consumers)

    @cached_property
    def makers(self) -> dict[str, int]:
        """The stage that makes each value."""
        return {n: s.index for s in self.stages for n in s.outputs}

    # ---- of stages that run one after the other --------------------------------------------------

    @cached_property
    def needed(self) -> list[int]:
        """Stages that are updated, or whose values are needed by such a one; with a true gradient
        all of them.
        """
        pending = list(range(len(self.stages)) if self.share > 0 else self.active)
        needed: set[int] = set()
        while pending:
            index = pending.pop()
            if index not in needed:
                needed.add(index)
                names = [n for n in self.stages[index].inputs if n not in self.inputs]
                pending += [self.makers[n] for n in names if n in self.makers]
        return sorted(needed)

    @cached_property
    def holds(self) -> bool:
        """Whether some stage's backward waits for others; else every source answers at once."""
        asked = [s.source.asks for s in self.served]
        waits = any(asks.wait is not None or "error" in asks.learns_from for asks in asked)
        return waits or self.share > 0

    @cached_property
    def delays(self) -> dict[int, int]:
        """In how many steps each stage will have pulled back the batch."""
        return find_delays(self.served if self.share == 0 else (), len(self.stages))


class Settings:
    """The newest setting, kept as long as graph, mode and loss are the same.

    Args:
        graphs, here: as for :meth:`Setting.of`.
        objective: the trainer's; a setting keeps what it is then.
        scaled: the loss that is pulled back, of an objective; the scaled one by default.
        is_served: which of the sources are asked; by default as there.
        ahead: as for :class:`Setting`.
    """

    def __init__(
        self,
        graphs: Graphs,
        objective: Objective,
        scaled: Callable[[Objective], Loss] | None = None,
        here: Collection[int] | None = None,
        is_served: Callable[[Served], bool] | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self.graphs, self.objective, self.scaled, self.here = graphs, objective, scaled, here
        self.ahead = ahead
        self.is_served = is_served
        self._newest: tuple[Any, Mode, Loss, Setting] | None = None

    def of(self, mode: Mode = _DECOUPLED) -> Setting:
        """For a batch whose graph is active."""
        variant, loss = self.graphs.variant, self.objective.loss
        if self._newest is not None:
            graph, known, same, setting = self._newest
            if graph is variant and known == mode and same is loss:
                return setting
        posted = replace(self.objective)  # another loss is none of batches under way
        scaled = None if self.scaled is None else self.scaled(posted)
        asked = self.is_served and tuple(filter(self.is_served, self.graphs.served()))
        options: dict[str, Any] = {"loss": scaled, "here": self.here, "ahead": self.ahead}
        setting = Setting.of(self.graphs, posted, mode, asked, **options)
        self._newest = (variant, mode, loss, setting)
        return setting


@dataclass
class Progress:
    """How far a batch has come: what a failed step must put back.

    Attributes:
        gradients: what has flowed back to each interface.
        parts: of one consumer alone, where it has a source of its own.
        finished: the step in which each stage was pulled back.
        fitted: sources that have learnt from the batch.
        measured: sources whose predictions were compared.
        tapes: stages whose backward is still to come.
        early: input gradients of stages that have pulled back a first part.
        heard: what has left the graph and was answered.
        copies: gradients of what autocast made of shared parameters, by the node that made it.
    """

    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    measured: set[str] = field(default_factory=set)
    tapes: dict[int, Tape | Rerun] = field(default_factory=dict)
    early: dict[int, dict[str, Tensor | None]] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    copies: dict[Any, Tensor] = field(default_factory=dict)

    def copy(self) -> Progress:
        """A copy that later changes leave alone; tensors are shared."""
        return Progress(**{name: copy.copy(value) for name, value in vars(self).items()})


@dataclass
class BatchState:
    """What is known of one batch: written by the stages that run it, or by what others send.

    Attributes:
        values: by name: the model's inputs, and what stages have sent, detached.
        context: what sources see besides values.
        target: what the loss takes.
        started: the step in which the batch came.
        now: the step that it is.
        sent: the values that carry a gradient.
        predictions: what sources said, by the first interface of each.
        input_predictions: what synthetic inputs said, until they have learnt.
        progress: how far the batch has come.
        loss: detached, once the last stage has run; as it is pulled back.
        output: the model's, detached.
        error: the loss's gradient for the output's logits, where a source asks for it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    context: Any = None
    target: Any = None
    started: int = 0
    now: int = 0
    sent: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    input_predictions: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    loss: Tensor | None = None
    output: Any = None
    error: Tensor | None = None

    def predicted_inputs(self, setting: Setting) -> dict[str, Any]:
        """What stages take instead of values; in a locked step predictions only learn."""
        given = {} if setting.share > 0 else self.input_predictions
        return {n: p.value for n, p in given.items()}

    def known(self) -> dict[str, Any]:
        """Values, or what was predicted for them where they were not computed."""
        return {n: p.value for n, p in self.input_predictions.items()} | self.values

    def teach_inputs(self, inputs: dict[str, InputSource]) -> list[tuple[str, Tensor]]:
        """Losses of the synthetic inputs whose real value is there, with their graph, by
        ``name@input``.
        """
        seen = [n for n in self.input_predictions if n in self.values]
        pairs = [(n, self.input_predictions.pop(n)) for n in seen]
        losses = [(f"{n}@input", inputs[n].fit(p, self.values[n])) for n, p in pairs]
        return [(n, loss) for n, loss in losses if loss is not None]

    def note_sent(self, setting: Setting) -> None:
        """Remember the values that carry a gradient, predicted ones where no others are known."""
        known, carried = self.known(), [i.name for i in setting.split.interfaces]
        self.sent = {n: known[n] for n in carried if n in known}

    def forget(self, groups: Sequence[Served]) -> None:
        """Drop what nothing that is still under way needs, of ``groups`` as of all others."""
        progress = self.progress
        done = progress.fitted - {s.name for s in groups if s.producer in progress.tapes}
        asked = {s.name for s in groups} - done
        needed = {n for s in groups if s.name in asked for n in s.names}
        self.values, self.sent = {}, {n: v for n, v in self.sent.items() if n in needed}
        progress.gradients = {n: g for n, g in progress.gradients.items() if n in needed}
        self.predictions = {n: p for n, p in self.predictions.items() if n in asked}
        self.output = self.target = None

    def places(self, groups: Sequence[Served]) -> list[tuple[str, Tensor]]:
        """What must be finite besides values, with its name, the first in program order first; of
        the sources that are asked, ``groups``.
        """
        places: list[tuple[str, Tensor | None]] = []
        for group in groups:
            prediction = self.predictions.get(group.name)
            pairs = zip(group.names, (prediction and prediction.gradients) or (), strict=False)
            places += [(f"the predicted gradient of interface {n!r}", g) for n, g in pairs]
        inputs, arrived = self.input_predictions.items(), reversed(self.progress.gradients.items())
        places += [(f"the synthetic input at interface {n!r}", p.value) for n, p in inputs]
        places.append(("the loss", self.loss))
        places += [(f"the gradient of interface {n!r}", g) for n, g in arrived]
        return [(name, tensor) for name, tensor in places if tensor is not None]
