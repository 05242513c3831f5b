"""What a loss reaches besides the model's output: parameters of other stages, and values that their
modules have kept.

Where all stages run in turn the gradient of a penalty on any parameter arrives. Where stages train
at the same time it would be lost, or be written to while the stage's own thread updates: such a
loss is refused by the parameter's name, before anything is pulled back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import DecouplingError
from ..graphs.graphs import Graphs
from ..graphs.nested import flatten
from ..graphs.variants import Variant
from ..passes.trace.calls import StoreAttribute
from ..passes.trace.state import MODULE_INTERNALS

# Calls whose every operator is watched: a mode costs more than a short loss does, and a loss may
# come to read more later.
_FIRST, _EVERY = 4, 16
_ALIASES = {"aten.detach.default", "aten.alias.default"}


class CheckedLoss:
    """A loss of the output of one graph's last stage.

    Args:
        loss: what is called.
        graphs: the model's; the one that the loss is for is active.
        here: the stages that run in turn with the last one; all by default.

    Raises:
        DecouplingError: when called: the loss reads a parameter of a stage that trains elsewhere,
            or a value of an earlier stage that does not cross a cut.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        graphs: Graphs,
        here: Collection[int] | None = None,
    ) -> None:
        stages = graphs.variant.split.stages
        self._loss, self._model = loss, graphs.model
        users: dict[str, int] = {}
        for k in reversed(range(len(stages))):
            users |= dict.fromkeys(graphs.parameter_names(k), k)
        trained = {n: p for n, p in graphs.model.named_parameters() if p.requires_grad}
        names = [graphs.parameter_names(k) for k in (range(len(stages)) if here is None else here)]
        own = set[str]().union(*names)
        self._elsewhere = {n: users[n] for n in trained if n in users and n not in own}
        last = graphs.parameter_names(len(stages) - 1)
        self._earlier = {id(p): n for n, p in trained.items() if n in users and n not in last}
        self._kept = _kept_early(graphs.variant)
        self._last_modules = {id(m) for m in stages[-1].module.modules()}
        self._trained, self._calls = trained, 0

    def __call__(self, output: Any, target: Any) -> Tensor:
        known = [t.grad_fn for t in flatten(output)[0] if t.grad_fn is not None]
        watches = self._elsewhere and (self._calls < _FIRST or self._calls % _EVERY == 0)
        value = self._watched(output, target) if watches else self._loss(output, target)
        self._calls += 1
        if isinstance(value, Tensor):
            self._check(value.grad_fn, known)
        return value

    def _watched(self, output: Any, target: Any) -> Tensor:
        """The loss, refused if it computes with what trains elsewhere, gradient or not."""
        memory = {_memory(self._trained[n]): n for n in self._elsewhere}
        with _Reads(memory) as reads:
            value = self._loss(output, target)
        for name in reads.found:
            self._refuse_parameter(name)
        return value

    def _check(self, root: Any, known: list[Any]) -> None:
        """Look at what the loss reaches on other ways than by the output."""
        nodes = _reached(root, known)
        for name, table, key in self._kept:
            if any(t.grad_fn in nodes for t in flatten(table.get(key))[0] if t.grad_fn is not None):
                raise _lost(name)
        found = [self._earlier.get(id(getattr(n, "variable", None))) for n in nodes]
        names = [n for n in found if n is not None]
        if not names:
            return
        kept = self._find_kept(nodes, max((n._sequence_nr() for n in known), default=None))
        if kept is not None:
            raise _lost(kept)
        for name in names:
            if name in self._elsewhere:
                self._refuse_parameter(name)

    def _find_kept(self, nodes: set[Any], made: int | None) -> str | None:
        """The attribute, and its module, that holds one of the nodes in an earlier stage; not if it
        is newer than the output: that the loss itself has made.
        """
        for name, value in _attributes(self._model, self._last_modules):
            node: Any = value.grad_fn
            if node in nodes and (self._elsewhere or made is None or node._sequence_nr() < made):
                return name
        return None

    def _refuse_parameter(self, name: str) -> None:
        raise DecouplingError(
            f"the loss reads parameter {name!r} of stage_{self._elsewhere[name]}, which trains "
            "elsewhere at the same time: the gradient would not get there. Let the stage's "
            "optimiser do it (weight_decay=), let the model return the term, place the stage with "
            "the last one, or train all stages in turn with dni_fx.Trainer"
        )


def _lost(place: str) -> DecouplingError:
    return DecouplingError(
        f"the loss reads {place}, which an earlier stage has computed: it does not cross the cut, "
        "so its gradient cannot come back. Cut before that module, so that its stage has the loss, "
        "or let the model return the value"
    )


def _kept_early(variant: Variant) -> list[tuple[str, dict[str, Any], str]]:
    """Attributes of modules that stages before the last one fill in a call: for people, the table
    that they are in, and the name.
    """
    model = variant.trace.model
    changed = {id(kept.owner) for kept in variant.trace.changes.contents}
    paths = {id(m): path for path, m in model.named_modules()}
    found: list[tuple[nn.Module, str]] = []
    for stage in variant.split.stages[:-1]:
        nodes, get = stage.module.graph.nodes, stage.module.get_submodule
        targets = [n.target for n in nodes]
        found += [(t.module, t.name) for t in targets if isinstance(t, StoreAttribute)]
        # By the stage: layers that were told apart are no modules of the model.
        called = [get(str(n.target)) for n in nodes if n.op == "call_module"]
        for module in [m for each in called for m in each.modules()]:
            own = vars(module)
            whole = id(own) in changed
            names = [n for n in own.keys() - MODULE_INTERNALS if whole or id(own[n]) in changed]
            found += [(module, name) for name in sorted(names)]
    return [(_place(paths.get(id(m)), n), vars(m), n) for m, n in found]


def _place(path: str | None, name: str) -> str:
    owner = f"module {path!r}" if path else "the model"
    return f"attribute {name!r} of {owner}"


class _Reads(TorchDispatchMode):
    """Remembers which memory is computed with."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func) not in _ALIASES:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (name := self.names.get(_memory(leaf))):
                    self.found[name] = None
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """What tells a tensor's storage from others; of a sparse one, which has none, its own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _reached(root: Any, known: list[Any]) -> set[Any]:
    """The nodes of an autograd graph, those before the known ones left out."""
    nodes, waiting, ends = set[Any](), [root], set(known)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes and node not in ends:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes


def _attributes(model: nn.Module, left_out: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors with a graph that modules hold, also in containers, with their names."""
    for path, module in model.named_modules():
        if id(module) in left_out:
            continue
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules"):
                for leaf in flatten(value)[0]:
                    if leaf.grad_fn is not None:
                        yield _place(path, name), leaf
