"""What a model's code changes outside of the model: globals, classes, closures, defaults.

A graph does not do it again: a list stays empty, a counter stands still. What code fills once is
none of this, as long as it does not depend on the values of tensors: a table of constants, a cache.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...graphs.nested import flatten
from ...graphs.pictures import picture
from .calls import Fill
from .containers import is_traced
from .contents import MISSING, Contents, OfDict, OfIterator, OfSequence, OfState
from .naming import hidden_tensor, hidden_tensors

_UNFILLED = (None, False)
Depends = Callable[[torch.Tensor], bool]
Elsewhere = Callable[[Any, Any], bool]


class Watched:
    """Things that code changes without being their module's own: globals, closures, helper
    objects, another module's attributes.

    Args:
        contents: of these.
        model: whose modules' own attributes are among them.

    Attributes:
        filled: what the code has left in places that held nothing.
        refused: the place that has changed.
    """

    def __init__(self, contents: Sequence[Contents], model: nn.Module) -> None:
        self._contents = contents
        self._owners = _owners(model) if contents else {}
        self.refused: tuple[Contents, Any] | None = None
        self.filled: dict[tuple[int, Any], tuple[Contents, Any, Any]] = {}
        self.look()

    def look(self, within: Sequence[str] = ()) -> None:
        """Take what they hold now for given, but for attributes of the modules whose code runs."""
        self._contents = [
            kept if self._is_of(within, kept) else kept.again() for kept in self._contents
        ]

    def settle(self, path: str) -> None:
        """What a module holds itself was looked at by others: take it for given."""
        own = [kept.again() if self._is_of((path,), kept) else kept for kept in self._contents]
        self._contents = own

    def changed(
        self, within: Sequence[str], depends: Depends, elsewhere: Elsewhere = lambda *_: False
    ) -> str | None:
        """What has changed since the last look, in words.

        Args:
            within: paths of the modules whose code runs; each looks at its own attributes itself.
            depends: whether a tensor depends on values of the call.
            elsewhere: whether others look at a place of an owner.
        """
        for kept in self._contents:
            if self._is_of(within, kept):
                continue
            owner = self._owners.get(id(kept.owner))
            filled: list[Any] = []
            if found := _difference(kept, depends, elsewhere, filled):
                words, place = found
                helper = owner is None and isinstance(kept, OfDict)
                self.refused = (kept, place) if helper else None
                return f"{words} outside of the model" if owner is None else f"{words} of '{owner}'"
            for place, value in filled:
                self.filled[id(kept.owner), place] = kept, place, value
        return None

    def _is_of(self, modules: Sequence[str], kept: Contents) -> bool:
        return self._owners.get(id(kept.owner)) in modules and not _is_state(kept)

    def fills(self) -> Iterator[Fill]:
        """What is to be left again by whoever takes the code's place, so that later calls find it.
        Not tensors and sizes, nor what goes with them: those are caches, computed anew.
        """
        filled = list(self.filled.values())
        if all(_is_constant(value) for _, _, value in filled):
            for kept, place, value in filled:
                if dict(kept.again().places()).get(place) is value:
                    yield Fill(kept, place, value)


def _is_constant(value: Any) -> bool:
    return not flatten(value, is_traced)[0] and hidden_tensor(value) is None


def _owners(model: nn.Module) -> dict[int, str]:
    """Whose attributes, or what is in them, something holds."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for part in (vars(module), *vars(module).values()):
            found.setdefault(id(part), path)
    return found


def _is_state(kept: Contents) -> bool:
    """Of a generator, say, which no look at a module's attributes tells."""
    known = isinstance(kept.owner, torch.Generator)  # the graph draws from it again
    return isinstance(kept, OfState | OfIterator) and not known


def _difference(
    kept: Contents, depends: Depends, elsewhere: Elsewhere, filled: list[Any]
) -> tuple[str, Any] | None:
    """What has changed, in words, and where; `filled` takes what was empty, with what is there."""
    was, now = dict(kept.places()), dict(kept.again().places())
    if isinstance(kept, OfState) and not _is_state(kept):
        return None
    if isinstance(kept, OfSequence):
        known = _same(was, now) or elsewhere(kept.owner, None)
        return None if known else (f"a {type(kept.owner).__name__}", None)
    changed = [place for place, value in now.items() if was.get(place, MISSING) is not value]
    gone = [place for place in was if place not in now]
    for place in [p for p in gone + changed if not elsewhere(kept.owner, p)]:
        default = 0 if _counts(kept.owner, place, now.get(place)) else MISSING
        before, value = was.get(place, default), now.get(place, MISSING)
        if not _is_filled(before, value, depends):
            return _words(kept, place), place
        if _is_empty(before):
            filled.append((place, value))
    return None


def _counts(owner: Any, place: Any, value: Any) -> bool:
    """Whether a number that is new is the first of a count, and not one that is kept for a size."""
    if isinstance(owner, collections.Counter):
        return True
    named = isinstance(place, str) and place.isidentifier()
    return named and type(value) in (int, float)


def _words(kept: Contents, place: Any) -> str:
    if isinstance(kept, OfState | OfIterator):
        return f"a {type(kept.owner).__name__}"
    if isinstance(kept, OfDict):
        return f"{place!r} of a dict or an object"
    return "a variable" if place is None else repr(getattr(place, "__name__", place))


def _same(was: dict[Any, Any], now: dict[Any, Any]) -> bool:
    return len(was) == len(now) and all(now[place] is value for place, value in was.items())


def _is_filled(was: Any, now: Any, depends: Depends) -> bool:
    """Whether nothing was there before, and what is there now is the same in every call."""
    if any(depends(tensor) for _, tensor in hidden_tensors(now)):
        return False
    return now is not MISSING and (_is_empty(was) or picture(was) == picture(now))


def _is_empty(was: Any) -> bool:
    return was is MISSING or any(was is nothing for nothing in _UNFILLED)
