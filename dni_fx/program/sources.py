"""What stands in for later stages, as classes that import torch alone: the library's own sources,
whose networks are traced and written like a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DecouplingError
from ..graphs.pipeline import trace_model
from ..plan import TensorSpec
from ..sources import AcrossTime, GradientSource, Local, LossHead, Regression, Served, Zero
from .attributes import class_lines
from .classes import Classes, GraphWriter, method_lines
from .text import literal


@dataclass(frozen=True)
class Written:
    """One source as it is written.

    Attributes:
        kind: ``"regression"``, ``"joint"``, ``"window"``, ``"head"`` or ``"zero"``.
        expression: the call that makes it; empty for one that holds nothing.
        tensors: its parameters and buffers by key.
        takes_context: whether it is given the context.
        uses: names of the kit that are needed.
    """

    kind: str
    expression: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    takes_context: bool = False
    uses: tuple[str, ...] = ()


def write_source(group: Served, classes: Classes) -> Written:
    """A source as a class.

    Args:
        group: the source, and what it serves.
        classes: where it is registered.

    Raises:
        DecouplingError: a source that cannot be written.
    """
    source, context = group.source, group.source.context_spec
    if type(source) is Zero:
        return Written("zero", "", uses=("no_gradients",))
    if isinstance(source, Regression) and _is_plain(source, Regression):
        return _regression(source, context, classes)
    if type(source) is AcrossTime and not source.auxiliary and not source.asks.exact:
        return _across_time(source, group, classes)
    if isinstance(source, Local) and _is_plain(source, Local, LossHead):
        return _head(source, classes)
    raise DecouplingError(
        f"the source at {group.name!r}, a {type(source).__name__}, cannot be written as files: "
        "those that can answer at once and are the library's own: 'auto', 'linear', 'mlp', "
        "'conv', 'local' and 'zero'. Decouple with gradients= one of these"
    )


def _is_plain(source: GradientSource, *kinds: type[GradientSource]) -> bool:
    """Whether it does as the library's class does, in all that counts."""
    names = ("predict", "fit", "forward", "evaluate", "logits", "rescale")
    own = type(source)
    return own.__module__.startswith("dni_fx.") and all(
        getattr(own, n, None) in [getattr(k, n, None) for k in kinds] for n in names
    )


def _regression(source: Regression, context: TensorSpec | None, classes: Classes) -> Written:
    dtype: torch.dtype = source.scale.dtype
    told = "" if dtype == torch.float32 else f", dtype={literal(dtype)}"
    name = type(source).__name__
    seen = [bool(getattr(n, "context_features", 0)) for n in source.networks]
    if len(source.networks) == 1:
        names = ["value", *(["context"] if seen[0] else [])]
        lines, tensors = _network_class(
            source.networks[0], (source.specs[0],), context if seen[0] else None, names, classes,
            f"Predicts a gradient: ``{name.lower()}``.", "Regression", told.lstrip(", "),
        )  # fmt: skip
        tensors |= {"scale": source.scale[0], "count": source.count[0]}
        wanted = classes.add(f"{name}Source", lines, set())
        return Written("regression", f"{wanted}()", tensors, seen[0], ("Regression",))
    return _joint(source, context, classes, seen, told)


def _across_time(source: AcrossTime, group: Served, classes: Classes) -> Written:
    """What predicts for a state, around another source."""
    if type(source.source) is Zero:
        return Written("zero", "", uses=("no_gradients",))
    if len({spec.dtype for spec in source.specs}) > 1 or any(
        len(s.shape) < 2 for s in source.specs
    ):
        raise DecouplingError(
            "a state of several dtypes, or of scalars, cannot be written as files"
        )
    inner = Served(group.names, source.source, group.producer, group.consumers)
    written = write_source(inner, classes)
    if written.kind != "regression":
        raise DecouplingError(f"the source at {group.name!r} cannot be written as files")
    dims = literal([spec.batch_dim for spec in source.specs])
    tensors = {f"source.{k}": t for k, t in written.tensors.items()}
    made = f"AcrossTime({written.expression}, {literal(source.factor)}, {dims})"
    uses = (*written.uses, "AcrossTime")
    return Written("window", made, tensors, written.takes_context, uses)


def _joint(
    source: Regression, context: TensorSpec | None, classes: Classes, seen: list[bool], told: str
) -> Written:
    """One source for several values: a network for each."""
    tensors: dict[str, Tensor] = {"scale": source.scale, "count": source.count}
    made: list[str] = []
    name = type(source).__name__
    for k, network in enumerate(source.networks):
        names = ["value", *(["context"] if seen[k] else [])]
        lines, found = _network_class(
            network, (source.specs[k],), context if seen[k] else None, names, classes,
            f"Predicts one of the gradients: ``{name.lower()}``.", "", "",
        )  # fmt: skip
        made.append(f"{classes.add(f'{name}Network', lines, set())}()")
        tensors |= {f"networks.{k}.{n}": t for n, t in found.items()}
    values = [f"value_{k}" for k in range(len(made))]
    with_context = any(seen)
    given = ", ".join(f"{v}: Tensor" for v in [*values, *(["context"] * with_context)])
    asked = [f"self.networks[{k}]({v}{', context' * s})"
             for k, (v, s) in enumerate(zip(values, seen, strict=True))]  # fmt: skip
    lines = [
        "class \0(JointRegression):",
        f'    """Predicts {len(made)} gradients together: ``{name.lower()}``."""',
        "",
        "    def __init__(self) -> None:",
        f"        super().__init__({len(made)}{told})",
        f"        self.networks = nn.ModuleList([{', '.join(made)}])",
        "",
        f"    def forward(self, {given}) -> list[Tensor]:",
        f"        return [{', '.join(asked)}]",
    ]
    wanted = classes.add(f"{name}Source", lines, set())
    return Written("joint", f"{wanted}()", tensors, with_context, ("JointRegression",))


def _head(source: Local, classes: Classes) -> Written:
    """A head: values and context to the mean loss."""
    dtype, factor = source.output.weight.dtype, source.unit * source.factor
    values = [f"value_{k}" for k in range(len(source.specs))] if len(source.specs) > 1 else []
    values = values or ["value"]
    specs = [TensorSpec(s.shape, dtype, s.feature_dim) for s in source.specs]
    lines, tensors = _network_class(
        _HeadLoss(source), specs, source.context_spec, [*values, "context"], classes,
        "Guesses the loss, and learns to: ``local``.", "LocalHead", "",
    )  # fmt: skip
    fields = [f"    factor = {factor!r}"] if factor != 1 else []
    fields += [f"    dtype = {literal(dtype)}"] if dtype != torch.float32 else []
    if fields:
        lines[3:3] = [*fields, ""]
    wanted = classes.add("LocalSource", lines, set())
    return Written("head", f"{wanted}()", tensors, True, ("LocalHead",))


class _HeadLoss(nn.Module):
    """The mean loss of a head, whose modules it shares."""

    def __init__(self, head: LossHead) -> None:
        super().__init__()
        for name, module in head.named_children():
            self.add_module(name, module)
        vars(self)["head"] = head  # no submodule: paths are the head's

    def forward(self, *given: Tensor) -> Tensor:
        head: Any = vars(self)["head"]
        context = given[-1]
        mean: Tensor = head.evaluate(head.logits(list(given[:-1]), context), context)[1]
        return mean


def _network_class(
    network: nn.Module,
    specs: Sequence[TensorSpec],
    context: TensorSpec | None,
    names: Sequence[str],
    classes: Classes,
    text: str,
    base: str,
    told: str,
) -> tuple[list[str], dict[str, Tensor]]:
    """The class of a network that is traced on values like the example's."""
    examples = [torch.zeros(s.shape, dtype=s.dtype) for s in specs]
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if context is not None:
        examples.append(torch.zeros(context.shape, dtype=context.dtype))
    given = [e.to(device) for e in examples]
    if context is None and not isinstance(network, _HeadLoss):
        given = [*given, None]  # type: ignore[list-item]
    trace = trace_model(network, tuple(given), {})
    (result,) = trace.output_leaves
    places = [n for n in trace.graph.nodes if n.op == "placeholder"]
    writer = GraphWriter(trace.graph, trace, network, (result,), classes, "A source's")
    held, body = writer.written(dict(zip(places, names, strict=True)), result)
    lines = class_lines(text, held, method_lines("forward", body), base)
    if told:
        lines = [line.replace("super().__init__()", f"super().__init__({told})") for line in lines]
    return lines, dict(held.tensors)
