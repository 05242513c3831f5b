"""Stages of one process, one after the other: a batch through all of them, and the executor.

A batch whose sources all answer at once goes through the emitted training functions, stage after
stage. Where one waits for a message, or a schedule asks for some of the true gradient, every
stage's forward is run first and its backward when what it waits for is there: in the same step, or
in a later one, until when the batch stays under way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..decoupled import Decoupled
from ..errors import DecouplingError, NonFiniteError
from ..reports.steps import InterfaceReport
from .answers import LocalAnswers, added
from .batch_state import BatchState, Setting
from .deferring import Deferral
from .emitted import keep_modes
from .finite import all_finite, finite_flag, refuse, value_places
from .objective import Metrics
from .optimizing import StageOptimizers
from .saving import AllOrNothing
from .stage_batch import StageBatch

Later = Callable[[Tensor | None], Tensor | None]


class Batch:
    """One batch through all stages, which share its state.

    Args:
        setting: what holds for it.
        compares: whether gradients at all interfaces are asked for, whoever learns from them.
    """

    def __init__(self, setting: Setting, compares: bool = True) -> None:
        self.setting, self.state, self.compares = setting, BatchState(), compares
        self.answers = LocalAnswers(setting, self.state)
        every = range(len(setting.stages))
        self.stages = [StageBatch(setting, k, self.state, self.answers) for k in every]

    def begin(self, values: dict[str, Any], context: Any, target: Any, now: int = 0) -> None:
        """Run forward what is to be updated and what that needs, and pull back what is known at
        once; the arguments are as in :class:`BatchState`.
        """
        state, setting = self.state, self.setting
        state.values, state.context, state.target = values, context, target
        state.now = state.started = now
        needed = [self.stages[k] for k in setting.needed]
        for name, source in setting.inputs.items():
            # Of what a stage that runs sends, too: the synthesizer learns from that.
            if any(name in (*s.stage.inputs, *s.stage.outputs) for s in needed):
                seen = tuple(values[n] for n in setting.split.model_inputs)
                state.input_predictions[name] = source.predict(seen)
        if setting.holds:
            self._hold(needed)
        else:
            self._step_through(needed)
        for stage in self.stages if len(setting.active) < len(self.stages) else ():
            stage.sources.ask_to_learn(setting.delays)
        state.note_sent(setting)

    def _step_through(self, needed: list[StageBatch]) -> None:
        """Every source answers at once: the emitted training functions."""
        split = self.setting.split
        parts: dict[nn.Parameter, list[Later]] = {}
        for stage in needed:
            if not stage.is_active:
                stage.run_only()
                continue
            shared = split.shared_in(stage.index)
            several = [shared[n] for k, n in split.reused if k == stage.index]
            reused = {p for p in several if p.requires_grad}
            again = stage.step_repeatably() if reused else None
            if again is None:
                stage.step(self.compares or self.setting.is_heard(stage.index))
            for parameter in shared.values():
                gradient, parameter.grad = parameter.grad, None
                if again is not None and parameter in reused:
                    parts.setdefault(parameter, []).append(functools.partial(again, parameter))
                elif gradient is not None:
                    own = functools.partial(added, more=gradient)
                    parts.setdefault(parameter, []).append(own)
        for parameter, steps in parts.items():  # last stage first, as autograd would
            total = None
            for add in reversed(steps):
                total = add(total)
            parameter.grad = total

    def _hold(self, needed: list[StageBatch]) -> None:
        """Some source waits: forward of all stages first."""
        delays, values = self.setting.delays, self.state.values
        if max(delays.values()) > 0:
            # The caller may write into its tensors before the batch is finished.
            values.update({n: values[n].clone() for n in self.setting.split.model_inputs})
        for stage in needed:
            stage.run(delays)

    def advance(self, now: int) -> None:
        """Pull back, last stage first, everything that waited for what is there now."""
        self.state.now = now
        for stage in reversed(self.stages) if self.state.progress.tapes else ():
            stage.advance()

    def learn(self) -> list[tuple[str, Tensor]]:
        """Losses, with their graph and by name, of every source whose message is there, and of the
        synthetic inputs.
        """
        losses = [pair for stage in self.stages for pair in stage.sources.learn()]
        return losses + self.state.teach_inputs(self.setting.inputs)

    @property
    def is_done(self) -> bool:
        """Whether nothing of this batch is under way any more."""
        progress = self.state.progress
        asked = [s for s in self.setting.served if s.name in self.state.predictions]
        late = [s for s in asked if s.name not in progress.fitted]
        lost = (self.answers.is_lost(s, s.source.asks.learns_from) for s in late)
        return not progress.tapes and all(lost)

    def forget(self) -> None:
        """See :meth:`BatchState.forget`."""
        self.state.forget(self.setting.served)

    def compare(self, step: int) -> dict[str, InterfaceReport]:
        """How near each prediction is to what arrived."""
        return {n: r for stage in self.stages for n, r in stage.sources.compare(step).items()}

    def places(self) -> list[tuple[str, Tensor]]:
        """See :meth:`BatchState.places`."""
        return self.state.places(self.setting.served)


B = TypeVar("B", bound=Batch)


class InTurn(Generic[B]):
    """Executor: every step of time runs a new batch, and what waited for it, to the update.

    A step happens whole or not at all: after an error everything is as it was before.

    Attributes:
        under_way: batches that something is still expected for, oldest first.
        clock: steps of time, with those that only finished batches.
    """

    def __init__(
        self, decoupled: Decoupled, optimizers: StageOptimizers, metrics: Metrics, accumulate: int
    ) -> None:
        self.decoupled, self.optimizers, self.metrics = decoupled, optimizers, metrics
        self.accumulate = accumulate
        self.under_way: list[B] = []
        self.clock = 0
        self._rollbacks: list[AllOrNothing] = []

    def advance(
        self,
        steps: int,
        new: B | None,
        begin: Callable[[], None],
        check: Callable[[Sequence[B]], None] | None = None,
        deferral: Deferral | None = None,
    ) -> tuple[Tensor | None, Callable[[], None]]:
        """One step of time: a new batch, everything that waited until now, and the update.

        Args:
            steps: number of batches before this one.
            new: the new batch, run by ``begin``; None to finish what is under way.
            check: called with all batches before an update; may refuse it.
            deferral: the step before, where this one's check is not looked at yet.

        Returns:
            Whether everything was finite, where that was not looked at; and what undoes the step
            then.

        Raises:
            NonFiniteError: a value or gradient is NaN or infinite.
            SpoiltError: the step before was not finite.
        """
        batches = [*self.under_way, *([] if new is None else [new])]
        progress = [b.state.progress.copy() for b in self.under_way]
        before, restore = self._set_aside(deferral is not None), None
        try:
            with (
                before.step(steps % self.accumulate != 0) as add_held,
                keep_modes(),
                torch.enable_grad(),
            ):
                begin()
                for batch in reversed(batches):
                    batch.advance(self.clock)
                    if batch is new and new.setting.share > 0:
                        self._drop_left_out(new.setting)
                flag = self._learn(batches, steps, before.parameters, deferral)
                add_held()
                if self.metrics.is_due(steps):
                    for batch in batches:
                        self.metrics.found.update(batch.compare(steps))
                    self.metrics.requested = False
                if (steps + (new is not None)) % self.accumulate == 0:
                    if check is not None:
                        check(batches)
                    restore = None if deferral is None else self.optimizers.remember()
                    self.optimizers.step()
        except BaseException as error:
            for batch, known in zip(self.under_way, progress, strict=True):
                batch.state.progress = known
            self._drop_if_spoilt(error, new)
            raise
        self.under_way = [b for b in batches if not b.is_done]
        for batch in self.under_way:
            batch.forget()
        self.clock += 1

        def undo() -> None:
            if restore is not None:
                restore()
            before.put_back()
            self.clock -= 1

        return flag, undo

    def _set_aside(self, deferred: bool) -> AllOrNothing:
        """What puts a step back; with ``deferred`` another one than the last step's."""
        variant = self.decoupled.graphs.variant
        kept = self._rollbacks[-1:] if deferred else []
        known = [r for r in self._rollbacks if r.variant is variant and r not in kept]
        chosen = known[0] if known else AllOrNothing(self.decoupled)
        self._rollbacks = [*kept, chosen]
        return chosen

    def drain(self, steps: int) -> int:
        """See :meth:`dni_fx.Trainer.drain`."""
        sources = self.decoupled.sources.values()
        longest = sum(s.asks.lag or 0 for s in sources) + len(self.decoupled.stages)
        for count in range(longest + 2):
            if not self.under_way:
                return count
            self.advance(steps, None, lambda: None)
        raise DecouplingError(f"{len(self.under_way)} batches wait for messages that do not come")

    def _drop_left_out(self, setting: Setting) -> None:
        """Stages that the schedule left out, where all had to run for the true gradient."""
        stages = self.decoupled.stages
        if len(setting.active) < len(stages):
            kept = {p for k in setting.active for p in stages[k].parameters()}
            for parameter in (p for stage in stages for p in stage.parameters()):
                if parameter not in kept:
                    parameter.grad = None

    def _learn(
        self,
        batches: list[B],
        steps: int,
        parameters: list[nn.Parameter],
        deferral: Deferral | None,
    ) -> Tensor | None:
        """Losses and parameters' gradients, which everything else flows into, must be finite; the
        place is looked for on failure only. With a ``deferral`` whether they are is returned, and
        the step before is looked at.
        """
        losses = [pair for batch in batches for pair in batch.learn()]
        if losses:
            # A failure must leave the graphs of sources whose message came late.
            retain = bool(self.under_way)
            torch.autograd.backward([loss for _, loss in losses], retain_graph=retain)
        known = [b.state.loss for b in batches] + [p.grad for p in parameters]
        regressions = [(n, loss.detach()) for n, loss in losses]
        tensors = [*(t for t in known if t is not None), *(t for _, t in regressions)]
        if deferral is not None:
            flag = finite_flag(tensors)
            deferral.look_back()
            return flag
        if all_finite(tensors):
            return None
        places = [place for b in batches for place in (*value_places(b.state.sent), *b.places())]
        named = self.decoupled.model.named_parameters()
        places += [(f"gradient of parameter {n!r}", p.grad) for n, p in named if p.grad is not None]
        for name, source in self.decoupled.named_learners():
            learnt = [*(loss for n, loss in regressions if n == name)]
            learnt += [p.grad for p in source.parameters() if p.grad is not None]
            places += [(f"the regression of the source at interface {name!r}", t) for t in learnt]
        refuse(places, f"step {steps + 1}", "nothing was updated")
        return None

    def _drop_if_spoilt(self, error: BaseException, new: B | None) -> None:
        """Where what is under way is not finite, no step could be made any more with it."""
        if not isinstance(error, NonFiniteError) or not self.under_way:
            return
        if new is None or all(bool(t.isfinite().all()) for _, t in new.places()):
            count, self.under_way = len(self.under_way), []
            raise NonFiniteError(
                f"{error} The {count} batches under way to late sources were dropped."
            ) from error
