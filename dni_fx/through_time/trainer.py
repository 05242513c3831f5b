"""The trainer of a recurrent model, window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..decoupled import Decoupled, Stage
from ..errors import DecouplingError
from ..graphs.nested import map_tensors
from ..passes.trace.ports import ANOTHER, STATE
from ..plan import CutPlan
from ..reports.steps import StepReport
from ..runtime.base import BaseTrainer
from ..runtime.saving import load_trained, trained_state
from ..sources import GradientSource
from .carried import Carried, begin_anew, read_done
from .states import InitialState, States
from .under_way import Windows
from .window import Window
from .window_batch import WindowBatch


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

    state: Any = None
    messages: dict[str, Tensor] = field(default_factory=dict)
    input_gradients: dict[str, Tensor | None] = field(default_factory=dict)


class ThroughTime(BaseTrainer):
    """Trains a recurrent model window by window; made by
    :func:`dni_fx.recurrent.decouple_through_time`.

    Attributes:
        window: T, the most time steps in one window.
        messages: names of what goes to other networks.
        sends_input_gradients: whether reports carry gradients for the windows' tensors.
        framed: the model over one window.
        model: the user's, trained in place.
        decoupled: its stages and sources.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        framed: Window,
        window: int,
        see_context: Callable[[Tensor], None],
        *,
        context: Callable[[Any], Tensor] | None,
        initial_state: InitialState | None,
        messages: tuple[str, ...],
        input_gradients: bool,
        loss: Callable[[Any, Any], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(decoupled, loss, context=context, **options)
        self.window, self.messages = window, messages
        self.model, self.framed = decoupled.model, framed
        self.sends_input_gradients = input_gradients
        self._see_context, self._initial_state = see_context, initial_state
        self._windows = Windows(decoupled, self.optimizing, self.metrics, self.accumulate)
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
        """The state that the next window starts from, as the model takes it; None at the start of a
        sequence.
        """
        leaves = self._carried.leaves
        return None if leaves is None else self.framed.pack(leaves)

    @property
    def windows(self) -> list[WindowBatch]:
        """Those under way, oldest first."""
        return self._windows.under_way

    def step(  # type: ignore[override]
        self, x_window: Any, state: Any = None, done: Any = None, target: Any = None
    ) -> WindowReport:
        """Train on one window.

        Args:
            x_window: ``(time, batch, ...)`` or ``(batch, time, ...)``, or a nesting of such
                tensors; up to T steps.
            state: the state to start from; by default the one after the last window, or that of a
                new sequence. With any other state than that one, the last window counts as the end
                of its sequence.
            done: bool, ``(batch,)``, or one for all: whose sequence ends with this window. Its
                state starts anew, and its last gradient is zero. Pad what is shorter than the
                window, and let the loss pass over it.
            target: what the loss takes.

        Returns:
            The window's loss, outputs, comparisons, and the state after it.

        Raises:
            NonFiniteError: a value or gradient is NaN or infinite; nothing is updated.
            DecouplingError: a window, state or ``done`` that does not fit.
        """
        batch = self.framed.check(x_window, self.window)
        states, carried = self._known_states(x_window), self._carried
        carried.check_untouched()
        goes_on = state is None or carried.is_same(state)
        leaves = carried.leaves if goes_on else self.framed.unpack(state)
        if leaves is None:
            leaves = states.initial(batch)
        carried.check_fits(states, leaves, batch)
        before = self._windows.open_ended()
        if before is not None and not goes_on and before.is_held:
            # Its update must come before the next forward.
            self._windows.advance(self.steps, None, before.end)
            before = None
        ended = read_done(done, batch, next(self.model.parameters()).device)
        context = self.objective.context(target)
        values = self._bind(x_window, leaves, context)
        made = WindowBatch(self.decoupled, self.objective, ended, self.steps + 1)
        if goes_on:
            made.previous = before
        known: dict[str, Any] = {}

        def begin() -> None:
            made.begin(values, context, target, self._windows.clock)
            sent = made.state.values
            known["output"] = made.state.output
            known["after"] = [sent[f"next_{n}"].detach() for n in states.names]
            known["messages"] = {
                n: made.state.sent[n] for n, i in made.leaving.items() if i.feeds == ANOTHER
            }
            if before is not None and not goes_on:
                before.end()
            if ended is not None and bool(ended.all()):
                made.end()

        self._windows.advance(self.steps, made, begin)
        self.steps += 1
        after = known["after"]
        if ended is not None:
            after = begin_anew(states, after, states.initial(batch), ended)
        report = self._report(made, known, self.framed.pack(after))
        is_over = ended is not None and bool(ended.all())
        carried.keep(None if is_over else after, report.state)
        return report

    def _report(self, made: WindowBatch, known: dict[str, Any], state: Any) -> WindowReport:
        assert made.state.loss is not None
        return WindowReport(
            made.state.loss * self.accumulate,
            known["output"],
            dict(self.metrics.found),
            self.steps,
            state,
            known["messages"],
            {n: g for n, g in made.sent_back.items() if not n.startswith(STATE)},
        )

    def prepare(self, x_window: Any, target: Any = None) -> ThroughTime:
        """Trace a window without training on it, as the first step would: the plan, the stages and
        the sources are known then, and ``load_state_dict`` finds all that it needs.

        Args:
            x_window: as for :meth:`step`.
            target: asked for where there is a ``context``.

        Returns:
            The trainer.

        Raises:
            DecouplingError: a window that does not fit.
        """
        batch = self.framed.check(x_window, self.window)
        context = self.objective.context(target)
        self._bind(x_window, self._known_states(x_window).initial(batch), context)
        return self

    def _known_states(self, x_window: Any) -> States:
        return self.framed.states or self.framed.find_states(x_window, self._initial_state)

    def _bind(self, x_window: Any, leaves: list[Tensor], context: Tensor | None) -> dict[str, Any]:
        """The window's values by name, its graph active, and an optimiser for everything."""
        states = self._known_states(x_window)
        if context is not None:
            self._see_context(context)
        if self.sends_input_gradients:
            x_window = map_tensors(_fresh, x_window)
        named = {n: _fresh(t) for n, t in zip(states.names, leaves, strict=True)}
        values = self.decoupled.bind(x_window, named)
        self._check_sources()
        self.optimizing.prepare(self.decoupled.graphs, self.stages)
        return values

    def answer(self, gradients: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take what other networks send back for messages: the targets of their sources, or the
        exact gradients.

        Args:
            gradients: by the step of the report that the message came with, the gradient of each
                message by its name.

        Raises:
            DecouplingError: no such step waits for an answer, no such message, a gradient of
                another shape, or only some of the windows that are held together.
        """
        self._windows.answer(gradients, self.steps)

    def reset(self) -> None:
        """Start a new sequence with the next window, for all samples."""
        self.drain()
        self._carried.forget()

    def drain(self) -> int:
        """End what is under way as if nothing followed: what was held for exact gradients is pulled
        back and updated.

        Elsewhere predictions stay without a target. The state is kept.

        Returns:
            How many updates that made.
        """
        return self._windows.drain(self.steps)

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
        self._windows.forget()
        self._carried.forget([t.clone() for t in state.get("carried", [])] or None)

    def _check_sources(self) -> None:
        waiting = [n for n, s in self.decoupled.sources.items() if s.asks.wait and not s.asks.exact]
        if waiting:
            raise DecouplingError(
                f"the source at {waiting[0]!r} waits for a message, which windows cannot: use one "
                "that predicts at once"
            )


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor.detach()
