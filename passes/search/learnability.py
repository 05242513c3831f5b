"""How well a gradient could be predicted at a place: sources are fitted for a moment to the true
gradients there.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from ...errors import DecouplingError
from ...graphs.nested import flatten, unpack_batch
from ...runtime.emitted import evaluate
from ...sources import GradientSource, for_consumers, make_source
from ..cut.cutting import Flow
from ..cut.insertion import Context, infer_context
from ..trace.interpreting import interpret
from ..trace.nodes import needs_gradient
from ..trace.state import restored
from .source_costs import OptionOf

_BATCHES = 8  # looked at; a quarter of them judge
_FITS, _RATE = 80, 3e-3  # steps that a source is fitted, with Adam
_HELD = 1 << 29  # bytes of values and gradients that are held at a time

Pair = tuple[torch.Tensor, torch.Tensor]  # a value and its gradient


def measure_learnability(
    flow: Flow,
    batches: Iterable[Any],
    loss: Any,
    option_of: OptionOf,
    context: Context | None,
    positions: tuple[int, ...],
    *,
    progress: bool,
) -> dict[int, float]:
    """What share of the true gradient a quickly fitted source leaves unexplained, on batches that
    it has not seen.

    Returns:
        For each position, squared error over squared gradient of all values that cross there: 0 is
        perfect, 1 no better than no gradient at all. The model, its gradients and random states are
        as they were.

    Raises:
        DecouplingError: fewer than two batches, or batches of other shapes than the example's.
    """
    taken = [unpack_batch(b) for b in islice(batches, _BATCHES)]
    if len(taken) < 2:
        raise DecouplingError(
            "objective='learnability' needs at least two batches: some to fit on, one to judge by"
        )
    crossing = {
        p: [n for n in flow.nodes if flow.crosses(n, p) and flow.carries_gradient(n, p)]
        for p in positions
    }
    groups: list[list[fx.Node]] = []
    held = _HELD
    for node in dict.fromkeys(n for nodes in crossing.values() for n in nodes):
        held += 2 * flow.specs[node.name].nbytes * len(taken)
        if held > _HELD:
            groups.append([])
            held = 2 * flow.specs[node.name].nbytes * len(taken)
        groups[-1].append(node)
    seen = infer_context(context, flow.inputs)
    contexts = [None if context is None else context(target) for _, _, target in taken]
    errors: dict[fx.Node, tuple[float, float]] = {}
    total = sum(map(len, groups))
    with tqdm(total=total, desc="probing", leave=False, disable=not progress) as bar:
        for group in groups:
            found = [_true_gradients(flow, batch, loss, set(group)) for batch in taken]
            for node in group:
                option = for_consumers(option_of(node), 1)
                source = make_source(option, (flow.specs[node.name],), seen)
                errors[node] = _fit(source, [f[node] for f in found], contexts)
                bar.update()
    shares = {}
    for position, nodes in crossing.items():
        wrong, whole = (sum(errors[n][k] for n in nodes) for k in (0, 1))
        shares[position] = min(wrong / whole, 1.0) if whole else 0.0
    return shares


def _true_gradients(
    flow: Flow, batch: tuple[Any, Any, Any], loss: Any, wanted: set[fx.Node]
) -> dict[fx.Node, Pair]:
    """Values and their gradients, as they were before later nodes wrote to them."""
    args, kwargs, target = batch
    leaves, structure = flatten((args, kwargs))
    if structure != flow.trace.inputs:
        raise DecouplingError(
            "batches= must hold the model's inputs as example_inputs= does, and then the target"
        )
    inputs = flow.trace.placed(leaves)
    outputs, results = flow.trace.output_leaves, dict[fx.Node, Any]()
    found: dict[fx.Node, Pair] = {}
    with restored(flow.trace.model, batch), torch.enable_grad():
        for node, value in interpret(flow.nodes, flow.trace.attributes, inputs.__getitem__):
            if node in outputs:
                results[node] = value
            if node in wanted and needs_gradient(node) and value.requires_grad:
                copy = value.detach().clone()
                found[node] = (copy, torch.zeros_like(copy))
                value.register_hook(
                    lambda g, n=node, c=copy: found.__setitem__(n, (c, g.detach().clone()))
                )
        made = (results[a] if isinstance(a, fx.Node) else a for a in outputs)
        value = evaluate(loss, flow.trace.outputs.build(made), target)
        parameters = [p for p in flow.trace.model.parameters() if p.requires_grad]
        torch.autograd.grad(value, parameters, allow_unused=True)
    return found


def _fit(
    source: GradientSource, pairs: list[Pair], contexts: list[torch.Tensor | None]
) -> tuple[float, float]:
    """Squared error and squared gradient on the batches kept back."""
    source.to(pairs[0][0].device)
    learnt = [p for p in source.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, _RATE) if learnt else None
    judged = max(1, len(pairs) // 4)
    # What messages of other kinds would say is not known here: those sources are judged as they
    # start.
    if optimizer is not None and source.asks.learns_from in (("gradient",), ()):
        for step in range(_FITS):
            at = step % (len(pairs) - judged)
            (value, gradient), context = pairs[at], contexts[at]
            message = (gradient,) if source.asks.learns_from else ()
            with torch.enable_grad():
                error = source.fit(source((value,), context), message)
            if error is None:
                break
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    wrong = whole = 0.0
    with torch.no_grad():
        for (value, gradient), context in zip(pairs[-judged:], contexts[-judged:], strict=True):
            guess = source((value,), context).gradients
            if guess is not None:
                wrong += float((guess[0] - gradient).double().square().sum())
            elif "gradient" not in source.asks.awaited:  # else it waits for the true one
                wrong += float(gradient.double().square().sum())
            whole += float(gradient.double().square().sum())
    return wrong, whole
