"""What a model's code changes outside of the model: globals, classes, closures, defaults.

A graph does not do it again: a list stays empty, a counter stands still. What code fills once is
none of this, as long as it does not depend on the values of tensors: a table of constants, a cache.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import picture
from .contents import Contents, OfDeque, OfDict, OfIterator, OfList, OfState
from .values import tensors_in

_UNFILLED = (None, False)
_MISSING = object()
Depends = Callable[[torch.Tensor], bool]


class Watched:
    """Things outside of the model that some module changes.

    Args:
        contents: of these.
    """

    def __init__(self, contents: Sequence[Contents]) -> None:
        self._contents = contents
        self.look()

    def look(self) -> None:
        """Take what they hold now for given."""
        self._contents = [kept.again() for kept in self._contents]

    def changed(self, depends: Depends) -> str | None:
        """What has changed since the last look, in words.

        Args:
            depends: whether a tensor depends on values of the call.
        """
        found = (_difference(kept, depends) for kept in self._contents)
        return next((words for words in found if words), None)


def changed_outside(model: nn.Module, changed: Iterable[Contents]) -> tuple[Contents, ...]:
    """Those of the changed things that are not the modules' own, which are looked at elsewhere."""
    own = {id(vars(m)) for m in model.modules()}
    own |= {id(v) for m in model.modules() for v in vars(m).values()}
    return tuple(k for k in changed if _is_state(k) or id(k.owner) not in own)


def _is_state(kept: Contents) -> bool:
    """Of a generator, say, which no look at a module's attributes tells."""
    known = isinstance(kept.owner, torch.Generator)  # the graph draws from it again
    return isinstance(kept, OfState | OfIterator) and not known


def _difference(kept: Contents, depends: Depends) -> str | None:
    was, now = dict(kept.places()), dict(kept.again().places())
    if isinstance(kept, OfState) and not _is_state(kept):
        return None
    if isinstance(kept, OfList | OfDeque):
        return None if _same(was, now) else f"a {type(kept.owner).__name__}"
    changed = [place for place, value in now.items() if was.get(place, _MISSING) is not value]
    gone = [place for place in was if place not in now]
    for place in gone + changed:
        default = 0 if _counts(kept.owner, place, now.get(place)) else _MISSING
        if not _is_filled(was.get(place, default), now.get(place, _MISSING), depends):
            return _words(kept, place)
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
    if any(depends(tensor) for tensor in tensors_in(now)):
        return False
    empty = was is _MISSING or any(was is nothing for nothing in _UNFILLED)
    return now is not _MISSING and (empty or picture(was) == picture(now))
