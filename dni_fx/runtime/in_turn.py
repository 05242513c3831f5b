"""One batch through all stages: values, predictions, gradients, and the messages that sources learn
from.

A batch whose sources all answer at once goes through the emitted training functions, stage after
stage. Where one waits for a message, or a schedule asks for some of the true gradient, every
stage's forward is run first and its backward when what it waits for is there: in the same step, or
in a later one, until when the batch stays under way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.cut.splitting import StageGraph
from ..reports.steps import InterfaceReport, compare
from ..schedules import Mode
from ..sources import Each, Prediction, Served, awaited_kinds, message_kinds, mix
from .answers import Messages, logits_of
from .emitted import StepResult, detached, evaluate, kept_weights, pull_back
from .tape import Rerun, Tape

Loss = Callable[[Any, Any], torch.Tensor]


class Run:
    """What happens to one batch.

    Args:
        decoupled: the model, with the graph that fits the batch active.
        loss: the loss that is pulled back.
        mode: how much of the true gradient is used, and which stages are updated.
        plain_loss: the user's own loss, asked for one value per sample where a source wants that.
        ask: whether sources are asked at all; exact mode and measuring need none.
    """

    _progress: tuple[str, ...] = (
        "gradients",
        "parts",
        "finished",
        "fitted",
        "measured",
        "tapes",
        "early",
    )

    def __init__(
        self,
        decoupled: Decoupled,
        loss: Loss,
        mode: Mode | None = None,
        plain_loss: Loss | None = None,
        ask: bool = True,
    ) -> None:
        self.functions = decoupled.functions()
        self.split = decoupled.graphs.variant.split
        self.stages = (
            self.split.stages
        )  # the batch's own graph: another may be active when it is finished
        self.loss_function, self.plain_loss = loss, plain_loss or loss
        self.share = 0.0 if mode is None else mode.true_share
        every = range(len(self.stages))
        self.active = set(every if mode is None or mode.active is None else mode.active)
        self.served = decoupled.served() if ask else ()
        self.wants_error = any(
            "error" in (*message_kinds(s.source), *awaited_kinds(s.source)) for s in self.served
        )
        self.divided = [
            s for s in self.served if isinstance(s.source, Each) and len(s.consumers) > 1
        ]
        self.by_producer = {k: [s for s in self.served if s.producer == k] for k in every}
        self.carried = [i.name for i in self.split.interfaces]
        self.values: dict[str, Any] = {}
        self.sent: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor | None] = {}
        self.parts: dict[
            tuple[str, int], torch.Tensor
        ] = {}  # of one consumer alone, where it has its own source
        self.predictions: dict[str, Prediction] = {}
        self.finished: dict[int, int] = {}
        self.fitted: set[str] = set()
        self.measured: set[str] = set()
        self.tapes: dict[int, Tape | Rerun] = {}
        self.early: dict[int, dict[str, torch.Tensor | None]] = {}
        self.inputs = decoupled.find_inputs()
        self.input_predictions: dict[str, Any] = {}
        self.loss: torch.Tensor | None = None
        self.output: Any = None
        self.error: torch.Tensor | None = None
        self.messages = Messages(self)

    # ---- the batch arrives -----------------------------------------------------------------------

    def begin(self, values: dict[str, Any], context: Any, target: Any, now: int = 0) -> None:
        """Run forward what is to be updated and what that needs, and pull back what is known at
        once.
        """
        self.values, self.context, self.target = values, context, target
        self.now = self.started = now
        self.needed = self._find_needed()
        self._predict_inputs()
        waits = any(
            s.source.lag is not None or "error" in message_kinds(s.source) for s in self.served
        )
        if waits or self.share > 0:
            self._hold()
        else:
            self._step_through()
        known = self._known()
        self.sent = {n: known[n] for n in self.carried if n in known}

    def _find_needed(self) -> set[int]:
        """Stages that are updated, or whose values are needed by such a one; with a true gradient
        all of them.
        """
        if self.share > 0:
            return set(range(len(self.stages)))
        producers = {n: s.index for s in self.stages for n in s.outputs}
        needed: set[int] = set()
        pending = sorted(self.active)
        while pending:
            index = pending.pop()
            if index not in needed:
                needed.add(index)
                names = [
                    n for n in self.stages[index].inputs if n not in self.inputs and n in producers
                ]
                pending += [producers[n] for n in names]
        return needed

    def _predict_inputs(self) -> None:
        """Of what a stage that runs receives, and of what it sends, so that the synthesizer learns
        from that.
        """
        model_inputs = tuple(self.values[n] for n in self.split.model_inputs)
        for name, source in self.inputs.items():
            if any(name in (*self.stages[k].inputs, *self.stages[k].outputs) for k in self.needed):
                self.input_predictions[name] = source.predict(model_inputs)

    def _inputs_of(self, stage: StageGraph) -> dict[str, Any]:
        predicted = self.input_predictions if self.share == 0 else {}  # else they only learn
        for name in stage.inputs:
            if (
                name in predicted
                and name in self.values
                and predicted[name].value.shape != self.values[name].shape
            ):
                raise DecouplingError(
                    f"the synthetic input at {name!r} has shape "
                    f"{tuple(predicted[name].value.shape)}, but the value that was to be predicted "
                    f"has {tuple(self.values[name].shape)}: decouple on such examples, or leave "
                    "this interface out of inputs="
                )
        return {n: predicted[n].value if n in predicted else self.values[n] for n in stage.inputs}

    def _known(self) -> dict[str, Any]:
        """Values, or what was predicted for them where they were not computed."""
        return {n: p.value for n, p in self.input_predictions.items()} | self.values

    def _run_only(self, stage: StageGraph) -> None:
        """Forward without a graph: the stage is not updated, or is run again later."""
        with torch.no_grad():
            results = stage.module(*self._inputs_of(stage).values())
        if stage is self.stages[-1]:
            self.output = detached(results)
        else:
            self.values.update(zip(stage.outputs, map(detached, results), strict=True))

    # ---- every source answers at once: the emitted training functions ----------------------------

    def _step_through(self) -> None:
        parts: dict[nn.Parameter, list[Callable[[torch.Tensor | None], torch.Tensor | None]]] = {}
        for stage in self.stages:
            if stage.index not in self.needed:
                continue
            if stage.index not in self.active:
                self._run_only(stage)
                continue
            several = [
                self.split.shared_in(stage.index)[n]
                for k, n in self.split.reused
                if k == stage.index
            ]
            reused = [p for p in several if p.requires_grad]
            inputs = self._inputs_of(stage)
            if reused:
                result, again = self._step_twice(stage, inputs)
            else:
                result, again = self._step(stage, inputs), None
            self.values.update(result.outputs)
            self._note_parts(stage.index, result.input_gradients, {})
            for name, gradient in result.input_gradients.items():
                arrived = self.gradients.get(name)
                if gradient is not None:
                    self.gradients[name] = gradient if arrived is None else arrived + gradient
            self.predictions.update(result.predictions)
            self.finished[stage.index] = self.now
            for parameter in self.split.shared_in(stage.index).values():
                gradient, parameter.grad = parameter.grad, None
                if again is not None and any(parameter is p for p in reused):
                    parts.setdefault(parameter, []).append(functools.partial(again, parameter))
                elif gradient is not None:
                    parts.setdefault(parameter, []).append(functools.partial(_add, gradient))
            if stage is self.stages[-1]:
                self.loss, self.output = result.loss, result.outputs["output"]
        self._ask_to_learn(dict.fromkeys(range(len(self.stages)), 0))
        for parameter, steps in parts.items():  # last stage first, as autograd would
            total = None
            for add in reversed(steps):
                total = add(total)
            parameter.grad = total

    def _ask_to_learn(self, delays: dict[int, int]) -> None:
        """Sources whose own stage is left out, but whose target came: they learn whenever all
        consumers run.
        """
        for group in self.served:
            hear = "gradient" in message_kinds(group.source) and all(
                c in self.active for c in group.consumers
            )
            if hear and group.producer not in self.active and group.name not in self.predictions:
                late = any(delays[c] > 0 for c in group.consumers)
                with kept_weights(group.source) if late else contextlib.nullcontext():
                    self.predictions[group.name] = self._ask(group, self._known())

    def _step(self, stage: StageGraph, inputs: dict[str, Any]) -> StepResult:
        with self._named(stage):
            return self.functions[stage.index].step(
                inputs, self.context, self.loss_function, self.target
            )

    def _step_twice(
        self, stage: StageGraph, inputs: dict[str, Any]
    ) -> tuple[StepResult, Callable[..., Any]]:
        """The stage's step from its halves, keeping the graph for parameters that the stage and
        later ones share.

        Autograd adds the partial gradients of every use in one chain, last use first. A stage with
        several uses can only continue that chain once the later stages' sum is known, so for these
        parameters its pull-back is repeated.
        """
        outputs, leaves, _entries = self.functions[stage.index].forward(inputs)
        sent = {n: o.detach() if isinstance(o, torch.Tensor) else o for n, o in outputs.items()}
        predictions = {s.name: self._ask(s, sent) for s in self.by_producer[stage.index]}
        given = {
            n: g
            for s in self.by_producer[stage.index]
            for n, g in zip(s.names, predictions[s.name].gradients or (), strict=True)
        }
        roots = [outputs[n] for n in given]
        gradients: list[torch.Tensor | None] = list(given.values())
        pull_back(roots, gradients, retain_graph=True)

        def again(parameter: nn.Parameter, later: torch.Tensor | None) -> torch.Tensor | None:
            parameter.grad = None
            pull_back(
                [*roots, parameter], [*gradients, later], retain_graph=True, inputs=[parameter]
            )
            total, parameter.grad = parameter.grad, None
            return total

        return StepResult(
            sent, {n: leaf.gradient() for n, leaf in leaves.items()}, predictions
        ), again

    # ---- some source waits: forward of all stages first ------------------------------------------

    def _hold(self) -> None:
        delays = self._delays()
        if (
            max(delays.values()) > 0
        ):  # the caller may write into its tensors before the batch is finished
            self.values.update({n: self.values[n].clone() for n in self.split.model_inputs})
        for stage in self.stages:
            if stage.index in self.needed:
                self._hold_stage(stage, delays)
        self._ask_to_learn(delays)

    def _hold_stage(self, stage: StageGraph, delays: dict[int, int]) -> None:
        index = stage.index
        if index not in self.active and self.share == 0:
            self._run_only(stage)
            return
        inputs, last = self._inputs_of(stage), stage is self.stages[-1]
        groups = self.by_producer[index]
        late = delays[index] > 0
        rerun = late and all(s.source.recompute for s in groups if s.source.lag is not None)
        early = not last and self._is_early(groups)
        kept = Rerun.of(stage.module, inputs) if rerun else None
        tape = None
        if rerun and not early:
            self._run_only(stage)
        else:
            with kept_weights(stage.module) if late and not rerun else contextlib.nullcontext():
                tape = Tape(*self.functions[index].forward(inputs))
            if not last:
                self.values.update({n: detached(v) for n, v in tape.outputs.items()})
        if not last:
            self._forwarded()
        for group in groups:
            with (
                kept_weights(group.source)
                if self._hears_late(group, delays)
                else contextlib.nullcontext()
            ):
                self.predictions[group.name] = self._ask(group, self.values)
        if last:
            assert tape is not None
            self._evaluate(tape)
            self._pull_back(index, tape, {"loss": torch.ones_like(tape.outputs["loss"])})
        elif early:
            assert tape is not None
            given = {n: g for s in groups for n, g in zip(s.names, self._predicted(s), strict=True)}
            complete = self.answers_at_once(index)
            self._pull_back(
                index, tape, given, retain=kept is None and not complete, complete=complete
            )
            if not complete:
                self.tapes[index] = kept or tape
        else:
            self.tapes[index] = kept or tape  # type: ignore[assignment]

    @staticmethod
    def _hears_late(group: Served, delays: dict[int, int]) -> bool:
        """Whether a source may be updated before the message about its prediction comes."""
        return "gradient" in message_kinds(group.source) and any(
            delays[c] > 0 for c in group.consumers
        )

    def _forwarded(self) -> None:
        """A stage's values are there."""

    def _is_early(self, groups: list[Served]) -> bool:
        """Whether the stage pulls something back before any message is there."""
        at_once = all(s.source.lag is None or s.source.corrects for s in groups)
        return self.share == 0 and bool(groups) and at_once

    def answers_at_once(self, index: int) -> bool:
        """Whether all that a stage pulls back is predicted, and nothing comes late."""
        groups = self.by_producer[index]
        return bool(groups) and all(s.source.lag is None for s in groups)

    def _delays(self) -> dict[int, int]:
        """In how many steps each stage will have pulled back this batch."""
        delays = {len(self.stages) - 1: 0}
        for stage in reversed(self.stages[:-1]):
            waiting = [s for s in self.by_producer[stage.index] if s.source.lag is not None]
            delays[stage.index] = (
                0 if self.share > 0 else max((self._delay(s, delays) for s in waiting), default=0)
            )
        return delays

    @staticmethod
    def _delay(group: Served, delays: dict[int, int]) -> int:
        """In how many steps a source that waits will be done."""
        waits = "gradient" in awaited_kinds(group.source)
        return (group.source.lag or 0) + (max(delays[c] for c in group.consumers) if waits else 0)

    def _ask(self, group: Served, values: dict[str, Any]) -> Prediction:
        with self._named(self.stages[group.producer]):
            prediction: Prediction = group.source(
                tuple(values[n] for n in group.names), self.context
            )
        return prediction

    def _predicted(self, group: Served) -> tuple[torch.Tensor, ...]:
        gradients = self.predictions[group.name].gradients
        if gradients is None:
            raise DecouplingError(
                f"the source at {group.name!r} ({type(group.source).__name__}) predicted no "
                "gradients: only a source with a lag may do without"
            )
        return gradients

    def _evaluate(self, tape: Tape) -> None:
        output = tape.outputs["output"]
        loss = evaluate(self.loss_function, output, self.target)
        if self.wants_error:
            logits = logits_of(output)
            if logits is None:
                raise DecouplingError(
                    "a source asks for the error of the model's output, which must be a tensor or "
                    f"have one called 'logits', but is a {type(output).__name__}"
                )
            if logits.requires_grad:
                (self.error,) = torch.autograd.grad(
                    loss, logits, retain_graph=True, allow_unused=True
                )
            if self.error is None:
                raise DecouplingError(
                    "a source asks for the error of the model's output, but the loss does not "
                    "depend on that output or its 'logits': let the model return the logits that "
                    "the loss is made of"
                )
        tape.outputs["loss"] = loss
        self.loss, self.output = loss.detach(), detached(output)

    # ---- messages arrive -------------------------------------------------------------------------

    def advance(self, now: int) -> None:
        """Pull back, last stage first, everything that waited for what is there now."""
        self.now = now
        for index in sorted(self.tapes, reverse=True):
            groups = [s for s in self.by_producer[index] if s.source.lag is not None]
            if self.share == 0 and not all(self._is_ready(s) for s in groups):
                continue
            if self.share == 0 and any(
                self.messages.is_lost(s, awaited_kinds(s.source)) for s in groups
            ):  # a consumer is not updated
                del self.tapes[index]
                continue
            given: dict[str, Any] = {}
            for group in self.by_producer[index]:
                if self.share > 0 or group.source.lag is not None or index not in self.early:
                    given.update(zip(group.names, self._completed(group), strict=True))
            if not self.by_producer[index]:  # nobody was asked: the true gradients themselves
                given = {n: self.gradients.get(n) for n in self.stages[index].outputs}
            held = self.tapes.pop(index)
            if isinstance(held, Rerun):
                with held.as_then(self.stages[index].module):
                    tape = Tape(*self.functions[index].forward(held.values))
                    self._pull_back(index, tape, given)
            else:
                # Kept for a failure later in the step: a graph of an earlier one could not be made
                # again.
                self._pull_back(index, held, given, retain=self.share == 0)

    def _is_ready(self, group: Served) -> bool:
        if self.messages.is_lost(group, awaited_kinds(group.source)):
            return True
        since = self.messages.awaited_since(group)
        return since is not None and self.now >= since + (group.source.lag or 0)

    def _completed(self, group: Served) -> tuple[Any, ...]:
        """What is pulled back for a source's values: its own word on the message, or the true
        gradient's share.
        """
        prediction = self.predictions[group.name]
        if self.share == 1:
            return tuple(self.gradients.get(n) for n in group.names)
        if self.share > 0:
            return mix(self.share, self.messages.gradients(group), prediction.guessed)
        if group.source.lag is None:
            return self._predicted(group)
        with self._named(self.stages[group.producer]):
            found = group.source.complete(
                prediction, self.messages.of(group, awaited_kinds(group.source))
            )
            if not isinstance(found, tuple) or len(found) != len(group.names):
                raise DecouplingError(
                    f"{type(group.source).__name__}.complete must return a tuple of "
                    f"{len(group.names)} gradients, one per value, but returned "
                    f"{type(found).__name__}"
                )
        if (
            group.source.corrects and group.producer not in self.early
        ):  # another source of the stage waits: all in one
            return tuple(a + b for a, b in zip(found, self._predicted(group), strict=True))
        return found

    def _pull_back(
        self,
        index: int,
        tape: Tape,
        given: dict[str, Any],
        retain: bool = False,
        complete: bool = True,
    ) -> None:
        """One stage's backward. In one go, what later stages sent for its inputs takes part, in
        autograd's order.
        """
        received = self.split.received_in(index)
        once = complete and index not in self.early
        partials: dict[str, Any] = {n: self.gradients.get(n) for n in received} if once else {}
        for name, parameter in self.split.summed_in(index).items():
            partials[name], parameter.grad = parameter.grad, None
        found = self.functions[index].backward(
            tape.outputs, tape.leaves, tape.entries, given, partials, retain
        )
        self._note_parts(index, found, partials)
        for leaf in tape.leaves.values():
            leaf.clear()
        if once:
            self.gradients.update(found)
        elif not complete:
            self.early[index] = found
        else:
            for name, later in found.items():
                parts = [
                    g
                    for g in (self.gradients.get(name), self.early[index][name], later)
                    if g is not None
                ]
                self.gradients[name] = functools.reduce(torch.add, parts) if parts else None
        if complete:
            self.finished[index] = self.now

    def _note_parts(self, index: int, found: dict[str, Any], before: dict[str, Any]) -> None:
        """What one consumer adds to the gradients of its inputs."""
        for group in self.divided:
            for name in group.names if index in group.consumers else ():
                gradient, later = found.get(name), before.get(name)
                if gradient is not None:
                    part = gradient if later is None else gradient - later
                    known = self.parts.get((name, index))
                    self.parts[name, index] = part if known is None else known + part

    # ---- sources learn ---------------------------------------------------------------------------

    def fit(self) -> list[tuple[str, torch.Tensor]]:
        """Train every source whose message is there, and the synthetic inputs.

        Returns:
            Losses with their graph, by name.
        """
        losses: list[tuple[str, torch.Tensor | None]] = []
        with torch.enable_grad():
            for group in [s for s in self.divided if s in self.served]:
                losses += self._fit_parts(group)
            for group in self.served:
                kinds = message_kinds(group.source)
                done = (
                    group in self.divided
                    or group.name in self.fitted
                    or group.name not in self.predictions
                )
                if done or not self.messages.is_there(group, kinds):
                    continue
                self.fitted.add(group.name)
                with self._named(self.stages[group.producer]):
                    message = self.messages.of(group, kinds)
                    loss = group.source.fit(self._to_teach(group), message)
                    if loss is not None and (loss.numel() != 1 or not loss.requires_grad):
                        raise DecouplingError(
                            f"{type(group.source).__name__}.fit must return a scalar with its "
                            f"graph, or None, but returned a tensor of shape {tuple(loss.shape)}, "
                            f"requires_grad={loss.requires_grad}"
                        )
                    losses.append((group.name, loss))
            for name in [n for n in self.input_predictions if n in self.values]:
                losses.append(
                    (
                        f"{name}@input",
                        self.inputs[name].fit(self.input_predictions.pop(name), self.values[name]),
                    )
                )
        return [(n, loss) for n, loss in losses if loss is not None]

    def _to_teach(self, group: Served) -> Prediction:
        """What a message is compared with."""
        return self.predictions[group.name]

    def _fit_parts(self, group: Served) -> list[tuple[str, torch.Tensor | None]]:
        """Every consumer that has answered teaches the source that is its own."""
        losses: list[tuple[str, torch.Tensor | None]] = []
        assert isinstance(group.source, Each)
        for place, consumer in enumerate(group.consumers):
            key = f"{group.name}/{consumer}"
            if (
                group.name in self.predictions
                and key not in self.fitted
                and self.has_answered(consumer)
            ):
                self.fitted.add(key)
                found = [self.parts.get((n, consumer)) for n in group.names]
                pairs = zip(group.names, found, strict=True)
                message = tuple(
                    torch.zeros_like(self.sent[n]) if g is None else g for n, g in pairs
                )
                losses.append(
                    (group.name, group.source.fit_part(place, self._to_teach(group), message))
                )
        if all(f"{group.name}/{c}" in self.fitted for c in group.consumers):
            self.fitted.add(group.name)
        return losses

    @property
    def is_done(self) -> bool:
        """Whether nothing of this batch is under way any more."""
        late = [s for s in self.served if s.name in self.predictions and s.name not in self.fitted]
        return not self.tapes and all(
            self.messages.is_lost(s, message_kinds(s.source)) for s in late
        )

    def forget(self) -> None:
        """Drop what nothing that is still under way needs."""
        open_ = [s for s in self.served if s.name not in self.fitted or s.producer in self.tapes]
        needed = {n for s in open_ for n in s.names}
        self.values, self.sent = {}, {n: v for n, v in self.sent.items() if n in needed}
        self.gradients = {n: g for n, g in self.gradients.items() if n in needed}
        self.predictions = {
            n: p for n, p in self.predictions.items() if n in {s.name for s in open_}
        }
        self.output = self.target = None

    def snapshot(self) -> Callable[[], None]:
        """Remember where the batch stands; the result goes back there."""
        kept = {n: getattr(self, n).copy() for n in self._progress}

        def restore() -> None:
            vars(self).update(kept)

        return restore

    def has_heard(self, group: Served) -> bool:
        """Whether everything that uses a source's values has sent its gradient."""
        return all(self.has_answered(c) for c in group.consumers)

    def has_answered(self, stage: int) -> bool:
        """Whether a stage has sent back its gradients."""
        return stage in self.finished

    def cannot_hear(self, group: Served) -> bool:
        """Whether something that uses a source's values is not updated with this batch, and sends
        none.
        """
        return any(c not in self.finished and c not in self.tapes for c in group.consumers)

    # ---- what is known ---------------------------------------------------------------------------

    def guesses(self) -> dict[str, torch.Tensor]:
        """Predicted gradients by interface, of the sources that predict."""
        answers = [
            (s, self.predictions[s.name].guessed) for s in self.served if s.name in self.predictions
        ]
        return {
            n: g
            for s, gradients in answers
            if gradients
            for n, g in zip(s.names, gradients, strict=True)
        }

    def compare(self, step: int) -> dict[str, InterfaceReport]:
        """How near each prediction is to what arrived."""
        last, found = len(self.stages) - 1, {}
        for group in self.served:
            prediction = self.predictions.get(group.name)
            guess = None if prediction is None else prediction.guessed
            if (
                guess is None
                or group.name in self.measured
                or not self.messages.has_gradients(group)
            ):
                continue
            self.measured.add(group.name)
            # Else it was taken where the input was predicted, or lacks what later windows would
            # send.
            real = not any(n in self.inputs for n in group.names) and not group.leaves
            kind = (
                "true"
                if self.share == 1 or (set(group.consumers) == {last} and real)
                else "bootstrapped"
            )
            for name, a, b in zip(group.names, guess, self.messages.gradients(group), strict=True):
                found[name] = compare(a, b, kind, step)
        return found

    def places(self) -> list[tuple[str, torch.Tensor]]:
        """What must be finite besides values, with its name; the first in program order comes
        first.
        """
        places: list[tuple[str, torch.Tensor]] = []
        for group in self.served:
            prediction = self.predictions.get(group.name)
            if prediction is not None and prediction.gradients is not None:
                pairs = zip(group.names, prediction.gradients, strict=True)
                places += [(f"the predicted gradient of interface {n!r}", g) for n, g in pairs]
        for name, predicted in self.input_predictions.items():
            places.append((f"the synthetic input at interface {name!r}", predicted.value))
        if self.loss is not None:
            places.append(("the loss", self.loss))
        for name, gradient in reversed(list(self.gradients.items())):
            if gradient is not None:
                places.append((f"the gradient of interface {name!r}", gradient))
        return places

    def is_finite(self) -> bool:
        """Whether nothing of this batch, so far, is NaN or infinite."""
        return all(bool(tensor.isfinite().all()) for _, tensor in self.places())

    @contextlib.contextmanager
    def _named(self, stage: StageGraph) -> Iterator[None]:
        try:
            yield
        except DecouplingError as error:
            places = ", ".join(repr(n) for n in stage.outputs)
            raise type(error)(f"stage_{stage.index}, which sends {places}: {error}") from error


def _add(part: torch.Tensor, later: torch.Tensor | None) -> torch.Tensor:
    return part if later is None else later + part
