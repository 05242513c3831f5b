"""What each module that is called as one node keeps, and what is other than at the last look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...graphs.pictures import ATOMS
from .contents import MISSING
from .places import ALL, Place, is_list, kept_by, vars_of
from .state import MODULE_INTERNALS


class Keepers:
    """The modules that are called as one node, and the last look at each.

    Args:
        model: the root module.
        is_whole: whether a module, at a path, is called as one node.
        is_deep: whether the code of one at a path is the user's, and may keep what it likes.

    Attributes:
        modules: all of the model's, by identity.
        deep: by path, those whose code is the user's.
        was: what each kept at the last look, by place.
        lengths: of the containers in there.
    """

    def __init__(
        self,
        model: nn.Module,
        is_whole: Callable[[nn.Module, str], bool],
        is_deep: Callable[[nn.Module, str], bool],
    ) -> None:
        self.modules = {id(module): module for module in model.modules()}
        self.deep: dict[str, bool] = {}
        self._paths: dict[int, str] = {}
        self._members: dict[str, list[nn.Module]] = {}
        outer = None
        for path, module in model.named_modules():
            if outer is None or not path.startswith(f"{outer}."):
                outer = path if _is_called(module) and is_whole(module, path) else None
                if outer is not None:
                    self.deep[outer] = is_deep(module, path)
            if outer is not None:
                self._paths[id(module)] = outer
                self._members.setdefault(outer, []).append(module)
        self._shared = set(self._find_shared())
        self.was = {path: self.look(path) for path in self.deep}
        self.lengths = {path: lengths_of(found) for path, found in self.was.items()}
        self._holders = set(self._find_holders())

    def path_of(self, key: int) -> str | None:
        """Of the module that is called as one node, and has one of this identity in it or is it."""
        return self._paths.get(key)

    def looks_at(self, owner: Any, place: Any) -> bool:
        """Whether a place of a container, or of an object's attributes, is looked at here."""
        return id(owner) in self._holders and place not in MODULE_INTERNALS

    def look(self, path: str) -> dict[Place, Any]:
        """What is kept now; not what is in things that others hold, too."""
        found: dict[Place, Any] = {}
        closed: set[Place] = set()
        for module in self._members[path]:
            for place, value in kept_by(module, self.deep[path]):
                if place[:-1] in closed:
                    closed.add(place)
                    continue
                found[place] = value
                if id(value) in self._shared:
                    closed.add(place)
        return found

    def take_up(self, path: str) -> dict[Place, Any]:
        """Take what is kept now for given."""
        self.was[path] = found = self.look(path)
        self.lengths[path] = lengths_of(found)
        return found

    def changes(self, path: str, pending: set[Place]) -> Iterator[tuple[Place, Any]]:
        """What differs from the last look, or was set in between, outermost holders first."""
        now, was, lengths = self.look(path), self.was[path], self.lengths[path]
        other: set[Place] = set()
        for place, value in now.items():
            if place[:-1] in other:
                other.add(place)
            elif was.get(place, MISSING) is not value or place in pending:
                other.add(place)
                yield place, value
            elif is_list(value) and lengths.get(place) != len(value):
                other.add(place)
                yield (*place, ALL), list(value)
        for place in was:
            if place not in now:
                if place[:-1] not in other:
                    yield place, MISSING
                other.add(place)

    def _find_holders(self) -> Iterator[int]:
        for path, members in self._members.items():
            yield from (id(table) for m in members for table in (vars(m), m._buffers))
            for value in self.was[path].values():
                if id(value) not in self._shared:
                    yield from (id(value), id(vars_of(value)))

    def _find_shared(self) -> Iterator[int]:
        """Containers and objects that others hold, too."""
        owners: dict[int, str | None] = {}
        for key, module in self.modules.items() if any(self.deep.values()) else ():
            path = self._paths.get(key)
            if path is not None and not self.deep[path]:
                continue
            for _, value in kept_by(module, deep=True):
                plain = isinstance(value, (*ATOMS, torch.Tensor))
                if not plain and owners.setdefault(id(value), path) != path:
                    yield id(value)


def _is_called(module: nn.Module) -> bool:
    """Whether it is more than a list or a table of modules."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def lengths_of(found: dict[Place, Any]) -> dict[Place, int]:
    """Of the containers in what is kept."""
    return {p: len(v) for p, v in found.items() if is_list(v) or isinstance(v, dict)}
