"""Leaving a model and the random generators as they were."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .contents import Contents
from .reach import Reach
from .settings import accelerator, drawing_devices, kept_settings
from .storages import Tensors, Watch

MODULE_INTERNALS = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def no_kept_casts() -> Iterator[None]:
    """Autocast keeps cast weights until its outermost region ends: fake ones must not get out, nor
    real ones in.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()  # regions inside may have switched it on


class Changes:
    """What a run changed, before that was undone.

    Attributes:
        reached: identities of the tensors that were there before, while the run lasts.
        tensors: that were written to, and whether they were given other memory.
        contents: of objects, containers, closures and globals.
    """

    def __init__(self, reached: Iterable[int] = ()) -> None:
        self.reached = frozenset(reached)
        self.tensors: list[tuple[torch.Tensor, bool]] = []
        self.contents: list[Contents] = []

    def without(self, copied: Iterable[torch.Tensor]) -> Changes:
        """Those that are not undone where copies of some tensors are copied back."""
        own = {id(t) for t in copied}
        other = Changes()
        other.contents = self.contents
        other.tensors = [(t, moved) for t, moved in self.tensors if moved or id(t) not in own]
        return other

    def keep(self) -> Callable[[], None]:
        """Remember the same things now; the result puts them back."""
        if not self.tensors and not self.contents:
            return _nothing
        contents = [c.again() for c in self.contents]
        tensors = Tensors([t for t, _ in self.tensors], whole=True)

        def put_back() -> None:
            for kept in contents:
                kept.restore()
            tensors.restore()

        return put_back


def _nothing() -> None:
    """To put back."""


@contextlib.contextmanager
def restored(*roots: Any, whole: bool = False) -> Iterator[Changes]:
    """While a model is traced, checked, measured or asked whether a graph still holds: whatever
    happens to it, and to all that it can reach, is undone.

    What is kept, and why so. *Memory* of parameters, buffers and other tensors, and how these see
    it (``storages``): ``p.data = ...``, ``resize_`` and writes through ``.data`` tell no tensor.
    *Contents* of every object, container, closure and named global that can be reached
    (``reach``), in place: others may hold the same object. *Memories of functions*, which nobody
    can open, are replaced by stand-ins that read but do not write (``caches``). Random generators,
    those held by objects too, and torch's settings for the process (``settings``).

    Args:
        *roots: the model, and the arguments of the call.
        whole: copy all memory at once instead of watching operators, so that the model runs outside
            any mode.

    Returns:
        What was there, while it lasts; what the run changed, known when it is over.
    """
    reach = Reach(roots)
    tensors = Tensors(reach.tensors, whole)
    watch = Watch(tensors) if tensors.waiting else contextlib.nullcontext()
    changes = Changes(map(id, reach.tensors))
    with contextlib.ExitStack() as undo:  # last first, and each whatever befalls the others
        undo.callback(setattr, changes, "reached", frozenset())
        undo.callback(kept_settings())
        undo.callback(preserved_rng())
        undo.callback(lambda: changes.tensors.extend(tensors.restore()))
        undo.callback(lambda: changes.contents.extend(reach.restore()))
        reach.send_stand_ins()
        with no_kept_casts(), watch:
            yield changes


def rng_state() -> dict[str, Any]:
    """The random states of torch, of every device of the accelerator in use, of Python and NumPy.

    Returns:
        ``torch``, ``python``, ``devices`` (a list by the accelerator's type, empty where none was
        used), and ``numpy`` where that is imported: values that ``torch.load`` takes as they are.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    kind, module, _ = accelerator()
    used = drawing_devices()
    state["devices"] = {kind: [module.get_rng_state(d) for d in used]} if used else {}
    numpy = sys.modules.get("numpy.random")
    if numpy:
        found = numpy.get_state(legacy=False)
        inner = {
            k: v if isinstance(v, int) else torch.from_numpy(v) for k, v in found["state"].items()
        }
        state["numpy"] = found | {"state": inner}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned, wherever its tensors are now.

    Args:
        state: parts that are missing leave their generators alone, as do devices that are not here;
            ``cuda`` is what trainers saved before there was ``devices``.
    """
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, module, devices = accelerator()
    saved = state.get("devices", {"cuda": state.get("cuda", [])}).get(kind, [])
    for content, device in zip(saved, devices, strict=False):
        module.set_rng_state(content.cpu(), device)
    if "numpy" in state:
        numpy, found = importlib.import_module("numpy.random"), state["numpy"]
        inner = {k: v if isinstance(v, int) else v.cpu().numpy() for k, v in found["state"].items()}
        numpy.set_state(found | {"state": inner})


def preserved_rng() -> Callable[[], None]:
    """Remember the random states; the result puts them back."""
    return partial(set_rng_state, rng_state())


def python_draws() -> Any:
    """State of Python's and NumPy's generators, to notice that a model drew from them."""
    numpy = sys.modules.get("numpy.random")
    state = numpy.get_state() if numpy else None
    return random.getstate(), state and (state[1][0], state[2])
