"""Windows of a loader: taken apart, and judged one after the other with the state that is carried.

A batch is ``(x, target)``, ``(x, target, done)``, or a mapping with ``"target"`` or ``"labels"``
beside ``"x_window"`` and, if need be, ``"done"`` and ``"state"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graphs.nested import flatten, unpack_batch
from ..runtime.evaluating import Means
from .carried import Carried, read_done
from .window import Window


def unpack_window(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch as ``(args, kwargs, target)`` of ``step``.

    Raises:
        DecouplingError: a batch of another form.
    """
    if isinstance(batch, tuple | list) and len(batch) == 3:
        x, target, done = batch
        return (x,), {"done": done}, target
    return unpack_batch(batch)


def judge(framed: Window, means: Means) -> Callable[[tuple[Any, ...], dict[str, Any], Any], None]:
    """What runs one window after the other from a state of its own, which starts with a new
    sequence.

    A metric that is one number counts as often as a window has samples and steps.

    Args:
        framed: the model over one window.
        means: what is added to.
    """
    carried, device = Carried(), next(framed.model.parameters()).device

    def run(x_window: Any, state: Any = None, done: Any = None, *, target: Any) -> None:
        batch = framed.check(x_window, most=None)
        states = framed.known_states(x_window)
        leaves = carried.leaves if state is None else framed.unpack(state)
        leaves = states.initial(batch) if leaves is None else leaves
        carried.check_fits(states, leaves, batch)
        output, after = framed(x_window, dict(zip(states.names, leaves, strict=True)))
        means.add(output, target, _size(framed, x_window))
        left, ended = list(after.values()), read_done(done, batch, device)
        if ended is not None and bool(ended.all()):
            carried.keep()
        else:
            carried.keep(left if ended is None else states.begin_anew(left, ended, False))

    return lambda args, kwargs, target: run(*args, **kwargs, target=target)


def _size(framed: Window, x_window: Any) -> int:
    """Samples times steps of a window."""
    first = flatten(x_window)[0][0]
    if framed.stateless:
        return len(first)
    return int(first.shape[framed.time_dim] * first.shape[framed.batch_dim])
