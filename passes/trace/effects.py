"""What a model's code changes outside of the model: globals, classes, closures, defaults.

A graph does not do it again: a list stays empty, a counter stands still. What code fills once is
none of this, as long as it does not depend on the values of tensors: a table of constants, a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import picture
from .contents import Contents, OfDeque, OfDict, OfList
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
    return tuple(kept for kept in changed if id(kept.owner) not in own)


def _difference(kept: Contents, depends: Depends) -> str | None:
    was, now = dict(kept.places()), dict(kept.again().places())
    if isinstance(kept, OfList | OfDeque):
        return None if _same(was, now) else f"a {type(kept.owner).__name__}"
    changed = [place for place, value in now.items() if was.get(place, _MISSING) is not value]
    gone = [place for place in was if place not in now]
    for place in gone + changed:
        if not _is_filled(was.get(place, _MISSING), now.get(place, _MISSING), depends):
            return f"{place!r} of a dict or an object" if isinstance(kept, OfDict) else _name(place)
    return None


def _name(place: Any) -> str:
    return "a variable" if place is None else repr(place)


def _same(was: dict[Any, Any], now: dict[Any, Any]) -> bool:
    return len(was) == len(now) and all(now[place] is value for place, value in was.items())


def _is_filled(was: Any, now: Any, depends: Depends) -> bool:
    """Whether nothing was there before, and what is there now is the same in every call."""
    if any(depends(tensor) for tensor in tensors_in(now)):
        return False
    empty = was is _MISSING or any(was is nothing for nothing in _UNFILLED)
    return now is not _MISSING and (empty or picture(was) == picture(now))
