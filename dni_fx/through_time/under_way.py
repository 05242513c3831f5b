"""The windows under way: run, answered, ended, in an order that keeps what is held unspoilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.ports import ANOTHER
from ..runtime.in_turn import InTurn
from ..runtime.objective import Metrics
from ..runtime.optimizing import StageOptimizers
from .window_batch import WindowBatch


class Windows:
    """Windows that something is still expected for.

    Args:
        decoupled, optimizers, metrics, accumulate: as for :class:`InTurn`.
    """

    def __init__(
        self, decoupled: Decoupled, optimizers: StageOptimizers, metrics: Metrics, accumulate: int
    ) -> None:
        self.decoupled = decoupled
        self._in_turn: InTurn[WindowBatch] = InTurn(decoupled, optimizers, metrics, accumulate)

    @property
    def under_way(self) -> list[WindowBatch]:
        """The windows, oldest first."""
        return list(self._in_turn.under_way)

    @property
    def clock(self) -> int:
        """Steps of time made."""
        return self._in_turn.clock

    def open_ended(self) -> WindowBatch | None:
        """The newest window that another one may follow."""
        return next((w for w in reversed(self.under_way) if not w.has_ended), None)

    def forget(self) -> None:
        """Expect nothing any more."""
        self._in_turn.under_way = []

    def advance(self, steps: int, new: WindowBatch | None, begin: Callable[[], None]) -> None:
        """One step of time; a failure after graphs were pulled back costs the sequences that were
        held.

        Args:
            steps: number of windows before this one.
            new: the new one; None where others are answered or ended.
            begin: runs it, or answers.

        Raises:
            DecouplingError: an update would spoil what is held.
        """
        try:
            self._in_turn.advance(steps, new, begin, self._check_update)
        except BaseException:
            if any(w.torn and w.is_held for w in self.under_way):
                self.forget()
            raise

    def _check_update(self, windows: Sequence[WindowBatch]) -> None:
        parameters = self.decoupled.model.parameters()
        if any(w.is_held for w in windows) and any(p.grad is not None for p in parameters):
            raise DecouplingError(
                "accumulate= counts windows, and this update would come while later windows are "
                "held for exact gradients, which it would spoil: leave it out, or let updates come "
                "at the ends of sequences"
            )

    def answer(self, gradients: Mapping[int, Mapping[str, Tensor]], steps: int) -> None:
        """See :meth:`dni_fx.recurrent.ThroughTime.answer`.

        Args:
            gradients: by window and message.
            steps: number of windows so far.
        """
        windows = {w.step: w for w in self.under_way}
        found: list[tuple[WindowBatch, str, Tensor]] = []
        for step, answers in gradients.items():
            for name, gradient in answers.items():
                window = windows.get(step)
                self._check_known(step, name, steps)
                if window is None or name in window.heard:
                    self._check_unheard(step, name)
                    continue
                expected = window.state.sent[name].shape
                if gradient.shape != expected:
                    raise DecouplingError(
                        f"the gradient of message {name!r} has shape {tuple(gradient.shape)}, but "
                        f"the message {tuple(expected)}"
                    )
                found.append((window, name, gradient.detach()))
        _check_held(list(windows.values()), {(w.step, n) for w, n, _ in found})

        def deliver() -> None:
            for window, name, gradient in found:
                window.hear(name, gradient)

        if found:
            self.advance(steps, None, deliver)

    def _check_known(self, step: int, name: str, steps: int) -> None:
        sent = [i.name for i in self.decoupled.interfaces if i.feeds == ANOTHER]
        if name not in sent or not 1 <= step <= steps:
            raise DecouplingError(
                f"answer to step {step}, message {name!r}: there was no such step, or the model "
                "sends no such message"
            )

    def _check_unheard(self, step: int, name: str) -> None:
        """An answer that comes too late may be passed over where nothing is learnt from it."""
        asks = self.decoupled.sources[name].asks
        if "gradient" in asks.learns_from or asks.exact:
            raise DecouplingError(
                f"message {name!r} of step {step} does not wait for an answer (any more)"
            )

    def drain(self, steps: int) -> int:
        """See :meth:`dni_fx.recurrent.ThroughTime.drain`."""
        held = [w for w in self.under_way if w.is_held]

        def close() -> None:
            for window in held:
                for name in window.waits_for - window.heard:
                    if window is held[-1] or window.leaving[name].feeds == ANOTHER:
                        window.hear(name, None)

        if held:
            self.advance(steps, None, close)
        self.forget()
        return bool(held)


def _check_held(windows: list[WindowBatch], new: set[tuple[int, str]]) -> None:
    """Windows that are held for messages are pulled back together, with all their answers."""
    held = {
        w: {n for n in w.waits_for - w.heard if (w.step, n) not in new}
        for w in windows
        if w.is_held
    }
    missing = {w: {n for n in names if w.leaving[n].feeds == ANOTHER} for w, names in held.items()}
    left = [w for w, names in missing.items() if names]
    if new and left and not all(held.values()):
        raise DecouplingError(
            "with these answers a window is pulled back and the weights are updated, but step "
            f"{left[0].step} is held, too, and waits for "
            f"{', '.join(map(repr, sorted(missing[left[0]])))}: answer all held windows in one call"
        )
