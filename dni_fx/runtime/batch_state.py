"""What holds for one batch in all of its stages, and what is known of it so far."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..graphs.graphs import Graphs
from ..passes.cut.emission import StageFunctions
from ..passes.cut.splitting import Split, StageGraph
from ..schedules import Mode
from ..sources import InputSource, Prediction, Served
from .loss_reach import CheckedLoss
from .objective import Loss, Objective
from .tape import Rerun, Tape


@dataclass(frozen=True)
class Setting:
    """What is fixed before a batch is run: the graph that fits it, its sources, its loss.

    Attributes:
        split: the batch's own graph; another may be active when the batch is finished.
        functions: the emitted functions of every stage.
        served: the sources that are asked; none in exact mode.
        inputs: synthetic inputs by interface name.
        loss: the loss that is pulled back.
        plain_loss: the user's own loss, asked for one value per sample where a source wants that.
        share: how much of the true gradient is used; above 0 the step is locked.
        active: stages that are updated.
    """

    split: Split
    functions: tuple[StageFunctions, ...]
    served: tuple[Served, ...]
    inputs: dict[str, InputSource]
    loss: Loss
    plain_loss: Loss
    share: float
    active: frozenset[int]

    @classmethod
    def of(
        cls,
        graphs: Graphs,
        objective: Objective,
        mode: Mode,
        ask: bool = True,
        loss: Loss | None = None,
        here: Collection[int] | None = None,
    ) -> Setting:
        """For a batch whose graph is active. Exact mode asks nobody, and takes the true gradients.

        Args:
            graphs: of the model.
            objective: the loss.
            mode: what the schedule says of the step.
            ask: whether sources are asked at all.
            loss: what is pulled back; by default the objective's scaled loss.
            here: stages that run in turn with the last one; all by default.

        Raises:
            PlanMismatchError: the graph cannot be cut, or lacks a source.
        """
        functions, split = graphs.functions(), graphs.variant.split
        exact = any(s.asks.exact for s in graphs.sources_by_name().values())
        every = range(len(split.stages))
        return cls(
            split=split,
            functions=functions,
            served=graphs.served() if ask and not exact else (),
            inputs=graphs.find_inputs(),
            loss=CheckedLoss(loss or objective.scaled, graphs, here),
            plain_loss=objective.loss,
            share=1.0 if exact else mode.true_share,
            active=frozenset(every if mode.active is None else mode.active),
        )

    @classmethod
    def unlocked(
        cls, graphs: Graphs, objective: Objective, served: tuple[Served, ...], whole: bool = True
    ) -> Setting:
        """For a batch that updates all stages, with nothing of the true gradient.

        Args:
            graphs, objective: as for :meth:`of`.
            served: the sources that are asked.
            whole: whether the graph must have all cuts of the plan.

        Raises:
            PlanMismatchError: it has not.
        """
        split = graphs.variant.split
        return cls(
            split=split,
            functions=graphs.functions(whole),
            served=served,
            inputs=graphs.find_inputs(),
            loss=objective.scaled,
            plain_loss=objective.loss,
            share=0.0,
            active=frozenset(range(len(split.stages))),
        )

    @property
    def stages(self) -> tuple[StageGraph, ...]:
        """The stages' graphs, in program order."""
        return self.split.stages

    @property
    def last(self) -> int:
        """The stage that holds the model's output."""
        return len(self.split.stages) - 1

    @cached_property
    def by_producer(self) -> dict[int, list[Served]]:
        """The sources that each stage asks."""
        return {k: [s for s in self.served if s.producer == k] for k in range(len(self.stages))}

    @cached_property
    def wants_error(self) -> bool:
        """Whether a source asks for the error of the model's output."""
        asked = [s.source.asks.hears for s in self.served]
        return any("error" in kinds for kinds in asked)

    @cached_property
    def divided(self) -> list[Served]:
        """Sources with a part for each of several consumers."""
        return [s for s in self.served if s.by_consumer]

    @cached_property
    def carried(self) -> list[str]:
        """Names of the values that carry a gradient across."""
        return [i.name for i in self.split.interfaces]

    @cached_property
    def makers(self) -> dict[str, int]:
        """The stage that makes each value."""
        return {n: s.index for s in self.stages for n in s.outputs}


class Settings:
    """The newest setting, kept as long as graph, mode and loss are the same.

    Args:
        graphs, objective, loss, here: as for :meth:`Setting.of`.
    """

    def __init__(
        self,
        graphs: Graphs,
        objective: Objective,
        loss: Loss | None = None,
        here: Collection[int] | None = None,
    ) -> None:
        self.graphs, self.objective, self.loss, self.here = graphs, objective, loss, here
        self._newest: tuple[Any, Mode, Loss, Setting] | None = None

    def of(self, mode: Mode) -> Setting:
        """For a batch whose graph is active."""
        variant, loss = self.graphs.variant, self.objective.loss
        if self._newest is not None:
            graph, known, same, setting = self._newest
            if graph is variant and known == mode and same is loss:
                return setting
        setting = Setting.of(self.graphs, self.objective, mode, loss=self.loss, here=self.here)
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
    """

    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    measured: set[str] = field(default_factory=set)
    tapes: dict[int, Tape | Rerun] = field(default_factory=dict)
    early: dict[int, dict[str, Tensor | None]] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)

    def copy(self) -> Progress:
        """A copy that later changes leave alone; tensors are shared."""
        return Progress(
            dict(self.gradients),
            dict(self.parts),
            dict(self.finished),
            set(self.fitted),
            set(self.measured),
            dict(self.tapes),
            dict(self.early),
            set(self.heard),
        )


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

    def known(self) -> dict[str, Any]:
        """Values, or what was predicted for them where they were not computed."""
        return {n: p.value for n, p in self.input_predictions.items()} | self.values

    def teach_inputs(self, inputs: dict[str, InputSource]) -> list[tuple[str, Tensor]]:
        """Train the synthetic inputs whose real value is there.

        Args:
            inputs: by interface name.

        Returns:
            Losses with their graph, by ``name@input``.
        """
        losses: list[tuple[str, Tensor]] = []
        for name in [n for n in self.input_predictions if n in self.values]:
            loss = inputs[name].fit(self.input_predictions.pop(name), self.values[name])
            losses += [] if loss is None else [(f"{name}@input", loss)]
        return losses

    def note_sent(self, setting: Setting) -> None:
        """Remember the values that carry a gradient, predicted ones where no others are known."""
        known = self.known() if self.input_predictions else self.values
        self.sent = {n: known[n] for n in setting.carried if n in known}

    def note_parts(
        self, setting: Setting, stage: int, found: dict[str, Any], before: dict[str, Any]
    ) -> None:
        """What one consumer adds to the gradients of its inputs, for sources with a part for it.

        Args:
            setting: what holds for the batch.
            stage: the consumer.
            found: gradients of its inputs.
            before: what later stages had made of them.
        """
        parts = self.progress.parts
        for group in setting.divided:
            for name in group.names if stage in group.consumers else ():
                gradient, later = found.get(name), before.get(name)
                if gradient is not None:
                    part = gradient if later is None else gradient - later
                    known = parts.get((name, stage))
                    parts[name, stage] = part if known is None else known + part

    def forget(self, groups: tuple[Served, ...]) -> None:
        """Drop what nothing that is still under way needs.

        Args:
            groups: the sources that the batch's stages ask.
        """
        progress = self.progress
        waiting = [
            s for s in groups if s.name not in progress.fitted or s.producer in progress.tapes
        ]
        needed = {n for s in waiting for n in s.names}
        asked = {s.name for s in waiting}
        self.values, self.sent = {}, {n: v for n, v in self.sent.items() if n in needed}
        progress.gradients = {n: g for n, g in progress.gradients.items() if n in needed}
        self.predictions = {n: p for n, p in self.predictions.items() if n in asked}
        self.output = self.target = None

    def snapshot(self) -> Callable[[], None]:
        """Remember where the batch stands; the result goes back there."""
        kept = self.progress.copy()

        def restore() -> None:
            self.progress = kept

        return restore

    def places(self, groups: tuple[Served, ...]) -> list[tuple[str, Tensor]]:
        """What must be finite besides values, with its name; the first in program order first.

        Args:
            groups: the sources that the batch's stages ask.
        """
        places: list[tuple[str, Tensor]] = []
        for group in groups:
            prediction = self.predictions.get(group.name)
            if prediction is not None and prediction.gradients is not None:
                pairs = zip(group.names, prediction.gradients, strict=True)
                places += [(f"the predicted gradient of interface {n!r}", g) for n, g in pairs]
        for name, predicted in self.input_predictions.items():
            places.append((f"the synthetic input at interface {name!r}", predicted.value))
        if self.loss is not None:
            places.append(("the loss", self.loss))
        for name, gradient in reversed(list(self.progress.gradients.items())):
            if gradient is not None:
                places.append((f"the gradient of interface {name!r}", gradient))
        return places
