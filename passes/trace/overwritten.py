"""Places of helper objects that a model's code writes in every call before it reads them.

Such a place carries nothing from one call to the next (the distribution that a policy makes anew of
its network's output, say), so a graph need not write to it. That it is not read first is shown, not
believed: the model is recorded with something there that nobody can read, and with what is there,
and both must give the same graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import TracingError
from ...graphs.pictures import Without
from .contents import Contents
from .traces import Trace

_ASKED = ("bool", "len", "iter", "call", "eq", "hash", "getitem", "add", "mul", "float", "index")


class Overwritten:
    """Those of one model, found while it is traced.

    Attributes:
        keys: of the places, as pictures leave them out.
    """

    def __init__(self) -> None:
        self.keys: Without = frozenset()
        self._places: list[tuple[Contents, Any, str]] = []
        self._refusal: Exception | None = None
        self._shown: str | None = None
        self._was_read = False

    def suspect(self, found: tuple[Contents, Any] | None, refusal: Exception) -> bool:
        """A place that the code has changed may be one of them; False where that is known."""
        if found is None or (id(found[0].owner), found[1]) in self.keys:
            return False
        self._places.append((*found, f"{found[1]!r}"))
        self.keys |= {(id(found[0].owner), found[1])}
        self._refusal, self._shown = self._refusal or refusal, None
        return True

    def hide(self) -> None:
        """Put there what nobody can read, unless that was done; the caller takes it out again."""
        if self._shown is None:
            for kept, place, _ in self._places:
                kept.put(place, _make_unread(self._note))

    def check(self) -> None:
        """After a recording.

        Raises:
            TracingError: one of the places was read first.
        """
        if self._was_read and self._refusal is not None:
            raise self._refusal

    def confirms(self, trace: Trace) -> bool:
        """Whether both recordings were made; notes what the stages leave out.

        Raises:
            TracingError: they differ.
        """
        self.check()
        if not self._places:
            return True
        if self._shown is None:
            self._shown = trace.digest
            return False
        if trace.digest != self._shown and self._refusal is not None:
            raise self._refusal
        names = ", ".join(name for _, _, name in self._places)
        trace.notes += (f"forward writes {names} of a helper object anew in every call: stages "
                        "leave it as it is",)  # fmt: skip
        return True

    def _note(self) -> None:
        self._was_read = True


def _make_unread(note: Callable[[], None]) -> Any:
    def refuse(*_: Any) -> Any:
        note()
        raise TracingError("what an earlier call has left in a helper object is read")

    names = ("__getattribute__", "__setattr__", *(f"__{name}__" for name in _ASKED))
    return type("Unread", (), dict.fromkeys(names, refuse))()
