"""Which modules a recording is in and has been through."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ...errors import BakedInError, TracingError
from ...graphs.pictures import Itself, Without, picture
from .calls import ReadAttribute, StoreAttribute
from .containers import Copy, take_over
from .contents import MISSING, Contents
from .effects import Watched
from .held import Reads, is_hooked
from .provenance import Provenance
from .state import MODULE_INTERNALS, python_draws
from .symbols import TracedInt
from .wholes import Wholes

# nn modules that are only sequences of others: looked into, so that cuts can fall between their
# layers
_TRANSPARENT = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_OF_NO_VALUE = {
    "mutates": (), "random": False, "no_grad": False, "autocast": (), "parameters": (),
    "storage": None, "value": None,
}  # fmt: skip
# what a helper object holds is looked at in ``effects``, which knows what is filled once
_STORED = bool | int | float | complex | str | None | torch.dtype | torch.device | TracedInt
_OPENED = bool | int | float | complex | str | list | dict | set | tuple | deque


class Visits:
    """The modules of one recording.

    Args:
        known: the graph, and the nodes of tensors.
        opaque: paths of modules to keep as single nodes.
        reads: notes what is read off modules.
        watched: what an earlier recording has found changed.
        model: the root module.
        without: what may be changed outside of the modules all the same.

    Attributes:
        wholes: the modules that are called as one node.
        stack: paths of the modules that the recording is in, outermost first.
        visited: modules whose ``training`` flag is baked into the graph, by path.
        calls: module path, output node and last node made in it, in order of return.
        failed_at: path of the innermost module that failed.
        failed_leaf: whether that one was called as a whole.
        notes: remarks for the plan.
        stored: plain values that the code has set, by module and name.
    """

    def __init__(
        self,
        known: Provenance,
        opaque: frozenset[str],
        reads: Reads,
        watched: Watched,
        model: nn.Module,
        without: Without = frozenset(),
    ) -> None:
        self.opaque, self._without = opaque, without
        self.stack: list[str] = []
        self.visited: dict[str, nn.Module] = {}
        self.calls: list[tuple[str, fx.Node | None, fx.Node]] = []
        self.failed_at: str | None = None
        self.failed_leaf = False
        self.notes: list[str] = []
        self.stored: dict[tuple[int, str], Any] = {}
        self._known, self._reads = known, reads
        self.wholes = Wholes(known, model, self.is_leaf, self._is_users)
        self._draws = python_draws()
        self._watched = watched

    @property
    def refused(self) -> tuple[Contents, Any] | None:
        """The place outside of the modules that forward has changed."""
        return self._watched.refused

    def is_leaf(self, module: nn.Module, path: str) -> bool:
        """Whether a module is called as a whole. Hooks on one that is looked into would run at
        trace time only.
        """
        if not path:
            return False
        if path in self.opaque or is_hooked(module) or getattr(module, "is_graph_leaf", False):
            return True
        return _is_of_torch(module) and not isinstance(module, _TRANSPARENT)

    def _is_users(self, module: nn.Module, path: str) -> bool:
        """Whether a module that is called as a whole runs code that is not torch's."""
        return path in self.opaque or not _is_of_torch(module)

    @contextlib.contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        """While a module is looked into.

        Raises:
            BakedInError: it changes its own attributes or what is outside of the model, or draws
                numbers that no graph can draw.
        """
        if path:
            self._check_outside()  # what was done until here is the caller's
        self.visited[path] = module
        self._reads.visited(module, path)
        self.stack.append(path)
        before = state_of(module)
        entries = _entries_of(module)
        try:
            yield
            if not path and is_hooked(module):
                self._watched.look()  # the model's own hooks run around the stages
            self._check_outside()
            self._check_changes(module, path, before, entries)
            self._watched.settle(path)
            if not path:
                self.wholes.finish()
                self._fill()
        except Exception:
            self._fails(path, leaf=False)
            raise
        finally:
            self.stack.pop()

    @contextlib.contextmanager
    def whole(self, path: str) -> Iterator[None]:
        """While a module is called as one node; it may draw what it likes, anew in every call."""
        self._check_outside()
        try:
            self.wholes.settle(path)
            yield
        except Exception:
            self._fails(path, leaf=True)
            raise
        self._draws = python_draws()
        self._watched.look(self.stack)

    def returned(self, path: str, output: Any) -> None:
        """Note what a module returned: a tensor, or the first one of a tuple that stands for it."""
        first = isinstance(self._known.attributes.get(path), nn.RNNBase | nn.MultiheadAttention)
        if isinstance(output, tuple | list) and (len(output) == 1 or first):
            output = output[0]
        node = self._known.nodes.get(id(output)) if isinstance(output, torch.Tensor) else None
        self.calls.append((path, node, next(iter(reversed(self._known.graph.nodes)))))

    def check_count(self, target: Any, output: Any) -> None:
        """What contains a module that could not be looked into and returns a list is kept whole
        with it: its length may depend on values. At the top level the stages watch the length.

        Raises:
            TracingError: there is such a module around it.
        """
        if target in self.opaque and isinstance(output, list) and any(self.stack):
            raise TracingError(f"{target!r} returns a list, whose length may depend on values")

    def tell_changes(self, target: Any, copies: list[Copy]) -> None:
        """A callee may have changed the copies of lists and dicts that it was given."""
        if take_over(copies, self._known.is_known):
            self.notes.append(
                f"{getattr(target, '__name__', repr(target))} changes a list or dict that it is "
                "given: code that reads it later reads what the example left there"
            )

    def writes(self, module: nn.Module, name: str, value: Any) -> None:
        """The code that is recorded sets an attribute of a module. A plain value is stored there in
        every call, where it is no state: nothing was read there before, or nothing was there. In a
        module that is called as a whole anything is stored that a graph can hold.
        """
        path = self._known.paths.get(id(module))
        if path is None or _is_ours(module, name):
            return
        if path == self.stack[-1] or self.wholes.path_of(module) is None:
            self._store_plain(module, name, value)
        elif not isinstance(value, nn.Module | nn.Parameter):
            self.wholes.writes(module, name)
            self.stored[id(module), name] = value

    def _store_plain(self, module: nn.Module, name: str, value: Any) -> None:
        """Where it is written; what is no plain value is looked at when the module returns."""
        if not isinstance(value, _STORED):
            return
        key = id(module), name
        if key not in self.stored and not self._reads.is_empty(module, name):
            return
        self._add_effect(StoreAttribute(module, name), self._known.argument(value))
        self.stored[key] = value

    def _add_effect(self, target: Any, *args: Any) -> fx.Node:
        """Something that is done, and gives no value."""
        node = self._known.graph.call_function(target, args)
        node.meta.update(_OF_NO_VALUE, modules=tuple(self.stack[:1]))
        return node

    def _fails(self, path: str, leaf: bool) -> None:
        if self.failed_at is None:
            self.failed_at, self.failed_leaf = path, leaf

    def _check_outside(self) -> None:
        if python_draws() != self._draws:
            raise BakedInError("the model draws from Python's or NumPy's random numbers")
        asked = self.stack, self._depends_on_values, self._is_looked_at
        if changed := self._watched.changed(*asked):
            raise BakedInError(
                f"forward changes {changed} (another module, an object that the model keeps, a "
                "global, a class, a variable of a closure, a generator), which stages do not do "
                "again: if only its first call does that, call the model once before"
            )

    def _is_looked_at(self, owner: Any, place: Any) -> bool:
        return self.wholes.looks_at(owner, place) or (id(owner), place) in self._without

    def _fill(self) -> None:
        for fill in self._watched.fills():
            # The graph of a later call has none, and the same cuts must be legal there.
            self._add_effect(fill).meta["glued"] = True

    def _depends_on_values(self, value: torch.Tensor) -> bool:
        return self._known.is_computed(value) and not _is_of_sizes(self._known.nodes[id(value)])

    def _check_changes(
        self,
        module: nn.Module,
        path: str,
        before: dict[str, Any],
        entries: dict[str, dict[Any, Any]],
    ) -> None:
        changed = [
            k
            for k, v in state_of(module).items()
            if before.get(k, MISSING) != v
            and self.stored.get((id(module), k), MISSING) is not getattr(module, k, None)
            and not self._only_remembers(module, k, entries)
        ]
        values = {name: getattr(module, name) for name in changed}
        # the top level cannot be opaque
        computed = [v for v in values.values() if isinstance(v, torch.Tensor)]
        known = len(computed) == len(values) and all(map(self._known.is_computed, computed))
        if not path and known and values.keys() <= vars(module).keys():
            for name, value in values.items():
                self._store(module, name, value)
        elif changed:
            raise BakedInError(
                f"forward changes the module's own attribute '{changed[0]}': if only "
                "its first call does that, call the model once before"
            )

    def _only_remembers(
        self, module: nn.Module, name: str, entries: dict[str, dict[Any, Any]]
    ) -> bool:
        """Whether a dictionary has only gained what sizes alone determine: it is made anew."""
        table, known = vars(module).get(name), entries.get(name)
        if not isinstance(table, dict) or known is None:
            return False
        new = [v for k, v in table.items() if k not in known]
        kept = all(k in table and table[k] is v for k, v in known.items())
        return kept and all(
            isinstance(v, torch.Tensor)
            and self._known.is_computed(v)
            and _is_of_sizes(self._known.nodes[id(v)])
            for v in new
        )

    def _store(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Write a computed tensor to an attribute, where the model has read it last."""
        graph, node = self._known.graph, self._known.nodes[id(value)]
        reads = [
            n
            for n in graph.nodes
            if isinstance(n.target, ReadAttribute) and n.target.is_of(module, name)
        ]
        users = [u for n in reads for u in n.users]
        order = {n: i for i, n in enumerate(graph.nodes)}
        last = max([node, *reads, *users], key=order.__getitem__)
        with graph.inserting_after(last):
            store = self._add_effect(StoreAttribute(module, name), node)
        place = (name, f"forward keeps self.{name} from call to call: it is read and written there")
        for touching in [node, *reads, store]:
            touching.meta["together"] = (*touching.meta.get("together", ()), place)


def _is_ours(module: nn.Module, name: str) -> bool:
    """Whether an attribute is the base class's, or code of the user's sets what is behind it."""
    return name in MODULE_INTERNALS or hasattr(getattr(type(module), name, None), "__set__")


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def _is_of_sizes(node: fx.Node) -> bool:
    """Whether nothing but sizes and constants goes into a value."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "get_attr", "call_module") or node.meta.get("random"):
            return False
        pending += [n for n in node.all_input_nodes if "value" in n.meta]
    return True


def _entries_of(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {k: dict(v) for k, v in vars(module).items() if type(v) is dict}


def state_of(module: nn.Module) -> dict[str, Any]:
    """Pictures of a module's own attributes, and of what they hold."""
    state = {k: v for k, v in vars(module).items() if k not in MODULE_INTERNALS}
    state = {**state, **module._buffers, **module._parameters}
    return {k: picture(v) if isinstance(v, _OPENED) else Itself(v) for k, v in state.items()}
