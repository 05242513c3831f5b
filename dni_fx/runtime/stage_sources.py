"""The sources of one stage, for one batch: asked, answered, and taught."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import DecouplingError
from ..reports.steps import InterfaceReport, compare
from ..sources import GradientSource, Prediction, Served, mix
from ..sources.keeping import kept_weights
from .answers import Answers, laid_out, or_zeros
from .batch_state import BatchState, Setting


class StageSources:
    """What a stage asks its sources about one batch, and what they learn from it.

    Args:
        setting, index: what holds for the batch, and which stage it is.
        state, answers: what is known of the batch, and what has come back to the sources.
        asks_again: where a source has learnt since it was asked, what it says now is corrected, so
            that a late message does not drive on what is right by now; else it keeps its weights
            of then.

    Attributes:
        groups: the sources, each with the values that it serves.
    """

    def __init__(
        self, setting: Setting, index: int, state: BatchState, answers: Answers, asks_again: bool
    ) -> None:
        self.setting, self.index, self.state, self.answers = setting, index, state, answers
        self.groups = setting.by_producer[index]
        self.asks_again = asks_again
        self._seen: dict[str, tuple[Tensor, ...]] = {}  # inputs, for sources that see them
        self._versions: dict[str, int] = {}  # of the sources' weights, when they were asked
        self._again: dict[str, Prediction] = {}

    @property
    def waiting(self) -> list[Served]:
        """Those that wait for a message."""
        return [s for s in self.groups if s.source.asks.wait is not None]

    def note_inputs(self) -> None:
        """Keep what the sources see of the stage's and the model's inputs, which may be gone when
        they are asked.
        """
        for group in self.groups:
            self._inputs_of(group)

    def _inputs_of(self, group: Served) -> tuple[Tensor, ...]:
        """What a source sees of inputs."""
        whose = group.source.asks.inputs
        if whose is not None and group.name not in self._seen:
            names = self.setting.split.seen_by(self.index, whose)
            known = self.state.values | self.state.predicted_inputs(self.setting)
            self._seen[group.name] = tuple(known[n].detach() for n in names)
        return self._seen.get(group.name, ())

    def ask(self, group: Served, values: Mapping[str, Any], keep: bool = False) -> Prediction:
        """What a source says about its values (by name, detached); remembered. ``keep`` is with
        copies of its weights, which are updated before its message comes.
        """
        if self.asks_again:
            self._versions[group.name] = _version(group.source)
        served = tuple(values[n] for n in group.names)
        seen = (self._inputs_of(group),) if group.source.asks.inputs is not None else ()
        if not group.source.asks.hears:  # nobody asks it again
            self._seen.pop(group.name, None)
        with self.named(), kept_weights(group.source) if keep else contextlib.nullcontext():
            prediction: Prediction = group.source(served, self.state.context, *seen)
        self.state.predictions[group.name] = prediction
        return prediction

    def ask_all(self, delays: Mapping[int, int]) -> None:
        """About what the stage sends; ``delays`` are as in :class:`Setting`."""
        for group in self.groups:
            self.ask(group, self.state.values, self._hears_late(group, delays))

    def ask_to_learn(self, delays: Mapping[int, int]) -> None:
        """Where the stage itself is left out, but its consumers run: to learn from those."""
        active = self.setting.active
        for group in () if self.index in active else self.groups:
            hears = "gradient" in group.source.asks.learns_from
            if hears and active.issuperset(group.consumers) and not self._was_asked(group):
                self.ask(group, self.state.known(), self._hears_late(group, delays))

    def _was_asked(self, group: Served) -> bool:
        return group.name in self.state.predictions

    def _hears_late(self, group: Served, delays: Mapping[int, int]) -> bool:
        """Whether a source may be updated before the message about its prediction comes."""
        hears = not self.asks_again and "gradient" in group.source.asks.learns_from
        return hears and any(delays[c] > 0 for c in group.consumers)

    @contextlib.contextmanager
    def ahead(self, delays: Mapping[int, int]) -> Iterator[bool]:
        """Where a source asks for it, the stage's weights are inside those that its late gradient
        will meet; whether they are.
        """
        steps, move = delays[self.index], self.setting.ahead
        waits = (s.source.asks.wait for s in self.waiting)
        if move is None or steps == 0 or not any(w and w.predict_weights for w in waits):
            yield False
            return
        shared = set(self.setting.split.shared_in(self.index).values())
        own = {*self.setting.expected[self.index].parameters.values()} - shared
        with move(self.index, steps, own):
            yield True

    def predicted(self) -> dict[str, Tensor]:
        """What is pulled back at once, by value."""
        return {n: g for s in self.groups for n, g in zip(s.names, self._said(s), strict=True)}

    def completed(self) -> dict[str, Any]:
        """What is pulled back now that the messages are there, by value: what sources that wait say
        of them, the true gradient's share, and whatever was not pulled back before.
        """
        progress, share = self.state.progress, self.setting.share
        if share == 1 or not self.groups:  # the true gradients themselves
            names = self.setting.stages[self.index].outputs
            return {n: progress.gradients.get(n) for n in names}
        early = self.index in progress.early
        groups = [s for s in self.groups if share > 0 or s.source.asks.wait or not early]
        return {n: g for s in groups for n, g in zip(s.names, self._completed(s), strict=True)}

    def _said(self, group: Served) -> tuple[Tensor, ...]:
        gradients = self.state.predictions[group.name].gradients
        if gradients is None:
            raise DecouplingError(
                f"the source at {group.name!r} ({type(group.source).__name__}) predicted no "
                "gradients: only a source with a lag may do without"
            )
        return gradients

    def _completed(self, group: Served) -> tuple[Any, ...]:
        source, share = group.source, self.setting.share
        prediction = self.state.predictions[group.name]
        if share > 0:
            return mix(share, self.answers.gradients(group), prediction.guessed)
        if source.asks.wait is None:
            return self._said(group)
        with self.named():
            found = source.complete(prediction, self.answers.of(group, source.asks.awaited))
            if not isinstance(found, tuple) or len(found) != len(group.names):
                raise DecouplingError(
                    f"{type(source).__name__}.complete must return a tuple of {len(group.names)} "
                    f"gradients, one per value, but returned {type(found).__name__}"
                )
        if (weight := self._weight(source)) != 1:
            found = tuple(gradient * weight for gradient in found)
        if source.asks.early and self.index not in self.state.progress.early:
            # Another source of the stage waits: all in one.
            return tuple(a + b for a, b in zip(found, self._said(group), strict=True))
        return found

    def _weight(self, source: GradientSource) -> float:
        """Of what comes on top of an earlier part."""
        wait = source.asks.wait
        weight = 1.0 if wait is None else wait.weight
        if not isinstance(weight, str):
            return weight
        return 1 / (1 + math.ceil((self.state.now - self.state.started) * source.unit))

    def unweighted(self, found: dict[str, Any]) -> dict[str, Any]:
        """What has flowed back to the stage's inputs from what is pulled back now; of a correction
        as if it had counted whole.
        """
        if self.index not in self.state.progress.early:
            return found
        weights = {self._weight(s.source) for s in self.waiting}
        if len(weights) > 1:
            names = ", ".join(repr(s.name) for s in self.waiting)
            raise DecouplingError(
                f"the corrections at {names} leave one stage and have different weights, so that "
                "they cannot be told apart in what flows back: give them one weight"
            )
        (weight,) = weights or {1.0}
        if weight == 1:
            return found
        return {n: None if gradient is None else gradient / weight for n, gradient in found.items()}

    def learn(self) -> list[tuple[str, Tensor]]:
        """Losses of every source whose message is there, with their graph, by its name."""
        losses: list[tuple[str, Tensor | None]] = []
        for group in filter(self._was_asked, self.groups):
            if group.by_consumer:
                losses += self._fit_parts(group)
            elif group.name not in self.state.progress.fitted:
                kinds = group.source.asks.learns_from
                if self.answers.is_there(group, kinds):
                    losses.append((group.name, self._fit(group, kinds)))
        return [(n, loss) for n, loss in losses if loss is not None]

    def _fit(self, group: Served, kinds: tuple[str, ...]) -> Tensor | None:
        self.state.progress.fitted.add(group.name)
        with self.named():
            return group.fit(self._to_teach(group), self.answers.of(group, kinds))

    def _fit_parts(self, group: Served) -> list[tuple[str, Tensor | None]]:
        """Every consumer that has answered teaches the part that is its own."""
        losses: list[tuple[str, Tensor | None]] = []
        fitted, parts, sent = self.state.progress.fitted, self.state.progress.parts, self.state.sent
        keys = [f"{group.name}/{consumer}" for consumer in group.consumers]
        for place, (consumer, key) in enumerate(zip(group.consumers, keys, strict=True)):
            if key not in fitted and self.answers.has_answered(consumer):
                fitted.add(key)
                found = ((or_zeros(parts.get((n, consumer)), sent[n]), n) for n in group.names)
                message = tuple(laid_out(part, sent[n]) for part, n in found)
                with self.named():
                    losses.append((group.name, group.fit(self._to_teach(group), message, place)))
        if fitted.issuperset(keys):
            fitted.add(group.name)
        return losses

    def _to_teach(self, group: Served) -> Prediction:
        """What a message is compared with."""
        said = self.state.predictions[group.name]
        if self.asks_again and _version(group.source) != self._versions[group.name]:
            self._again[group.name] = self.ask(group, self.state.sent)
            self.state.predictions[group.name] = said
        return self._again.get(group.name, said)

    def compare(self, step: int) -> dict[str, InterfaceReport]:
        """How near each prediction is to what arrived, once for each."""
        found: dict[str, InterfaceReport] = {}
        measured, inputs = self.state.progress.measured, self.setting.inputs
        for group in filter(self._was_asked, self.groups):
            guess = self.state.predictions[group.name].guessed
            if guess is None or group.name in measured or not self.answers.has_heard(group):
                continue
            measured.add(group.name)
            # Else it was taken where the input was predicted, or lacks what later windows would
            # send.
            real = not (inputs.keys() & group.names or group.leaves)
            ends = group.consumers == (self.setting.last,) and real
            kind = "true" if self.setting.share == 1 or ends else "bootstrapped"
            aims = not group.source.has_own_loss
            for name, a, b in zip(group.names, guess, self.answers.gradients(group), strict=True):
                found[name] = compare(a, b, kind, step, aims)
        return found

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors say which stage they are about."""
        try:
            yield
        except DecouplingError as error:
            places = ", ".join(map(repr, self.setting.stages[self.index].outputs))
            where = f"stage_{self.index}, which sends {places}"
            raise type(error)(f"{where}: {error}") from error


def _version(source: nn.Module) -> int:
    """Another number whenever a parameter has been written to."""
    return sum(p._version for p in source.parameters())
