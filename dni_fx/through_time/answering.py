"""Answers to messages of windows under way: what they are for, and whether they may come now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.ports import ANOTHER
from .window_batch import WindowBatch


def find_answers(
    gradients: Mapping[int, Mapping[str, Tensor]],
    under_way: Sequence[WindowBatch],
    decoupled: Decoupled,
    steps: int,
) -> list[tuple[WindowBatch, str, Tensor]]:
    """The windows that answers are for, with the message and its gradient.

    Args:
        gradients: by the step of a window, and message.
        under_way: the windows that something is still expected for.
        decoupled: the model.
        steps: number of windows so far.

    Raises:
        DecouplingError: see :meth:`dni_fx.recurrent.ThroughTime.answer`.
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
    held = {
        w: {n for n in w.waits_for - w.heard if (w.step, n) not in new}
        for w in windows
        if w.is_held
    }
    missing = {w: names.intersection(w.messages) for w, names in held.items()}
    left = [w for w, names in missing.items() if names]
    if new and left and not all(held.values()):
        raise DecouplingError(
            "with these answers a window is pulled back and the weights are updated, but step "
            f"{left[0].step} is held, too, and waits for "
            f"{', '.join(map(repr, sorted(missing[left[0]])))}: answer all held windows in one call"
        )
