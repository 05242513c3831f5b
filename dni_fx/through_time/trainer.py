"""The trainer of a recurrent model, window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ..decoupled import Decoupled, Stage
from ..errors import DecouplingError
from ..graphs.nested import map_tensors
from ..plan import CutPlan
from ..reports.steps import StepReport
from ..runtime.base import BaseTrainer, one_at_a_time
from ..runtime.batch_state import Settings
from ..runtime.evaluating import Means
from ..runtime.in_turn import InTurn
from ..runtime.saving import load_trained, trained_state
from ..runtime.transforms import check_ordinary
from ..sources import GradientSource, Served
from .carried import Carried, read_done
from .judging import judge, unpack_window
from .opening import WindowOpening
from .window_batch import WindowBatch, close, find_answers


@dataclass(frozen=True)
class WindowReport(StepReport):
    """Result of one window.

    Attributes:
        state: the state after it, detached, as the model takes it; where a sequence ended, that of
            a new one.
        messages: what goes to other networks, detached, by name.
        input_gradients: for the tensors of the window, by name (``x``, or ``x_...`` where they are
            nested), where asked for; empty while the window is held.
    """

    state: Any = field(default=None, repr=False)
    messages: dict[str, Tensor] = field(default_factory=dict, repr=False)
    input_gradients: dict[str, Tensor | None] = field(default_factory=dict, repr=False)


class ThroughTime(BaseTrainer):
    """Trains a recurrent model window by window; made by
    :func:`dni_fx.recurrent.decouple_through_time`.

    Attributes:
        window: T, the most time steps in one window.
        messages: names of what goes to other networks.
        opening: the model over one window, and what leaves it.
        model: the user's, trained in place.
        decoupled: its stages and sources.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        opening: WindowOpening,
        window: int,
        loss: Callable[[Any, Any], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(decoupled, loss, **options)
        self.model, self.opening = decoupled.model, opening
        self.window, self.messages = window, opening.messages
        parts = decoupled, self.optimizing, self.metrics, self.accumulate
        self._in_turn: InTurn[WindowBatch] = InTurn(*parts)
        self._settings = Settings(decoupled.graphs, self.objective, is_served=_predicts)
        self._carried = Carried()

    @property
    def plan(self) -> CutPlan:
        """As :attr:`Decoupled.plan`; known after the first step."""
        return self.decoupled.plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        """As :attr:`Decoupled.stages`."""
        return self.decoupled.stages

    @property
    def synthesizers(self) -> nn.ModuleDict:
        """As :attr:`Decoupled.synthesizers`."""
        return self.decoupled.synthesizers

    @property
    def sources(self) -> dict[str, GradientSource]:
        """As :attr:`Decoupled.sources`."""
        return self.decoupled.sources

    @property
    def state(self) -> Any:
        """What the next window starts from, as the model takes it; None at a sequence's start."""
        leaves = self._carried.leaves
        return None if leaves is None else self.opening.module.pack(leaves)

    @property
    def windows(self) -> list[WindowBatch]:
        """Those under way, oldest first."""
        return list(self._in_turn.under_way)

    @one_at_a_time
    def step(  # type: ignore[override]
        self, x_window: Any, state: Any = None, done: Any = None, target: Any = None
    ) -> WindowReport:
        """Train on one window.

        Args:
            x_window: ``(time, batch, ...)`` or ``(batch, time, ...)``, or a nesting of such
                tensors; up to T steps.
            state: the state to start from; by default the one after the last window, or that of a
                new sequence. With any other, the last window counts as the end of its sequence.
            done: bool (or 0 and 1), ``(batch,)``, or one for all: whose sequence ends with this
                window. Its state starts anew, and its last gradient is zero. Pad what is shorter
                than the window, and let the loss pass over it.
            target: what the loss takes.

        Returns:
            The window's loss, outputs, comparisons, and the state after it.

        Raises:
            NonFiniteError: a value or gradient is NaN or infinite; nothing is updated.
            DecouplingError: a window, state or ``done`` that does not fit.
        """
        framed, carried = self.opening.module, self._carried
        batch, states = framed.check(x_window, self.window), framed.known_states(x_window)
        carried.check_untouched()
        goes_on = state is None or carried.is_same(state)
        leaves = carried.leaves if goes_on else framed.unpack(state)
        if leaves is None:
            leaves = states.initial(batch)
        carried.check_fits(states, leaves, batch)
        before = next((w for w in reversed(self.windows) if not w.has_ended), None)
        if before is not None and not goes_on and before.is_held:
            # Its update must come before the next forward.
            self._advance(None, before.end)
            before = None
        ended = read_done(done, batch, next(self.model.parameters()).device)
        is_over = ended is not None and bool(ended.all())
        context = self.objective.context(target)
        values = check_ordinary(self._bind(x_window, leaves, context), target)
        known = self._settings.of(), self.decoupled.graphs.served()
        made = WindowBatch(*known, self.steps + 1, ended, before if goes_on else None)
        output: Any = None
        after: list[Tensor] = []
        messages: dict[str, Tensor] = {}

        def begin() -> None:
            nonlocal output
            made.begin(values, context, target, self._in_turn.clock)
            output = made.state.output
            after.extend(made.state.values[f"next_{n}"].detach() for n in states.names)
            messages.update({n: made.state.sent[n] for n in made.messages})
            if before is not None and not goes_on:
                before.end()
            if is_over:
                made.end()

        self._advance(made, begin)
        self.steps += 1
        if ended is not None:
            after = states.begin_anew(after, ended, is_over)
        assert made.state.loss is not None
        report = WindowReport(
            made.state.loss * self.accumulate,
            output,
            dict(self.metrics.found),
            self.steps,
            framed.pack(after),
            messages,
            made.input_gradients,
        )
        carried.keep(*(() if is_over else (after, report.state)))
        return report

    def prepare(self, x_window: Any, target: Any = None) -> Self:  # type: ignore[override]
        """Trace a window without training on it: plan, stages and sources are known then, and
        ``load_state_dict`` finds all that it needs.

        Args:
            x_window: as for :meth:`step`.
            target: asked for where there is a ``context``.

        Returns:
            The trainer.

        Raises:
            DecouplingError: a window that does not fit.
        """
        framed = self.opening.module
        batch = framed.check(x_window, self.window)
        leaves = framed.known_states(x_window).initial(batch)
        self._bind(x_window, leaves, self.objective.context(target))
        return self

    def _bind(self, x_window: Any, leaves: list[Tensor], context: Tensor | None) -> dict[str, Any]:
        """The window's values by name, its graph active, and an optimiser for everything."""
        if context is not None:
            self.opening.see_context(context)
        if self.opening.input_gradients:
            x_window = map_tensors(_fresh, x_window)
        names = self.opening.module.known_states(x_window).names
        named = {n: _fresh(t) for n, t in zip(names, leaves, strict=True)}
        values = self.decoupled.bind(x_window, named)
        _check_sources(self.sources)
        self.optimizing.prepare(self.decoupled.graphs, self.stages)
        return values

    def _advance(self, new: WindowBatch | None, begin: Callable[[], None]) -> None:
        """One step of time; a failure after graphs were pulled back costs the sequences that were
        held.
        """
        try:
            self._in_turn.advance(self.steps, new, begin, self._check_update)
        except BaseException:
            if any(w.torn and w.is_held for w in self.windows):
                self._in_turn.under_way = []
            raise

    def _check_update(self, windows: Sequence[WindowBatch]) -> None:
        has_gradient = any(p.grad is not None for p in self.model.parameters())
        if has_gradient and any(w.is_held for w in windows):
            raise DecouplingError(
                "accumulate= counts windows, and this update would come while later windows are "
                "held for exact gradients, which it would spoil: leave it out, or let updates come "
                "at the ends of sequences"
            )

    _unpack = staticmethod(unpack_window)

    def _judge(self, means: Means) -> Callable[..., None]:
        return judge(self.opening.module, means)

    def answer(self, gradients: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take what other networks send back for messages: their sources' targets, or exact ones.

        Args:
            gradients: by the step of the report that the message came with, the gradient of each
                message by its name.

        Raises:
            DecouplingError: no such step waits for an answer, no such message, a gradient of
                another shape, or only some of the windows that are held together.
        """
        found = find_answers(gradients, self.windows, self.decoupled, self.steps)

        def deliver() -> None:
            for window, name, gradient in found:
                window.hear(name, gradient)

        if found:
            self._advance(None, deliver)

    def reset(self) -> None:
        """Start a new sequence with the next window, for all samples."""
        self.drain()
        self._carried.keep()

    def drain(self) -> int:
        """End what is under way as if nothing followed: what was held for exact gradients is pulled
        back and updated.

        Elsewhere predictions stay without a target. The state is kept. Returns the number of
        updates that it made.
        """
        held = [w for w in self.windows if w.is_held]
        if held:
            self._advance(None, lambda: close(held))
        self._in_turn.under_way = []
        return bool(held)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`dni_fx.Trainer.state_dict`, with the state that the next window starts from.

        Raises:
            DecouplingError: a window waits for the next one; call :meth:`drain` first.
        """
        if waiting := len(self.windows):
            raise DecouplingError(
                f"{waiting} windows wait for what follows and cannot be saved: call "
                "trainer.drain() first, which ends them"
            )
        carried = [t.detach().clone() for t in self._carried.leaves or ()]
        state = trained_state(self.decoupled, self.optimizing, self.steps, self.accumulate)
        return {**state, "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`dni_fx.Trainer.load_state_dict`."""
        load_trained(state, self.decoupled, self.optimizing)
        self.steps = state["steps"]
        self._in_turn.under_way = []
        self._carried.keep([t.clone() for t in state.get("carried", [])] or None)


def _check_sources(sources: Mapping[str, GradientSource]) -> None:
    for name, source in sources.items():
        if source.asks.wait and not source.asks.exact:
            raise DecouplingError(
                f"the source at {name!r} waits for a message, which windows cannot: use one "
                "that predicts at once"
            )


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor.detach()


def _predicts(group: Served) -> bool:
    return not group.source.asks.exact
