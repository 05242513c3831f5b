"""Decoupled through time: a recurrent model trained window by window, each ending in a synthetic
gradient.

Backpropagation through time unrolls a whole sequence; truncated to windows of ``T`` steps it is
blind to everything that an earlier window should have done for a later one. Here a window ends in a
prediction of what all later windows would send back to its last state, so that memory is a window's
and credit reaches further (Jaderberg et al. 2016, arXiv:1608.05343, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.refusals import check_whole
from ..decoupled import Decoupled, Stage
from ..errors import DecouplingError
from ..graphs.nested import flatten, map_tensors
from ..passes.cut.insertion import Gradients
from ..passes.trace.ports import ANOTHER, STATE
from ..plan import CutPlan, Interface, TensorSpec
from ..reports.steps import StepReport
from ..runtime.in_turn import Run
from ..runtime.optimizing import MakeOptimizer
from ..runtime.trainer import Trainer
from ..sources import AcrossTime, GradientSource, Joint
from .opening import WindowOpening, decouple_window
from .states import InitialState, States
from .window import Window
from .window_batch import WindowRun, along


def decouple_through_time(
    model: nn.Module,
    window: int,
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: MakeOptimizer,
    synthesizer_optimizer: MakeOptimizer = torch.optim.Adam,
    gradients: Gradients = "auto",
    factor: float = 0.1,
    auxiliary: bool | float = False,
    cuts: Sequence[str] = (),
    context: Callable[[Any], Tensor] | None = None,
    initial_state: InitialState | None = None,
    unroll: bool | None = None,
    batch_first: bool | None = None,
    messages: Sequence[str] = (),
    message_factor: float = 1.0,
    input_gradients: bool = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    metrics_every: int = 50,
    check: bool = True,
) -> ThroughTime:
    """Train a recurrent model on windows of a sequence, with synthetic gradients at their ends.

    The graph of a window is traced at the first step and cut at its end: the state leaves, a source
    predicts the gradient for it, and what flows back to the next window's first state is that
    source's target.

    Args:
        model: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, stacked or not; one of their cells; a model
            ``(x, state) -> (y, state)`` with any nesting of tensors as its state, of single steps,
            or of windows where it holds one of the former; or a model of ``x`` alone that holds
            such modules, whose state is then found and carried.
        window: T, the most time steps in one window.
        loss: ``loss(output, target)`` of one window, a scalar.
        optimizer: makes an optimiser from ``(name, parameter)`` pairs, as for
            :class:`dni_fx.Trainer`.
        synthesizer_optimizer: the same for the sources.
        gradients: what predicts: ``"auto"`` (an MLP on all tensors of the state together),
            ``"linear"``, ``"mlp"``, a factory; ``"zero"`` is truncated backpropagation through
            time, ``"exact"`` the full one, which keeps every window until all sequences of the
            batch have ended in one step; or a mapping from interface name to either
            (``next_hidden``, ...).
        factor: on the predicted gradient, on use; 0.1 as in the paper.
        auxiliary: predict the next prediction from the state, too; a number is the weight of that
            loss.
        cuts: names to cut after within a window, say ``"rnn.layer_0"`` of a stacked ``rnn``: these
            stages are decoupled from each other as by :func:`dni_fx.decouple`.
        context: from a window's target to a float tensor ``(batch, features)`` that the sources at
            its end see.
        initial_state: from the batch size to the state at the start of a sequence; zeros by
            default.
        unroll: whether the model takes single steps; by default it does unless it is or holds an
            ``nn.LSTM`` or such.
        batch_first: whether windows are ``(batch, time, ...)``; by default as the model's recurrent
            modules have it, else ``(time, batch, ...)``.
        messages: keys of the model's output, a dict, whose tensors ``(batch, ...)`` go to another
            network, which answers with their gradients (:meth:`ThroughTime.answer`); each has a
            source of its own, ``"exact"`` to wait.
        message_factor: on the predicted gradient of messages.
        input_gradients: give back the gradient of the windows' float tensors, for whoever sent
            them.
        clip_norm, accumulate, metrics_every: as for :class:`dni_fx.Trainer`.
        check: compare the traced window with the model at the first step.

    Returns:
        An object to train with: ``step(x_window, state=None, done=None, target=None)``.

    Raises:
        DecouplingError: arguments that do not fit together, or a model whose state cannot be
            carried.

    Source:
        Jaderberg et al. 2016, arXiv:1608.05343, section 2.2.
    """
    check_whole(model)
    if type(window) is not int or window < 1:
        raise DecouplingError(f"window={window!r}: expected a number of time steps, at least 1")
    numbers = {"factor": factor, "auxiliary": auxiliary, "message_factor": message_factor}
    for name, number in numbers.items():
        if not isinstance(number, int | float) or number < 0:
            raise DecouplingError(f"{name}={number!r}: expected a number, at least 0")
    if isinstance(messages, str):
        raise DecouplingError(
            f"messages={messages!r}: pass a list of keys, messages=[{messages!r}]"
        )
    framed = Window(
        model, unroll, batch_first, layered=bool(cuts), stateless=bool(messages) or input_gradients
    )
    if messages and framed.unrolls:
        raise DecouplingError(
            f"{type(model).__name__} takes single steps, so that it would send a message at each "
            "of them: let the model take windows, with its steps inside, and send one message for "
            "each"
        )
    serving = _Serving(factor, float(auxiliary), message_factor)
    opening = WindowOpening(framed, serving, tuple(messages), input_gradients)
    decoupled = decouple_window(opening, cuts, gradients, check)
    return ThroughTime(
        decoupled,
        framed,
        window,
        serving,
        messages=tuple(messages),
        input_gradients=input_gradients,
        loss=loss,
        optimizer=optimizer,
        synthesizer_optimizer=synthesizer_optimizer,
        context=context,
        initial_state=initial_state,
        clip_norm=clip_norm,
        accumulate=accumulate,
        metrics_every=metrics_every,
    )


class _Serving:
    """Makes the sources at the end of a window: one for all tensors of the state that ask for the
    same.
    """

    def __init__(self, factor: float, auxiliary: float, message_factor: float) -> None:
        self.factor, self.auxiliary, self.message_factor = factor, auxiliary, message_factor
        self.context: TensorSpec | None = None
        self.known: list[tuple[Any, Joint]] = []

    def serve(self, interface: Interface, option: Any) -> Any:
        if option == "exact":
            return "joint:exact"
        if interface.feeds == ANOTHER:
            return partial(AcrossTime, source=option, factor=self.message_factor)
        for asked, joint in self.known:
            if asked is option or asked == option:
                return joint
        made = Joint(
            partial(AcrossTime, source=option, factor=self.factor, auxiliary=self.auxiliary)
        )
        self.known.append((option, made))
        return made


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


class ThroughTime(Trainer):
    """Trains a recurrent model window by window; made by :func:`decouple_through_time`.

    Attributes:
        window: T, the most time steps in one window.
        messages: names of what goes to other networks.
        model: the user's, trained in place.
        decoupled: its stages and sources.
    """

    def __init__(
        self,
        decoupled: Decoupled,
        framed: Window,
        window: int,
        serving: _Serving,
        *,
        context: Callable[[Any], Tensor] | None,
        initial_state: InitialState | None,
        messages: tuple[str, ...],
        input_gradients: bool,
        loss: Callable[[Any, Any], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(decoupled, loss, **options)
        self.window, self.messages = window, messages
        self.model = decoupled.model
        self._framed, self._serving = framed, serving
        self._make_context, self._initial_state = context, initial_state
        self._input_gradients = input_gradients
        self._current: Run | None = None  # the window under way now
        self._shapes: dict[
            int, list[tuple[torch.Size, torch.dtype]]
        ] = {}  # of the state, by batch size
        self._state: list[Tensor] | None = None
        self._handed: list[tuple[Tensor, int]] = []  # the state as the last report has it

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
        return None if self._state is None else self._framed.pack(self._state)

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
        batch = self._check_window(x_window)
        states = self._known_states(x_window)
        given = None if state is None else self._framed.unpack(state)
        self._check_untouched()
        goes_on = state is None or self._is_carried(state)
        leaves = self._state if goes_on else given
        if leaves is None:
            leaves = states.initial(batch)
        self._check_state(leaves, batch)
        waiting = [r for r in self._under_way if isinstance(r, WindowRun) and not r.has_ended]
        if waiting and not goes_on and waiting[-1].tapes:
            self._advance(None, waiting[-1].end)  # its update must come before the next forward
            waiting = []
        ended = self._ended(done, batch, next(self.model.parameters()).device)
        context = (
            None if self._make_context is None or target is None else self._make_context(target)
        )
        values = self._bind(x_window, leaves, context)
        run = WindowRun(self.decoupled, self._scaled_loss, self.loss, ended, self.steps + 1)
        output: list[Any] = []
        after: list[Tensor] = []
        messages: dict[str, Tensor] = {}

        def begin() -> None:
            run.previous = waiting[-1] if waiting and goes_on else None
            run.begin(values, context, target, self._clock)
            output.append(run.output)
            after.extend(run.values[f"next_{n}"].detach() for n in states.names)
            messages.update({n: run.sent[n] for n, i in run.leaving.items() if i.feeds == ANOTHER})
            if waiting and not goes_on:
                waiting[-1].end()
            if ended is not None and bool(ended.all()):
                run.end()

        self._advance(run, begin)
        if ended is not None:
            after = self._reset(after, states.initial(batch), ended)
        self._state = None if ended is not None and bool(ended.all()) else after
        self.steps += 1
        assert run.loss is not None
        back = {n: g for n, g in run.sent_back.items() if not n.startswith(STATE)}
        loss, state = run.loss * self.accumulate, self._framed.pack(after)
        self._handed = [] if self._state is None else [(t, t._version) for t in flatten(state)[0]]
        return WindowReport(
            loss, output[0], dict(self._measured), self.steps, state, messages, back
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
        batch = self._check_window(x_window)
        context = (
            None if self._make_context is None or target is None else self._make_context(target)
        )
        self._bind(x_window, self._known_states(x_window).initial(batch), context)
        return self

    def _known_states(self, x_window: Any) -> States:
        return self._framed.states or self._framed.find_states(x_window, self._initial_state)

    def _bind(self, x_window: Any, leaves: list[Tensor], context: Tensor | None) -> dict[str, Any]:
        """The window's values by name, its graph active, and an optimiser for everything."""
        states = self._known_states(x_window)
        if context is not None and self._serving.context is None:
            self._serving.context = TensorSpec(tuple(context.shape), context.dtype)
        if self._input_gradients:
            x_window = map_tensors(_fresh, x_window)
        named = {n: _fresh(t) for n, t in zip(states.names, leaves, strict=True)}
        values = self.decoupled.bind(x_window, named)
        self._make_optimizers()
        self._check_sources()
        self._adopt_parameters()
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
        runs = {r.step: r for r in self._under_way if isinstance(r, WindowRun)}
        found: list[tuple[WindowRun, str, Tensor]] = []
        for step, answers in gradients.items():
            for name, gradient in answers.items():
                interface = next(
                    (i for i in self.decoupled.interfaces if i.name == name and i.feeds == ANOTHER),
                    None,
                )
                if interface is None or not 1 <= step <= self.steps:
                    raise DecouplingError(
                        f"answer to step {step}, message {name!r}: there was no such step, or the "
                        "model sends no such message"
                    )
                if step not in runs or name in runs[step].heard:
                    if (
                        "gradient" in self.decoupled.sources[name].message
                        or self.decoupled.sources[name].exact
                    ):
                        raise DecouplingError(
                            f"message {name!r} of step {step} does not wait for an answer (any "
                            "more)"
                        )
                    continue  # nothing is learnt from it
                if gradient.shape != runs[step].sent[name].shape:
                    raise DecouplingError(
                        f"the gradient of message {name!r} has shape {tuple(gradient.shape)}, but "
                        f"the message {tuple(runs[step].sent[name].shape)}"
                    )
                found.append((runs[step], name, gradient.detach()))

        new = {(run.step, name) for run, name, _ in found}
        held = {
            r.step: {n for n in r.waits_for - r.heard if (r.step, n) not in new}
            for r in runs.values()
            if r.tapes
        }
        held_back = {
            step: {n for n in names if runs[step].leaving[n].feeds == ANOTHER}
            for step, names in held.items()
        }
        if (
            found
            and not all(held.values())
            and (left := [step for step, names in held_back.items() if names])
        ):
            raise DecouplingError(
                "with these answers a window is pulled back and the weights are updated, but step "
                f"{left[0]} is held, too, and waits for "
                f"{', '.join(map(repr, sorted(held_back[left[0]])))}: answer all held windows in "
                "one call"
            )

        def deliver() -> None:
            for run, name, gradient in found:
                run.hear(name, gradient)

        if found:
            self._advance(None, deliver)

    def reset(self) -> None:
        """Start a new sequence with the next window, for all samples."""
        self.drain()
        self._state, self._handed = None, []

    def drain(self) -> int:
        """End what is under way as if nothing followed: what was held for exact gradients is pulled
        back and updated.

        Elsewhere predictions stay without a target. The state is kept.

        Returns:
            How many updates that made.
        """
        held = [r for r in self._under_way if isinstance(r, WindowRun) and r.tapes]

        def close() -> None:
            for run in held:
                for name in run.waits_for - run.heard:
                    if run is held[-1] or run.leaving[name].feeds == ANOTHER:
                        run.hear(name, None)

        if held:
            self._advance(None, close)
        self._under_way = []
        return bool(held)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Trainer.state_dict`, with the state that the next window starts from.

        Raises:
            DecouplingError: a window waits for the next one; call :meth:`drain` first.
        """
        carried = [] if self._state is None else [t.detach().clone() for t in self._state]
        return {**super().state_dict(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`Trainer.load_state_dict`."""
        super().load_state_dict(state)
        self._state, self._handed = [t.clone() for t in state.get("carried", [])] or None, []

    def true_gradients(self, *args: Any, target: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Refuse: the true gradient of a window's end is only known when the sequence has ended.

        Raises:
            DecouplingError: always.
        """
        raise DecouplingError(
            "the true gradient at the end of a window depends on all windows after it: train a "
            "copy of the model with gradients='exact' and compare, or read report.interfaces, "
            "which compares with the next window's target"
        )

    diagnose = diagnose_parameters = true_gradients  # type: ignore[assignment]

    # ---- parts -----------------------------------------------------------------------------------

    def _check_window(self, x: Any) -> int:
        leaves = flatten(x)[0]
        if self._framed.stateless:
            return int(leaves[0].shape[0]) if leaves and leaves[0].dim() else 0
        time, batch = self._framed.time_dim, self._framed.batch_dim
        layout = "(batch, time, ...)" if self._framed.batch_first else "(time, batch, ...)"
        if not leaves or any(t.dim() < 2 for t in leaves):
            found = [tuple(t.shape) for t in leaves] or type(x).__name__
            raise DecouplingError(
                f"a window must be a tensor, or several, of shape {layout}, but is {found}"
            )
        sizes = {(t.shape[time], t.shape[batch]) for t in leaves}
        if len(sizes) > 1:
            raise DecouplingError(
                f"the tensors of a window must agree in time and batch, {layout}, but are {sizes}"
            )
        ((steps, count),) = sizes
        if steps < 1 or count < 1:
            raise DecouplingError(f"a window of shape {tuple(leaves[0].shape)}, {layout}, is empty")
        if steps > self.window:
            raise DecouplingError(
                f"this window has {steps} time steps ({layout}, shape {tuple(leaves[0].shape)}), "
                f"but window={self.window}: split the sequence into windows of at most "
                f"{self.window}, for example x.split({self.window}, dim={time}); the last one may "
                "be shorter"
            )
        return int(count)

    def _is_carried(self, state: Any) -> bool:
        """Whether a state is the one of the last report: the same memory, detached or not."""
        leaves = flatten(state)[0]
        if self._state is None or len(leaves) != len(self._handed):
            return False
        place = lambda t: (t.data_ptr(), t.storage_offset(), t.shape, t.stride())  # noqa: E731
        return all(place(a) == place(b) for a, (b, _) in zip(leaves, self._handed, strict=True))

    def _check_untouched(self) -> None:
        if any(t._version != version for t, version in self._handed):
            raise DecouplingError(
                "report.state was written to in place, but gradients still flow back through what "
                "it was: use done= to start samples anew, or pass a new state (a clone)"
            )

    def _check_state(self, leaves: list[Tensor], batch: int) -> None:
        assert self._framed.states is not None
        if batch not in self._shapes:
            self._shapes[batch] = [(t.shape, t.dtype) for t in self._framed.states.initial(batch)]
        for name, a, (shape, dtype) in zip(
            self._framed.states.names, leaves, self._shapes[batch], strict=True
        ):
            if a.shape != shape or a.dtype != dtype:
                raise DecouplingError(
                    f"tensor {name!r} of the state has shape {tuple(a.shape)}, {a.dtype}, but a "
                    f"window of batch {batch} needs {tuple(shape)}, {dtype}: batch and dtype may "
                    "change only where all sequences have ended (done=True, or reset())"
                )

    def _ended(self, done: Any, batch: int, device: torch.device) -> Tensor | None:
        if done is None or done is False:
            return None
        if done is True:
            return torch.ones(batch, dtype=torch.bool, device=device)
        if not isinstance(done, Tensor) or done.dtype != torch.bool or done.shape != (batch,):
            found = (
                f"{done.dtype}, {tuple(done.shape)}"
                if isinstance(done, Tensor)
                else repr(done)[:40]
            )
            raise DecouplingError(
                f"done must be True, False or a bool tensor of shape ({batch},), one for each "
                f"sample: whether its sequence ends with this window; got {found}. A sequence that "
                "ends within a window is padded to its end"
            )
        return done.to(device) if bool(done.any()) else None

    def _advance(self, run: Run | None, begin: Callable[[], None]) -> None:
        """As every trainer; a failure after graphs were pulled back costs the sequences that were
        held.
        """
        self._current = run
        try:
            super()._advance(run, begin)
        except BaseException:
            if any(isinstance(r, WindowRun) and r.torn and r.tapes for r in self._under_way):
                self._under_way = []
            raise

    def _update(self) -> None:
        held = any(isinstance(r, WindowRun) and r.tapes for r in [*self._under_way, self._current])
        if held and any(p.grad is not None for p in self.model.parameters()):
            raise DecouplingError(
                "accumulate= counts windows, and this update would come while later windows are "
                "held for exact gradients, which it would spoil: leave it out, or let updates come "
                "at the ends of sequences"
            )
        super()._update()

    def _check_sources(self) -> None:
        waiting = [
            n for n, s in self.decoupled.sources.items() if s.lag is not None and not s.exact
        ]
        if waiting:
            raise DecouplingError(
                f"the source at {waiting[0]!r} waits for a message, which windows cannot: use one "
                "that predicts at once"
            )

    def _reset(self, after: list[Tensor], initial: list[Tensor], ended: Tensor) -> list[Tensor]:
        assert self._framed.states is not None
        dims = self._framed.states.batch_dims
        whole = bool(ended.all())
        return [
            (b if whole else a) if dim is None else torch.where(along(ended, a, dim), b, a)
            for a, b, dim in zip(after, initial, dims, strict=True)
        ]


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor.detach()
