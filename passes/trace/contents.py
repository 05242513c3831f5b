"""What containers, objects, namespaces and closures hold, remembered and put back in place."""

from __future__ import annotations

import collections
import contextlib
import operator
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any

from ...graphs.pictures import base_of, content

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
_NOT_OURS = {"__dict__", "__weakref__", "_abc_impl", "__doc__"}  # of a class


class Contents:
    """What something holds, in named places. A kind may have none that could be filled.

    Attributes:
        owner: that something.
    """

    owner: Any

    def __init__(self, owner: Any) -> None:
        raise NotImplementedError

    def places(self) -> Iterable[tuple[Any, Any]]:
        """Places with what was in them, for those that :meth:`put` can fill."""
        return ()

    def put(self, place: Any, value: Any) -> None:
        """Hold something else there for the time being."""
        raise KeyError(place)

    def restore(self) -> bool:
        """Hold again what was held; nothing is touched, and False returned, where it still is."""
        raise NotImplementedError

    def again(self) -> Contents:
        """The same of what is held now."""
        return type(self)(self.owner)


class OfDict(Contents):
    """A dict, or the attributes of an object; as the base class sees it, since subclasses' own
    methods do more than store.
    """

    def __init__(self, owner: dict[Any, Any]) -> None:
        self._base = base_of(owner)
        self.owner, self._before = owner, [*self._base.items(owner)]

    def places(self) -> Iterable[tuple[Any, Any]]:
        return self._before

    def put(self, place: Any, value: Any) -> None:
        self._base.__setitem__(self.owner, place, value)

    def restore(self) -> bool:
        before, base = self._before, self._base
        length = dict.__len__(self.owner)
        if length == len(before) and (not before or self._is_as_before()):
            return False
        base.clear(self.owner)
        for key, value in before:
            base.__setitem__(self.owner, key, value)
        return True

    def _is_as_before(self) -> bool:
        pairs = zip(self._base.items(self.owner), self._before, strict=True)
        return all(k is key and v is value for (k, v), (key, value) in pairs)


class OfSequence(Contents):
    """A list or a deque; as the base class sees it, too."""

    def __init__(self, owner: Any) -> None:
        self._base: Any = list if isinstance(owner, list) else collections.deque
        self.owner, self._before = owner, [*self._base.__iter__(owner)]

    def places(self) -> Iterable[tuple[Any, Any]]:
        return enumerate(self._before)

    def put(self, place: Any, value: Any) -> None:
        self._base.__setitem__(self.owner, place, value)

    def restore(self) -> bool:
        base, before = self._base, self._before
        same = base.__len__(self.owner) == len(before)
        if same and all(map(operator.is_, base.__iter__(self.owner), before)):
            return False
        base.clear(self.owner)
        base.extend(self.owner, before)
        return True


class OfSet(Contents):
    """A set; its members are in no places."""

    def __init__(self, owner: set[Any]) -> None:
        self.owner, self._before = owner, set.copy(owner)

    def restore(self) -> bool:
        changed = set.__ne__(self.owner, self._before)
        if changed:
            set.clear(self.owner)
            set.update(self.owner, self._before)
        return changed


class OfBytes(Contents):
    """A bytearray."""

    def __init__(self, owner: bytearray) -> None:
        self.owner, self._before = owner, bytes(owner)

    def restore(self) -> bool:
        changed = self.owner != self._before
        if changed:
            self.owner[:] = self._before
        return changed


class OfCell(Contents):
    """A variable that a closure shares."""

    def __init__(self, owner: types.CellType) -> None:
        self.owner, self._before = owner, content_of(owner)

    def places(self) -> Iterable[tuple[Any, Any]]:
        return () if self._before is MISSING else ((None, self._before),)

    def put(self, place: Any, value: Any) -> None:
        self.owner.cell_contents = value

    def restore(self) -> bool:
        if content_of(self.owner) is self._before:
            return False
        if self._before is MISSING:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = self._before
        return True


class OfNames(Contents):
    """Some names of something: the globals that code refers to, the members of a class, the slots
    of an object.

    Args:
        owner: whose they are.
        names: the names, or the slots themselves.
        get: what a name of the owner stands for, or `default`.
        put: gives a name a meaning.
        delete: takes it away.
    """

    def __init__(
        self,
        owner: Any,
        names: Iterable[Any],
        get: Callable[[Any, Any, Any], Any],
        put: Callable[[Any, Any, Any], None],
        delete: Callable[[Any, Any], None],
    ) -> None:
        self.owner, self._get, self._put, self._delete = owner, get, put, delete
        self._before = {name: get(owner, name, MISSING) for name in names}

    def places(self) -> Iterable[tuple[Any, Any]]:
        return iter([(n, v) for n, v in self._before.items() if v is not MISSING])

    def put(self, place: Any, value: Any) -> None:
        self._put(self.owner, place, value)

    def restore(self) -> bool:
        changed = False
        for name, value in self._before.items():
            if self._get(self.owner, name, MISSING) is value:
                continue
            changed = True
            if value is MISSING:
                self._delete(self.owner, name)
            else:
                self._put(self.owner, name, value)
        return changed

    def again(self) -> Contents:
        return OfNames(self.owner, self._before, self._get, self._put, self._delete)


class OfState(Contents):
    """What an object tells of itself: a random generator, an array."""

    def __init__(
        self, owner: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], Any]
    ) -> None:
        self.owner, self._get, self._put = owner, get, put
        self._before = get(owner)

    def places(self) -> Iterable[tuple[Any, Any]]:
        yield None, pickle.dumps(self._before)  # to be compared; it cannot be put there

    def restore(self) -> bool:
        changed = pickle.dumps(self._get(self.owner)) != pickle.dumps(self._before)
        if changed:
            self._put(self.owner, self._before)
        return changed

    def again(self) -> Contents:
        return OfState(self.owner, self._get, self._put)


class OfIterator(Contents):
    """Of an iterator that something holds, or of what stands there for it: how far it is. It cannot
    be put back: whoever runs code meanwhile puts a copy there.
    """

    def __init__(self, holder: Contents, place: Any) -> None:
        self._holder, self._place = holder, place
        self.owner = dict(holder.again().places()).get(place)
        self._before = how_far(self.owner)

    def places(self) -> Iterable[tuple[Any, Any]]:
        yield None, self._before

    def restore(self) -> bool:
        return False

    def again(self) -> Contents:
        return OfIterator(self._holder, self._place)


def how_far(iterator: Any) -> str:
    """Differs after a step of an iterator that can be copied."""
    return repr(iterator.__reduce__()[1:])


def of_globals(namespace: dict[str, Any], names: Iterable[str]) -> Contents:
    """Of a Python module, those names that code refers to."""
    return OfNames(namespace, names, dict.get, dict.__setitem__, dict.__delitem__)


def of_class(cls: type) -> Contents:
    """Of a class, what its body holds. A name that is new stays: nothing says that nobody waits."""
    names = [n for n in vars(cls) if n not in _NOT_OURS]
    get = lambda c, name, default: vars(c).get(name, default)  # noqa: E731
    return OfNames(cls, names, get, type.__setattr__, type.__delattr__)


def of_slots(owner: Any, slots: Iterable[Any]) -> Contents:
    """Of an object whose class has ``__slots__``."""
    put = lambda owner, slot, value: slot.__set__(owner, value)  # noqa: E731
    return OfNames(owner, slots, content, put, lambda owner, slot: slot.__delete__(owner))


def contents_of(value: Any) -> Contents | None:
    """What a built-in container, or a subclass of one, holds; None for anything else."""
    for kind, make in _KINDS:
        if isinstance(value, kind):
            return make(value)
    return None


_KINDS: tuple[tuple[type, Callable[[Any], Contents]], ...] = (
    (dict, OfDict),
    (list, OfSequence),
    (set, OfSet),
    (collections.deque, OfSequence),
    (bytearray, OfBytes),
)
# those without attributes
BARE = {collections.OrderedDict: OfDict, collections.defaultdict: OfDict, **dict(_KINDS)}


def content_of(cell: types.CellType) -> Any:
    """What a closure's variable stands for; `MISSING` where it has no value yet."""
    with contextlib.suppress(ValueError):
        return cell.cell_contents
    return MISSING
