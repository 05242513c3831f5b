"""The kernel: one batch in one stage.

    receive -> forward -> ask the sources -> pull back -> answer -> learn

In turn, on threads, on ranks and through time differ in who fills the batch's state and in which
order stages run, and in nothing else. Where all sources answer at once and nobody waits for the
values, the emitted training function does the first four in one; else the emitted halves are called
apart, and the backward comes when what it waits for is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..sources.keeping import kept_weights
from .answers import Answers, added
from .batch_state import BatchState, Setting
from .casts import Carried, copies_of, kept_back
from .emitted import detached, evaluate, pull_back
from .missing import check_arrived
from .objective import logits_of
from .stage_sources import StageSources
from .tape import Rerun, Tape


class StageBatch:
    """One batch in one stage. Knows no other stage and no transport.

    Args:
        setting, index, state, answers, asks_again: as for :class:`StageSources`; the state is
            shared by stages that run one after the other.

    Attributes:
        stage: the subgraph.
        sources: what it asks them, and what they learn.
    """

    def __init__(
        self,
        setting: Setting,
        index: int,
        state: BatchState,
        answers: Answers,
        asks_again: bool = False,
    ) -> None:
        self.setting, self.index, self.state, self.answers = setting, index, state, answers
        self.stage = setting.stages[index]
        self.sources = StageSources(setting, index, state, answers, asks_again)
        self.is_last = index == setting.last

    @property
    def is_active(self) -> bool:
        """Whether the stage is updated with this batch."""
        return self.index in self.setting.active

    def receive(self) -> dict[str, Any]:
        """The stage's inputs by name, predicted ones where there are such.

        Raises:
            DecouplingError: a predicted input of another shape than the value has.
        """
        values, names = self.state.values, self.stage.inputs
        taken = self.state.predicted_inputs(self.setting)
        if not taken:
            return {n: values[n] for n in names}
        predicted = {n: value for n, value in taken.items() if n in names}
        for name, guess in predicted.items():
            if name in values and guess.shape != values[name].shape:
                raise DecouplingError(
                    f"the synthetic input at {name!r} has shape {tuple(guess.shape)}, but the "
                    f"value that was to be predicted has {tuple(values[name].shape)}: decouple on "
                    "such examples, or leave this interface out of inputs="
                )
        return {n: predicted[n] if n in predicted else values[n] for n in names}

    def run_only(self) -> None:
        """Forward without a graph: the stage is not updated, or is run again later."""
        with torch.no_grad():
            results = detached(self.stage.module(*self.receive().values()))
        if self.is_last:
            self.state.output = results
        else:
            self.state.values.update(zip(self.stage.outputs, results, strict=True))

    def step(self, is_heard: bool = True) -> None:
        """All at once, by the emitted training function; are the inputs' gradients heard of?"""
        state, emitted = self.state, self.setting.functions[self.index]
        step = (emitted.step if is_heard else emitted.step_unheard).forward  # no call's detours
        inputs = self.receive()
        inputs.update({n: state.values[n] for n in self.setting.seen_besides.get(self.index, ())})
        with self.sources.named():
            result = step(inputs, state.context, self.setting.loss, state.target)
        state.predictions.update(result.predictions)
        if self.is_last:
            state.loss, state.output = result.loss, result.outputs["output"]
        check_arrived(self.index, self.setting.expected[self.index], result.input_gradients)
        self._sent_back(result.outputs, result.input_gradients)

    def step_repeatably(self) -> Callable[[nn.Parameter, Tensor | None], Tensor | None]:
        """All at once, from the halves, keeping the graph for parameters shared with later stages.

        Autograd adds the gradients of all uses in one chain, last use first. A stage with several
        uses can only go on with it once later stages' sum is known: its pull-back is repeated.

        Returns:
            What makes a parameter's whole gradient of what later stages made of it.
        """
        outputs, leaves, _ = self.setting.functions[self.index].forward(self.receive())
        sent = {n: detached(o) for n, o in outputs.items()}
        given: dict[str, Tensor] = {}
        for group in self.sources.groups:
            prediction = self.sources.ask(group, sent)
            given.update(zip(group.names, prediction.gradients or (), strict=True))
        roots, gradients = [outputs[n] for n in given], list(given.values())
        pull_back(roots, gradients, retain_graph=True)

        def again(parameter: nn.Parameter, later: Tensor | None) -> Tensor | None:
            parameter.grad = None
            pull_back([*roots, parameter], [*gradients, later], True, [parameter])
            total, parameter.grad = parameter.grad, None
            return total

        found = {n: leaf.gradient() for n, leaf in leaves.items()}
        check_arrived(self.index, self.setting.expected[self.index], found)
        self._sent_back(sent, found)
        return again

    def _sent_back(self, outputs: dict[str, Any], found: dict[str, Tensor | None]) -> None:
        """Values that are known now, and what flows back to the stage's inputs."""
        self.state.values.update(outputs)
        self._note_parts(found, {})
        gradients = self.state.progress.gradients
        for name, gradient in found.items():
            if gradient is not None:
                gradients[name] = added(gradients.get(name), gradient)
        self.state.progress.finished[self.index] = self.state.now

    def _note_parts(self, found: dict[str, Any], before: dict[str, Any]) -> None:
        """What the stage adds to the gradients of its inputs, for sources with a part for it; later
        stages had made ``before`` of them.
        """
        parts = self.state.progress.parts
        for name in {n for s in self.setting.divided if self.index in s.consumers for n in s.names}:
            gradient, later = found.get(name), before.get(name)
            if gradient is not None:
                part = gradient if later is None else gradient - later
                parts[name, self.index] = added(parts.get((name, self.index)), part)

    def run(self, delays: Mapping[int, int], on_values: Callable[[], None] | None = None) -> None:
        """Run forward, ask the sources, and pull back what is known at once.

        Args:
            delays: in how many steps each stage will have pulled back this batch.
            on_values: called when the stage's values are there, before anything else is done.
        """
        if not self.is_active and self.setting.share == 0:
            self.run_only()
            if on_values is not None:
                on_values()
            return
        sources, late = self.sources, delays[self.index] > 0
        asks, complete = [s.source.asks for s in sources.groups], not sources.waiting
        rerun = late and all(a.wait.recompute for a in asks if a.wait)
        early = bool(asks) and self.setting.share == 0 and all(a.early for a in asks)
        inputs = self.receive()
        held: Tape | Rerun | None = Rerun(self.stage.module, inputs) if rerun else None
        tape = None
        keeps = self.setting.changes.contents  # a loss that reads it must find its graph
        with sources.ahead(delays) as moved:
            if rerun and not early and not keeps:
                self.run_only()
            else:
                tape = self.forward(inputs, keep=moved or (late and not rerun))
        if on_values is not None:
            on_values()
        sources.ask_all(delays)
        if tape is not None and self.is_last:
            self.evaluate(tape)
            self.pull_back(tape, {})
            return
        if tape is not None and early:
            retain = held is None and not complete
            self.pull_back(tape, sources.predicted(), retain, complete)
        if not (early and complete):
            waits = held or tape
            assert waits is not None
            self.state.progress.tapes[self.index] = waits

    def forward(self, inputs: dict[str, Any], keep: bool = False) -> Tape:
        """The emitted forward, its graph kept; ``keep`` is with copies of the weights, which are
        updated before the backward.
        """
        with kept_weights(self.stage.module) if keep else contextlib.nullcontext():
            tape = Tape(*self.setting.functions[self.index].forward(inputs))
        self.state.values |= {n: detached(v) for n, v in tape.outputs.items() if n != "output"}
        return tape

    def evaluate(self, tape: Tape) -> None:
        """Take the loss of the model's output, and its error where a source asks for that.

        Raises:
            DecouplingError: a loss that is no scalar; an output without logits that is asked for.
        """
        output = tape.outputs["output"]
        loss = evaluate(self.setting.loss, output, self.state.target)
        if self.setting.wants_error:
            self.state.error = _error_of(output, loss)
        tape.outputs["loss"] = loss
        self.state.loss, self.state.output = loss.detach(), detached(output)

    def advance(self) -> None:
        """Pull back what waited, if what it waits for is there now."""
        held = self.state.progress.tapes.get(self.index)
        locked, waiting = self.setting.share > 0, self.sources.waiting
        if held is None or not (locked or all(map(self.answers.is_ready, waiting))):
            return
        lost = [self.answers.is_lost(s, s.source.asks.awaited) for s in waiting]
        if any(lost) and not locked:  # a consumer is not updated
            del self.state.progress.tapes[self.index]
            return
        given = self.sources.completed()
        del self.state.progress.tapes[self.index]
        if isinstance(held, Rerun):
            with held.as_then():
                forward = self.setting.functions[self.index].forward
                self.pull_back(Tape(*forward(held.values)), given)
        else:
            # Kept for a failure later in the step: a graph of an earlier one could not be made
            # again.
            self.pull_back(held, given, retain=not locked)

    def pull_back(
        self, tape: Tape, given: dict[str, Any], retain: bool = False, complete: bool = True
    ) -> None:
        """The stage's backward. In one go, what later stages sent for its inputs takes part, in
        autograd's order.

        Args:
            tape: the stage's forward.
            given: the gradient of each value that it sends; the loss counts as it is.
            retain: keep the graph for another call.
            complete: whether nothing more comes later.
        """
        if "loss" in tape.outputs:
            given = {**given, "loss": torch.ones_like(tape.outputs["loss"])}
        split, progress = self.setting.split, self.state.progress
        gradients, early = progress.gradients, progress.early
        once = complete and self.index not in early
        received = split.received_in(self.index) if once else []
        partials: dict[str, Any] = {n: gradients.get(n) for n in received}
        for name, parameter in split.summed_in(self.index).items():
            partials[name], parameter.grad = parameter.grad, None
        backward = self.setting.functions[self.index].backward
        with _copies(self, tape, partials) as kept:
            found = backward(tape.outputs, tape.leaves, tape.entries, given, partials, retain)
            found = self.sources.unweighted(found)
        if once and all(given.get(n) is not None for n in split.sent_by(self.index)):
            expected = self.setting.expected[self.index]
            arrived = {n: kept.get(n, p.grad) for n, p in expected.parameters.items()}
            check_arrived(self.index, expected, found, arrived)
        self._note_parts(found, partials)
        for leaf in tape.leaves.values():
            leaf.clear()
        if once:
            gradients.update(found)
        elif not complete:
            early[self.index] = found
        else:
            for name, later in found.items():
                gradients.setdefault(name, None)
                for part in (early[self.index][name], later):
                    if part is not None:
                        gradients[name] = added(gradients[name], part)
        if complete:
            progress.finished[self.index] = self.state.now


def _error_of(output: Any, loss: Tensor) -> Tensor:
    """The loss's gradient for the logits of the output."""
    logits = logits_of(output)
    if logits is None:
        raise DecouplingError(
            "a source asks for the error of the model's output, which must be a tensor or have one "
            f"called 'logits', but is a {type(output).__name__}"
        )
    error = None
    if logits.requires_grad:
        (error,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if error is None:
        raise DecouplingError(
            "a source asks for the error of the model's output, but the loss does not depend on "
            "that output or its 'logits': let the model return the logits that the loss is made of"
        )
    return error


def _copies(
    batch: StageBatch, tape: Tape, partials: dict[str, Any]
) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
    """Of shared parameters under autocast: what later stages made of these copies takes part,
    and what stages before use, too, is kept back for them.
    """
    progress, shared = batch.state.progress, batch.setting.split.summed_in(batch.index)
    mine = copies_of(tape.outputs, shared) if batch.setting.share > 0 else {}
    for name in {*mine.values()}:
        later = {n: g for n, g in progress.copies.items() if mine.get(n) == name}
        partials[name] = Carried(partials.get(name), later)
    tapes = [t for k, t in progress.tapes.items() if k < batch.index and isinstance(t, Tape)]
    before = {n for t in tapes for n in copies_of(t.outputs, shared)} if mine else set()
    return kept_back({n: name for n, name in mine.items() if n in before}, progress.copies)
