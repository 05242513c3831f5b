"""How well a gradient could be predicted at a place: sources are fitted for a moment to the true
gradients there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import fx

from ...errors import DecouplingError
from ...graphs.nested import flatten
from ...plan import TensorSpec
from ...runtime.emitted import evaluate
from ...sources import GradientSource, make_source
from ..cut.cutting import Flow, needs_gradient
from ..cut.insertion import infer_context
from ..trace.nodes import run_node
from ..trace.state import restored
from .probes import regions
from .source_costs import OptionOf

BATCHES = 8  # looked at; a quarter of them judge
FITS = 80  # steps that a source is fitted
RATE = 3e-3  # of Adam
_HELD = 1 << 29  # bytes of values and gradients that are held at a time

Batch = tuple[tuple[Any, ...], dict[str, Any], Any]


def measure_learnability(
    flow: Flow,
    batches: Iterable[Any],
    loss: Any,
    option_of: OptionOf,
    context: Callable[[Any], torch.Tensor] | None,
    positions: tuple[int, ...],
    *,
    unpack: Callable[[Any], Batch],
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[int, float]:
    """What share of the true gradient a quickly fitted source leaves unexplained, on batches that
    it has not seen.

    Args:
        flow: facts of a traced model.
        batches: a few batches, with targets.
        loss: ``loss(output, target)``, a scalar.
        option_of: the source asked for at a node's value.
        context: turns targets into what the sources see, or None.
        positions: where cuts could be.
        unpack: turns a batch into ``(args, kwargs, target)``.
        watch: wraps the values, for a progress bar.

    Returns:
        For each position, squared error over squared gradient of all values that cross there: 0 is
        perfect, 1 no better than no gradient at all. The model, its gradients and random states are
        as they were.

    Raises:
        DecouplingError: fewer than two batches, or batches of other shapes than the example's.
    """
    taken = [unpack(b) for b in islice(batches, BATCHES)]
    if len(taken) < 2:
        raise DecouplingError(
            "objective='learnability' needs at least two batches: some to fit on, one to judge by"
        )
    crossing = {
        p: [n for n in flow.nodes if flow.crosses(n, p) and flow.carries_gradient(n, p)]
        for p in positions
    }
    wanted = list(dict.fromkeys(n for nodes in crossing.values() for n in nodes))
    size = lambda n: 2 * flow.specs[n.name].nbytes * len(taken)  # noqa: E731
    groups: list[list[fx.Node]] = [[]]
    for node in wanted:
        if groups[-1] and sum(map(size, groups[-1])) + size(node) > _HELD:
            groups.append([])
        groups[-1].append(node)
    leaves = flatten((taken[0][0], taken[0][1]))[0]
    seen = infer_context(context, leaves[0].shape[0] if leaves and leaves[0].dim() else 1)
    contexts = [None if context is None else context(target) for _, _, target in taken]
    errors: dict[fx.Node, tuple[float, float]] = {}
    progress = iter(watch(wanted))
    for group in groups:
        held = [_true_gradients(flow, batch, loss, group) for batch in taken]
        for node in group:
            next(progress)
            errors[node] = _fit(
                [h[node] for h in held], contexts, option_of(node), flow.specs[node.name], seen
            )
    for _ in progress:
        pass
    shares = {}
    for position, nodes in crossing.items():
        wrong, whole = (sum(errors[n][k] for n in nodes) for k in (0, 1))
        shares[position] = min(wrong / whole, 1.0) if whole else 0.0
    return shares


def _true_gradients(
    flow: Flow, batch: Batch, loss: Any, wanted: list[fx.Node]
) -> Mapping[fx.Node, tuple[torch.Tensor, torch.Tensor]]:
    """Values and their gradients, as they were before later nodes wrote to them."""
    args, kwargs, target = batch
    leaves, structure = flatten((args, kwargs))
    if structure != flow.trace.inputs:
        raise DecouplingError(
            "batches= must hold the model's inputs as example_inputs= does, and then the target"
        )
    chosen = set(wanted)
    inputs = iter(leaves)
    values: dict[fx.Node, Any] = {}
    found: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
    with restored(flow.trace.model, batch), torch.enable_grad():
        for node in flow.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = flow.trace.attributes[str(node.target)]
            elif node.op != "output":
                with regions(node), torch.set_grad_enabled(not node.meta.get("no_grad")):
                    value = values[node] = run_node(flow.trace, node, values)
                if node in chosen and needs_gradient(node) and value.requires_grad:
                    copy = value.detach().clone()
                    found[node] = (copy, torch.zeros_like(copy))
                    value.register_hook(
                        lambda g, n=node, c=copy: found.__setitem__(n, (c, g.detach().clone()))
                    )
        output = next(n for n in reversed(flow.nodes) if n.op == "output")
        returned: Any = output.args[0]
        results = iter([values[a] if isinstance(a, fx.Node) else a for a in returned])
        value = evaluate(loss, flow.trace.outputs.build(results), target)
        parameters = [p for p in flow.trace.model.parameters() if p.requires_grad]
        torch.autograd.grad(value, parameters, allow_unused=True)
    return found


def _fit(
    held: list[tuple[torch.Tensor, torch.Tensor]],
    contexts: list[torch.Tensor | None],
    option: Any,
    spec: TensorSpec,
    seen: TensorSpec | None,
) -> tuple[float, float]:
    """Squared error and squared gradient on the batches kept back."""
    device = held[0][0].device
    source: GradientSource = make_source(option, (spec,), seen).to(device)
    learnt = [p for p in source.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, RATE) if learnt else None
    pairs = list(zip(held, contexts, strict=True))
    judged = max(1, len(pairs) // 4)
    with torch.enable_grad():
        # What messages of other kinds would say is not known here: those sources are judged as they
        # start.
        for step in range(
            FITS if optimizer and source.asks.learns_from in (("gradient",), ()) else 0
        ):
            (value, gradient), context = pairs[step % (len(pairs) - judged)]
            error = source.fit(
                source((value,), context), (gradient,) if source.asks.learns_from else ()
            )
            if error is None:
                break
            assert optimizer is not None
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    wrong = whole = 0.0
    with torch.no_grad():
        for (value, gradient), context in pairs[-judged:]:
            guess = source((value,), context).gradients
            if guess is not None:
                wrong += float((guess[0] - gradient).double().square().sum())
            elif "gradient" not in source.asks.awaited:  # else it waits for the true one
                wrong += float(gradient.double().square().sum())
            whole += float(gradient.double().square().sum())
    return wrong, whole
