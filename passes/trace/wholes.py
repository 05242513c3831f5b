"""What modules that are called as one node keep, where the code around them reads or writes it.

A reset before the call of a neuron, a membrane that is read after it, a rate that is set: none of
this is an argument or a result, and the order in which it happens decides. So each becomes a node
of its own, and stays in one stage with the calls before and after it.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ...errors import BakedInError, TracingError
from ...graphs.nested import flatten
from ...graphs.pictures import ATOMS
from .calls import DropAttribute, ReadAttribute, StoreAttribute, counted
from .containers import is_traced, is_written_out
from .contents import MISSING
from .keepers import Keepers, lengths_of
from .places import Place
from .provenance import Provenance

_FIXED = (*ATOMS, enum.Enum, types.FunctionType, types.BuiltinFunctionType, type)
_OF_NO_VALUE = {
    "mutates": (), "random": False, "no_grad": False, "autocast": (), "parameters": (),
    "modules": (), "storage": None, "value": None,
}  # fmt: skip


class Wholes:
    """The modules of one recording that are called as one node.

    Args:
        known: the graph, and the nodes of tensors.
        model: the root module.
        is_whole: whether a module, at a path, is called as one node.
        is_deep: whether the code of one at a path is the user's, and may keep what it likes.
    """

    def __init__(
        self,
        known: Provenance,
        model: nn.Module,
        is_whole: Callable[[nn.Module, str], bool],
        is_deep: Callable[[nn.Module, str], bool],
    ) -> None:
        self._known = known
        self._keepers = keepers = Keepers(model, is_whole, is_deep)
        self._initial = {
            id(value): place
            for path, found in keepers.was.items()
            if keepers.deep[path]
            for place, value in found.items()
            if isinstance(value, torch.Tensor)
        }
        self._where = {key: (self._path_at(place), place) for key, place in self._initial.items()}
        self._first: dict[str, fx.Node] = {}
        self._last: dict[str, tuple[fx.Node, bool]] = {}
        self._made: dict[int, tuple[fx.Node, torch.Tensor]] = {}
        self._changed: set[Place] = set()  # by a call, for code around it that asks
        self._plain: set[Place] = set()  # those of them that hold other numbers and the like
        self._resized: set[Place] = set()  # those of them that hold more or fewer things
        self._pending: set[Place] = set()  # set, though perhaps to what was there
        self._numbers = itertools.count()

    def path_of(self, module: nn.Module) -> str | None:
        """The module that is called as one node, and has this one in it or is it."""
        return self._keepers.path_of(id(module))

    def is_changed(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether a call has left another value in an attribute that the code around it reads now:
        a tensor, or a container with tensors, whose length is then looked at in every call.

        Raises:
            BakedInError: plain values, which a graph could only hold fast.
        """
        place = (id(module), name)
        if place not in self._changed:
            return False
        path = self._path_at(place)
        if place in self._plain:
            raise BakedInError(
                f"forward reads '{name}' of '{path}', which is one opaque node, after it was "
                "called and has changed that: return it, or keep it in a tensor"
            )
        if place in self._resized:
            held = self._known.graph.call_function(self._target(ReadAttribute, place))
            held.meta.update(_OF_NO_VALUE)
            self._touch(path, held, is_call=False)
            note = self._effect(counted, held, len(value), f"'{path}.{name}'")
            note.meta["glued"] = True
        return True  # tensors are read where they are used

    def looks_at(self, owner: Any, place: Any) -> bool:
        """Whether a place of a container, or of an object's attributes, is looked at here."""
        return self._keepers.looks_at(owner, place)

    # ---- what the code around them does ----------------------------------------------------------

    def writes(self, module: nn.Module, name: str) -> None:
        """An attribute of one is set: as late as can be, so that cuts can lie before it."""
        place = (id(module), name)
        for known in (self._changed, self._plain, self._resized):
            known.discard(place)
        self._pending.add(place)

    def settle(self, path: str) -> None:
        """Before a module is called, or where the model returns: what was written into what it
        keeps is written there by the graph, too.

        Raises:
            BakedInError: it is nothing that a graph could make anew in every call.
        """
        if path not in self._keepers.deep:
            return  # it is called so because of hooks that this very call has put on it
        for place, value in [*self._keepers.changes(path, self._pending)]:
            self._store(path, place, value)
            self._pending.discard(place)
        self._take_up(path)

    def finish(self) -> None:
        """The model returns."""
        for path in self._keepers.deep:
            for place, value in [*self._keepers.changes(path, self._pending)]:
                # soon after the call, if there was one
                known = [self._known.nodes.get(id(t)) for t in flatten(value)[0]]
                behind = [*self._last.get(path, ())[:1], *(n for n in known if n is not None)]
                with self._after(behind):
                    self._store(path, place, value)
            first = self._first.get(path)
            if first is not None and isinstance(first.target, ReadAttribute):
                self._mark(path, first, self._last[path][0])

    def read(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor that one of them keeps now, made here; None where none does.

        Raises:
            TracingError: it is what one of them had kept before it was called.
        """
        if id(tensor) not in self._where:
            return None
        path, place = self._where[id(tensor)]
        if self._keepers.look(path).get(place) is not tensor:
            raise TracingError(
                f"the model uses what '{path}', which is one opaque node, has kept in '{place[1]}' "
                "and has replaced since"
            )
        node = self._known.graph.call_function(self._target(ReadAttribute, place))
        node.meta.update(_OF_NO_VALUE)
        self._known.attach(node, tensor)
        self._touch(path, node, is_call=False)
        return node

    def place_of(self, tensor: torch.Tensor) -> tuple[nn.Module, str, str] | None:
        """Module, path and attribute of a tensor that was kept by one when the model was called,
        and still is.
        """
        place = self._initial.get(id(tensor))
        if place is None:
            return None
        path = self._path_at(place)
        same = self._keepers.look(path).get(place) is tensor
        return (self._keepers.modules[place[0]], path, str(place[1])) if same else None

    # ---- what they do themselves -----------------------------------------------------------------

    def given(self, path: str) -> list[torch.Tensor]:
        """Computed tensors that a module keeps, and may use and write to like those it is given."""
        kept = [v for v in self._keepers.was.get(path, {}).values() if isinstance(v, torch.Tensor)]
        return [t for t in kept if self._known.is_computed(t)]

    def called(self, path: str, node: fx.Node, seen: list[torch.Tensor]) -> None:
        """A node was made that calls one.

        Args:
            path: of the module.
            node: the call.
            seen: tensors that operators below it have read and that were not given to it.
        """
        if path not in self._keepers.deep:
            return
        for tensor in seen:
            if id(tensor) in self._made:
                self._mark(path, self._made[id(tensor)][0], node)
        self._touch(path, node, is_call=True)
        now, was = self._keepers.look(path), self._keepers.was[path]
        lengths = lengths_of(now)
        for place, value in now.items():
            of_tensor = isinstance(value, torch.Tensor)
            if was.get(place, MISSING) is not value:
                self._changed.add(place[:2])
                if not of_tensor and place not in lengths:
                    self._plain.add(place[:2])
            if lengths.get(place) != self._keepers.lengths[path].get(place):
                self._changed.add(place[:2])
                (self._resized if place == place[:2] else self._plain).add(place[:2])
            new = of_tensor and self._keepers.deep[path] and id(value) not in self._initial
            if new and (value.requires_grad or self._known.is_computed(value)):
                self._made.setdefault(id(value), (node, value))
        self._take_up(path)

    # ---- how -------------------------------------------------------------------------------------

    def _after(self, nodes: list[fx.Node]) -> Any:
        """Where a node is added that comes after some, and after what belongs to them."""
        if not nodes:
            return contextlib.nullcontext()
        last = max(nodes)
        while last.next.meta.get("glued"):
            last = last.next
        return self._known.graph.inserting_after(last)

    def _take_up(self, path: str) -> None:
        found = self._keepers.take_up(path)
        if self._keepers.deep[path]:
            kept = {id(v): p for p, v in found.items() if isinstance(v, torch.Tensor)}
            self._where.update({key: (path, place) for key, place in kept.items()})

    def _path_at(self, place: Place) -> str:
        path = self._keepers.path_of(place[0])
        assert path is not None
        return path

    def _store(self, path: str, place: Place, value: Any) -> None:
        if value is MISSING:
            node = self._effect(self._target(DropAttribute, place))
        elif not _can_be_made(value):
            raise BakedInError(
                f"forward puts a {type(value).__name__} into '{place[1]}' of '{path}', which is "
                "one node: a graph could only put the same one there in every call"
            )
        else:
            with torch._C.DisableTorchFunction():
                argument = self._known.argument(value)
            node = self._effect(self._target(StoreAttribute, place), argument)
            for tensor in flatten(value)[0]:
                self._made.pop(id(tensor), None)
        self._touch(path, node, is_call=False)

    def _target(self, kind: Any, place: Place) -> Any:
        return kind(self._keepers.modules[place[0]], *place[1:])

    def _effect(self, target: Any, *args: Any) -> fx.Node:
        node = self._known.graph.call_function(target, args)
        node.meta.update(_OF_NO_VALUE)
        return node

    def _touch(self, path: str, node: fx.Node, is_call: bool) -> None:
        self._first.setdefault(path, node)
        last, was_call = self._last.get(path, (None, False))
        if last is not None and not (is_call and was_call):
            self._mark(path, last, node)
        self._last[path] = node, is_call

    def _mark(self, path: str, *nodes: fx.Node) -> None:
        """No cut may part some nodes."""
        mark = (
            f"{path}:{next(self._numbers)}",
            f"'{path}' keeps something from call to call, or the code around it writes or reads "
            "what it keeps: that stays in one stage",
        )
        for node in nodes:
            node.meta["together"] = (*node.meta.get("together", ()), mark)


def _can_be_made(value: Any) -> bool:
    """Whether a graph can make it anew, or it never changes."""
    if is_traced(value) or isinstance(value, _FIXED) or is_written_out(value):
        return True
    leaves, structure = flatten(value, is_traced)
    return bool(leaves) and all(isinstance(part, _FIXED) for part in structure.constants())
