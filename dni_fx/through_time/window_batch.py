"""One window on its way: what leaves it waits for the next window, or for another network, whose
answers are told apart here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.ports import ANOTHER, STATE
from ..runtime.answers import or_zeros
from ..runtime.batch_state import Setting
from ..runtime.finite import refuse
from ..runtime.in_turn import Batch
from ..runtime.tape import Tape
from ..sources import Served, side_by_side
from .window import along


class WindowBatch(Batch):
    """One window.

    Sources that predict are asked at once. Where the gradient of something that leaves is to be
    exact, the whole window waits for it.

    Args:
        setting: of the sources that predict.
        everyone: all sources of the window's graph.
        step: number of the window, from 1.
        ended: whose sequence ends with the window, ``(batch,)``; None for nobody's.
        previous: the window before, which hears what this one sends back.

    Attributes:
        leaving: what leaves, by name.
        messages: names of what leaves for another network.
        to_itself: names of what the next window takes.
        waits_for: names of what the window waits for.
        torn: whether its graphs have been pulled back, and are gone.
        sent_back: gradients of what the window took, once it has been pulled back.
    """

    def __init__(
        self,
        setting: Setting,
        everyone: Sequence[Served],
        step: int,
        ended: Tensor | None,
        previous: WindowBatch | None,
    ) -> None:
        super().__init__(setting)
        exact = [s for s in everyone if s.source.asks.exact]
        self.step, self.ended, self.previous = step, ended, previous
        self.leaving = {i.name: i for i in self.setting.split.interfaces if i.leaves}
        self.messages = [n for n, i in self.leaving.items() if i.feeds == ANOTHER]
        self.to_itself = [n for n in self.leaving if n not in self.messages]
        self.waits_for = {n for s in exact for n in s.names if n in self.leaving}
        self.torn = False
        self.sent_back: dict[str, Tensor | None] = {}
        leaves = [s for s in everyone if s.leaves]
        self._tracing = [s for s in leaves if s.source.asks.jacobian]
        self._holds = bool(exact or self._tracing)
        for group in (s for s in leaves if s.source.asks.ends):
            group.source.ended = ended if group.name in self.to_itself else None

    @property
    def is_held(self) -> bool:
        """Whether graphs wait to be pulled back."""
        return bool(self.state.progress.tapes)

    @property
    def heard(self) -> set[str]:
        """Names of what has left and was answered."""
        return self.state.progress.heard

    @property
    def has_ended(self) -> bool:
        """Whether the window after this one is known, or that there is none."""
        return self.heard.issuperset(self.to_itself)

    @property
    def input_gradients(self) -> dict[str, Tensor | None]:
        """What has been sent back for the window's own tensors, by name."""
        return {n: g for n, g in self.sent_back.items() if not n.startswith(STATE)}

    # ---- run -------------------------------------------------------------------------------------

    def begin(self, values: dict[str, Any], context: Any, target: Any, now: int = 0) -> None:
        """As for any batch; where some gradient is exact forward only.

        Raises:
            NonFiniteError: a held window's loss or values are not finite.
        """
        if not self._holds:
            super().begin(values, context, target, now)
            return
        # The caller may write into its tensors before the window is pulled back.
        for name in self.setting.split.model_inputs:
            value = values[name]
            values[name] = value.detach().clone().requires_grad_(value.requires_grad)
        state = self.state
        state.values, state.context, state.target = values, context, target
        state.now = state.started = now
        for stage in self.stages:
            tape = stage.forward(stage.receive())
            if stage.is_last:
                stage.evaluate(tape)
            state.progress.tapes[stage.index] = tape
            for group in self._tracing:
                group.source.jacobian = self._jacobian(group, tape)
            for group in stage.sources.groups:
                stage.sources.ask(group, state.values)
        state.note_sent(self.setting)
        assert state.loss is not None
        # Before windows are pulled back that could not be again.
        places = [("the loss", state.loss), *state.sent.items()]
        refuse(places, f"step {self.step}", "nothing was updated")

    def _jacobian(self, group: Served, tape: Tape) -> Tensor | None:
        """Of the state after the window for that before it, ``(batch, features, features)``; None
        at a start.
        """
        if len(self.stages) > 1:
            raise DecouplingError(
                "Traces needs a window in one stage: leave out cuts=, or use another source"
            )
        if self.previous is None:
            return None
        specs = group.source.specs
        after = side_by_side([tape.outputs[n] for n in group.names], specs)
        leaves = [tape.leaves[str(self.leaving[n].feeds)].tensor for n in group.names]
        rows = []
        for i in range(after.shape[1]):
            found = torch.autograd.grad(
                after[:, i].sum(), leaves, retain_graph=True, allow_unused=True
            )
            pairs = zip(found, leaves, strict=True)
            rows.append(side_by_side([or_zeros(g, v) for g, v in pairs], specs))
        return torch.stack(rows, 1)

    # ---- what has left is answered ---------------------------------------------------------------

    def hear(self, name: str, gradient: Tensor | None) -> None:
        """The gradient of something that left."""
        if gradient is not None and self.ended is not None and name in self.to_itself:
            dim = self.leaving[name].spec.batch_dim
            gradient = gradient.masked_fill(along(self.ended, gradient, dim), 0.0)
        self.state.progress.gradients[name] = gradient
        self.heard.add(name)

    def end(self) -> None:
        """No window follows, so nothing flows back to the state."""
        for name in self.to_itself:
            if name not in self.heard:
                self.hear(name, None)

    def advance(self, now: int) -> None:
        """Pull back what was held, once what it waits for is there, and tell the window before."""
        progress, split = self.state.progress, self.setting.split
        self.state.now = now
        if not self.waits_for <= self.heard:
            return
        self.torn = self.is_held
        for index in sorted(progress.tapes, reverse=True):
            stage, tape = self.stages[index], progress.tapes.pop(index)
            assert isinstance(tape, Tape)
            known = progress.gradients | stage.sources.predicted()
            stage.pull_back(tape, {n: known.get(n) for n in split.sent_by(index)})
        if self.sent_back:
            return
        self.sent_back = {n: progress.gradients.get(n) for n in split.incoming}
        if self.previous is not None:
            for name, interface in self.previous.leaving.items():
                if interface.feeds in self.sent_back:
                    self.previous.hear(name, self.sent_back[interface.feeds])
            self.previous = None

    def forget(self) -> None:
        """What has left may be answered still, and waits with the answer."""
        state, leaving = self.state, self.leaving
        waiting = {n: v for n, v in state.sent.items() if n in leaving and n not in self.heard}
        gradients = state.progress.gradients
        answers = {n: g for n, g in gradients.items() if n in leaving and self.is_held}
        super().forget()
        state.sent |= waiting
        state.progress.gradients |= answers


def find_answers(
    gradients: Mapping[int, Mapping[str, Tensor]],
    under_way: Sequence[WindowBatch],
    decoupled: Decoupled,
    steps: int,
) -> list[tuple[WindowBatch, str, Tensor]]:
    """The windows that answers are for, with the message and its gradient; see
    :meth:`dni_fx.recurrent.ThroughTime.answer`.
    """
    windows = {w.step: w for w in under_way}
    messages = [i.name for i in decoupled.interfaces if i.feeds == ANOTHER]
    found: list[tuple[WindowBatch, str, Tensor]] = []
    for step, name in [(step, name) for step, answers in gradients.items() for name in answers]:
        if name not in messages or not 1 <= step <= steps:
            raise DecouplingError(
                f"answer to step {step}, message {name!r}: there was no such step, or the model "
                "sends no such message"
            )
        window, gradient = windows.get(step), gradients[step][name]
        if window is None or name in window.heard:
            asks = decoupled.sources[name].asks
            if "gradient" in asks.learns_from or asks.exact:
                raise DecouplingError(
                    f"message {name!r} of step {step} does not wait for an answer (any more)"
                )
            continue  # too late, but nothing would be learnt from it
        expected = window.state.sent[name].shape
        if gradient.shape != expected:
            raise DecouplingError(
                f"the gradient of message {name!r} has shape {tuple(gradient.shape)}, but "
                f"the message {tuple(expected)}"
            )
        found.append((window, name, gradient.detach()))
    _check_held(under_way, {(w.step, n) for w, n, _ in found})
    return found


def close(held: Sequence[WindowBatch]) -> None:
    """End held windows as if nothing followed them."""
    for window in held:
        for name in window.waits_for - window.heard:
            if window is held[-1] or name in window.messages:
                window.hear(name, None)


def _check_held(windows: Sequence[WindowBatch], new: set[tuple[int, str]]) -> None:
    """Windows that are held for messages are pulled back together, with all their answers."""
    held = {w: w.waits_for - w.heard for w in windows if w.is_held}
    open_ = {w: {n for n in names if (w.step, n) not in new} for w, names in held.items()}
    if not new or all(open_.values()):
        return
    for window, names in open_.items():
        if missing := sorted(names.intersection(window.messages)):
            raise DecouplingError(
                "with these answers a window is pulled back and the weights are updated, but step "
                f"{window.step} is held, too, and waits for {', '.join(map(repr, missing))}: "
                "answer all held windows in one call"
            )
