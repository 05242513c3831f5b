"""Which node every tensor came from, and the arguments of nodes to come.

What is known of a node is kept in the ``meta`` of the new graph's nodes:

==================  ==============================================================================
``value``           the example tensor (without data once traced), or None
``differentiable``  whether the value required a gradient when it was made
``storage``         a number shared by values that alias each other
``sparse``          whether the value is sparse, so that it cannot cross a cut
``view``            whether the value is a view of another tensor
``mutates``         storages that the node writes to
``rebases``         those that it writes to through a view, where autograd rebuilds histories
``random``          whether it draws random numbers
``parameters``      names of the parameters that it reads
``modules``         paths of the modules that it ran in, outermost first
``no_grad``         whether it ran under ``torch.no_grad``
``grad``            whether it ran under ``torch.enable_grad`` in a model that is called without
``autocast``        the autocast regions around it that the model itself entered
``by_value``        whether its shape, or answer, depends on the values that it is computed from
``together``        marks of regions that no cut may divide: pairs (key, reason)
``glued``           whether it must stay with the node before it (members of containers, notes of a
                    write)
==================  ==============================================================================
"""

from __future__ import annotations

import operator
from collections import UserList
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Protocol

import torch
from torch import fx, nn

from ...errors import TracingError
from ...graphs.nested import flatten
from .calls import ReadAttribute, after, counted
from .containers import TORCH_CONSTANTS, assembled, is_written_out
from .held import Reads
from .symbols import TracedInt
from .values import SPARSE, storage_key

_BARE = {"mutates": (), "random": False, "modules": (), "no_grad": False, "autocast": ()}
_PLAIN = (bool, int, float, complex, str)


class Keeping(Protocol):
    """What modules that are called as one node keep."""

    def read(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor that one keeps; None where none does."""

    def place_of(self, tensor: torch.Tensor) -> tuple[nn.Module, str, str] | None:
        """Module, path and attribute of a tensor that was kept before the model was called."""


class Provenance:
    """A graph under way, and the node of every tensor that the model's code can hold.

    Args:
        model: the root module.
        fake: whether the model runs on fake tensors.
        reads: where tensors were read that are plain attributes.
        reached: identities of the tensors that the model could reach before it ran.

    Attributes:
        graph: what has been recorded.
        attributes: what ``call_module`` and ``get_attr`` targets stand for.
        paths: of the model's modules, by identity.
        names: of its parameters and buffers, by identity.
        nodes: of tensors, by identity.
        kept: tells what is kept by modules that are called as one node, where any are.
    """

    kept: Keeping | None = None

    def __init__(
        self, model: nn.Module, fake: bool, reads: Reads, reached: frozenset[int] = frozenset()
    ) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        self.nodes: dict[int, fx.Node] = {}
        self._fake, self._reads = fake, reads
        self._reached, self._by_kind = reached, False
        self._alive: list[Any] = []  # so that no identity is given to another tensor
        self._storages: dict[int, tuple[int, list[torch.Tensor]]] = {}

    def placeholder(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor input."""
        node = self.graph.placeholder(name)
        node.meta.update(_BARE, parameters=())
        self.attach(node, value)

    def is_computed(self, tensor: torch.Tensor) -> bool:
        """Whether a recorded node computes a tensor, or it is an input."""
        node = self.nodes.get(id(tensor))
        return node is not None and node.op != "get_attr"

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a node stands for a tensor, or can: it is a parameter or buffer."""
        return id(tensor) in self.nodes or id(tensor) in self.names

    def attach(self, node: fx.Node, output: Any) -> None:
        """Remember which node a tensor came from; members of containers get nodes of their own."""
        node.meta["value"] = output if isinstance(output, torch.Tensor) else None
        if isinstance(output, torch.Tensor):
            node.meta["storage"] = self.storage(output)
            # a later write may change that of the same object
            node.meta["differentiable"] = output.requires_grad
            node.meta["view"] = output._is_view()
            node.meta["sparse"] = output.layout in SPARSE
            self.nodes[id(output)] = node
            self._alive.append(output)
            return
        node.meta["storage"] = None
        if output is None or isinstance(output, int | float | str | bool | TracedInt):
            return
        for access, key, value in _members(node, output):
            if flatten(value)[0]:
                member = self.graph.call_function(access, (node, key))
                member.meta.update(_beside(node))
                self.attach(member, value)

    def note_count(self, node: fx.Node, output: Any) -> None:
        """The model's code will see how many values a module of the user's has returned."""
        if isinstance(output, list | UserList | MutableMapping):
            name = repr(getattr(node.target, "__name__", node.target))
            note = self.graph.call_function(counted, (node, len(output), name))
            note.meta.update(_beside(node), value=None, storage=None)

    def refresh_aliases(self, written: torch.Tensor, node: fx.Node, output: Any) -> None:
        """Views of written memory: their later uses depend on the write, whichever stage it ends up
        in.
        """
        for tensor in self._storages[storage_key(written)][1]:
            if tensor is output or id(tensor) not in self.nodes:
                continue
            old = self.nodes[id(tensor)]
            if old is node:
                continue
            fresh = self.graph.call_function(after, (old, node))
            fresh.meta.update(_beside(node), value=tensor, storage=self.storage(tensor))
            fresh.meta.update(differentiable=tensor.requires_grad, view=tensor._is_view())
            self.nodes[id(tensor)] = fresh

    def storage(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's memory."""
        key = storage_key(tensor)
        number, members = self._storages.setdefault(key, (len(self._storages), []))
        if all(m is not tensor for m in members):
            members.append(tensor)
            self._alive.append(tensor)
        return number

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node: tensors and traced integers become nodes."""
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value)
        if isinstance(value, TracedInt):
            return value.as_node()
        if is_written_out(value):
            if isinstance(value, dict):
                return {k: self.argument(v) for k, v in value.items()}
            items = [self.argument(v) for v in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, slice):
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or type(value) in _PLAIN:
            return value
        if isinstance(value, TORCH_CONSTANTS):
            return value
        if isinstance(value, range):
            return list(value)
        if _is_numpy_scalar(value):
            return value.item()
        if isinstance(value, nn.Module) and id(value) in self.paths:
            name = self.paths[id(value)]
            self.attributes[name] = value
            return self._get_attr(name, value)
        built = assembled(value, self.argument)
        return self._constant(value) if built is None else built

    def arguments(
        self, args: Any, kwargs: Any, by_kind: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """All of a call.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            by_kind: whether shapes and the like of tensors decide, and no values.
        """
        self._by_kind = by_kind
        try:
            return self.argument(args), {k: self.argument(v) for k, v in kwargs.items()}
        finally:
            self._by_kind = False

    def check_captures(
        self, target: Any, inputs: Iterable[torch.Tensor], seen: Iterable[torch.Tensor]
    ) -> None:
        """Whether a callee has used a computed tensor that it was not given.

        Raises:
            TracingError: it has.
        """
        # writing to a view also touches what it is a view of
        given = {storage_key(t) for t in inputs}
        if any(self.is_computed(t) and storage_key(t) not in given for t in seen):
            raise TracingError(f"{target} uses a computed tensor that is not among its arguments")

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)]
        if self.kept is not None and not isinstance(tensor, nn.Parameter):
            like = self._constant(tensor) if self._by_kind and self.note_kind(tensor) else None
            if (node := like or self.kept.read(tensor)) is not None:
                return node
        if id(tensor) in self.names:
            name = self.names[id(tensor)]
            self.attributes[name] = tensor
            return self._get_attr(name, tensor)
        seen_before = id(tensor) in self._reached or (
            self._fake and not isinstance(tensor, torch._subclasses.FakeTensor)
        )
        if seen_before and id(tensor) in self._reads.tensors:
            return self._live(tensor)
        if not seen_before:
            raise TracingError(
                "a tensor was computed by code that tracing does not see (a scripted function, "
                "vmap, ...)"
            )
        return self._constant(tensor)

    def note_kind(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is kept by a module that is called as one node, since before the call:
        its shape and the like, which somebody asks for, become a guard.
        """
        found = self.kept and self.kept.place_of(tensor)
        if found:
            self._reads.facts(*found)
        return bool(found)

    def _live(self, tensor: torch.Tensor) -> fx.Node:
        """A plain attribute of a module is read in every call, since it may be another tensor."""
        target = ReadAttribute(*self._reads.tensors[id(tensor)])
        node = self.graph.call_function(target)
        node.meta.update(_BARE, parameters=())
        self.attach(node, tensor)
        return node

    def _get_attr(self, name: str, value: Any) -> fx.Node:
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta.update(_BARE)
        node.meta["parameters"] = (name,) if isinstance(value, nn.Parameter) else ()
        node.meta.update(value=value if isinstance(value, torch.Tensor) else None, storage=None)
        if isinstance(value, torch.Tensor):
            self.attach(node, value)
        return node

    def _constant(self, value: Any) -> fx.Node:
        held = flatten(dict(getattr(value, "__dict__", {})))[0]
        if not isinstance(value, torch.Tensor) and any(self.is_computed(t) for t in held):
            raise TracingError(f"a {type(value).__name__} carries computed tensors into a module")
        name = f"_constant_{sum(k.startswith('_constant_') for k in self.attributes)}"
        for known, other in self.attributes.items():
            if other is value and known.startswith("_constant_"):
                name = known
        self.attributes[name] = value
        return self._get_attr(name, value)


def _beside(node: fx.Node) -> dict[str, Any]:
    """What holds of a node that must stay with another."""
    same = ("modules", "no_grad", "grad", "autocast")
    there = {key: value for key, value in node.meta.items() if key in same}
    return {**_BARE, **there, "parameters": (), "glued": True}


def _members(node: fx.Node, output: Any) -> list[tuple[Callable[..., Any], Any, Any]]:
    """How to get at the parts of a container, with their keys and values."""
    if isinstance(output, MutableMapping):
        return [(operator.getitem, key, value) for key, value in output.items()]
    if isinstance(output, tuple | list | UserList):
        return [(operator.getitem, i, value) for i, value in enumerate(output)]
    if hasattr(output, "__dataclass_fields__"):
        return [(getattr, name, getattr(output, name)) for name in output.__dataclass_fields__]
    raise TracingError(
        f"'{node.target}' returns a {type(output).__name__}, which holds tensors out of sight"
    )


def _is_numpy_scalar(value: Any) -> bool:
    from_numpy = type(value).__module__ == "numpy" and hasattr(value, "item")
    return from_numpy and getattr(value, "ndim", 1) == 0
