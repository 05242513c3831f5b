"""Where gradients must arrive in a stage once everything that it sends has one, as the traced graph
says; so that one that goes missing is an error, and not taken for zero.

Only what is certain counts: paths over torch's own functions and leaf modules. What an opaque node,
a custom function or a write in place does is known when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..trace.held import is_hooked
from ..trace.nodes import needs_gradient
from ..trace.traces import Trace
from .splitting import Split

_MODULES = (
    *("torch", "torch.functional", "torch.nn.functional", "_operator", "torch._C._nn"),
    *("torch._C._linalg", "torch._C._special", "torch._C._fft"),
)
# Functions whose further arguments give a shape or a dtype alone; and those, by independent
# results, whose arguments need not all be reached.
_FIRST_ALONE = ("expand_as", "view_as", "reshape_as", "type_as", "to", "sum_to_size", "copy_")
_INDEPENDENT = ("broadcast_tensors", "meshgrid", "cartesian_prod", "align_tensors", "setitem")
# What asks whether a tensor has a gradient, or for one.
_ASKING = {"requires_grad", "requires_grad_", "register_hook", "retain_grad", "grad", "grad_fn"}
_ASKING |= {"is_leaf", "backward", "output_nr"}
_BY_VALUE = (nn.AdaptiveLogSoftmaxWithLoss,)  # which of its parameters it uses


@dataclass(frozen=True)
class Expected:
    """Where gradients must arrive in one stage.

    Attributes:
        inputs: names of interfaces that it takes.
        parameters: by name, as they were when the model was traced.
        is_plain: whether everything on the way is torch's own, so that parameters get the same
            gradients where the inputs ask for none.
    """

    inputs: tuple[str, ...]
    parameters: dict[str, nn.Parameter]
    is_plain: bool = False


def find_expected(
    trace: Trace, stage_of: Mapping[fx.Node, int], split: Split
) -> tuple[Expected, ...]:
    """For every stage, from the graph that was split. Linear in nodes and edges."""
    nodes = list(trace.graph.nodes)
    by_name = {n.name: n for n in nodes}
    crossing = {by_name[c]: i for c, i in zip(split.crossing, split.interfaces, strict=True)}
    returned = [n for n in trace.output_leaves if isinstance(n, fx.Node)]
    certain = {n for n in crossing if needs_gradient(n)}
    if len(returned) == 1:  # else the loss may pass over some
        certain |= {n for n in returned if needs_gradient(n)}
    inputs: dict[int, set[str]] = {}
    parameters: dict[int, set[str]] = {}
    for node in reversed(nodes):
        stage = stage_of.get(node)
        if stage is None or node not in certain or not _is_plain(trace, node):
            continue
        learnt = parameters.setdefault(stage, set())
        if node.op == "call_module":
            learnt.update(node.meta.get("parameters", ()))
        for used in _differentiated(node):
            if used.op == "get_attr":
                learnt.update(used.meta.get("parameters", ()))
            elif stage_of.get(used) == stage:
                certain.add(used)
            elif used in crossing:
                inputs.setdefault(stage, set()).add(crossing[used].name)
    known = dict(trace.model.named_parameters())
    others = {stage_of[n] for n in nodes if n in stage_of and _may_ask(trace, n)}
    return tuple(
        Expected(
            tuple(n for n in stage.inputs if n in inputs.get(stage.index, ())),
            {
                n: known[n]
                for n in stage.parameters
                if n in parameters.get(stage.index, ()) and known[n].requires_grad
            },
            stage.index not in others,
        )
        for stage in split.stages
    )


def _may_ask(trace: Trace, node: fx.Node) -> bool:
    """Whether it may do something else where a tensor given to it has no gradient: a checkpoint
    that is entered again, a hook, a custom function.
    """
    if node.op not in ("call_module", "call_method", "call_function"):
        return False
    if node.target is getattr or node.op == "call_method":
        name = node.args[1] if node.target is getattr else node.target
        if name in _ASKING:
            return True
    if _is_plain(trace, node):
        return False
    return node.meta.get("value") is None or needs_gradient(node)


def _is_plain(trace: Trace, node: fx.Node) -> bool:
    """Whether it is one of torch's own operations, which passes on what flows back to it."""
    if node.meta.get("mutates"):
        return False
    if node.op == "call_module":
        path = str(node.target)
        module: Any = trace.attributes.get(path)
        plain = type(module).__module__.startswith("torch.nn.modules.")
        if node.meta.get("value") is None and not isinstance(module, nn.RNNBase):
            return False
        own = is_hooked(module) or path in trace.opaque or type(module) in _BY_VALUE
        return plain and not own
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None)
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and module in _MODULES and name not in _INDEPENDENT


def _differentiated(node: fx.Node) -> list[fx.Node]:
    """What the gradient of a node's value surely flows to."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    used = node.all_input_nodes
    if node.target is operator.getitem:  # of a tensor, or of several results of one call
        return [n for n in used[:1] if needs_gradient(n) or n.meta.get("value") is None]
    found = [n for n in (used[:1] if name in _FIRST_ALONE else used) if needs_gradient(n)]
    # Of several results some may depend on some arguments alone.
    return found if node.meta.get("value") is not None or len(found) == 1 else []
