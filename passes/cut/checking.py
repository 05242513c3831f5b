"""Does the split model compute what the model computes? Asked of numbers, since tracers can be
silently wrong.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import DecouplingError
from ...graphs.nested import flatten, map_tensors
from ..trace.caches import Fakes, forget
from ..trace.nodes import run_node
from ..trace.state import Changes, restored
from ..trace.symbols import plain
from ..trace.tracing import Trace

_RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.complex128: 1e-10,
}


@dataclass(frozen=True)
class Check:
    """Result of the self-check.

    Attributes:
        mismatch: the first thing that differs and by how much, or None.
        exact: whether everything was equal bit for bit.
        changes: what a call of the model does besides.
    """

    mismatch: str | None
    exact: bool
    changes: Changes = field(default_factory=Changes)


def check_stages(
    model: nn.Module, composed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Check:
    """Compare composed stages with the model: outputs, every parameter's gradient, buffers; same
    seed, same inputs.

    The yardstick is the model against itself, since eager PyTorch is not always repeatable.

    Args:
        model: the user's model, in the mode to check.
        composed: runs the stages, called as the model is.
        args: example positional inputs.
        kwargs: example keyword inputs.

    Returns:
        Whether they agree. Model, gradients, buffers and random states are as they were.
    """
    first = check_model(model, args, kwargs)
    changes = Changes()
    second = _measure(model, model, args, kwargs, changes)
    stages = _measure(model, composed, args, kwargs)
    if list(first) != list(stages):
        return Check(
            f"the stages return other tensors than the model ({len(stages)} against {len(first)})",
            False,
        )
    gradients = [t for n, t in first.items() if n.startswith("gradient") and t is not None]
    largest = max(map(_size, gradients), default=0.0)
    exact = True
    for name, expected in first.items():
        found = stages[name]
        if expected is None and found is None:
            continue
        mismatch = _difference_in_kind(expected, found)
        if mismatch is None and expected is not None and found is not None:
            if torch.equal(expected, found) or _same(expected, found, 0.0):
                continue
            exact = False
            least = largest if name.startswith("gradient") else 0.0
            mismatch = _difference(expected, found, second[name], least)
        if mismatch is not None:
            return Check(f"{name}: {mismatch}", False)
    return Check(None, exact, changes)


def _difference_in_kind(expected: torch.Tensor | None, found: torch.Tensor | None) -> str | None:
    """One is missing, or they have other shapes or dtypes; None where they can be compared."""
    if found is None:
        return "no gradient where the model has one"
    if expected is None:
        return "a gradient where the model has none"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        given, wanted = tuple(found.shape), tuple(expected.shape)
        return f"{given} {found.dtype}, expected {wanted} {expected.dtype}"
    return None


def _difference(
    expected: torch.Tensor, found: torch.Tensor, again: torch.Tensor | None, least: float
) -> str | None:
    """By how much two tensors differ, if by more than rounding and the model's own noise explain.

    Args:
        expected: the model's.
        found: the stages'.
        again: the model's at another run.
        least: a size that counts as the tensor's own where that is smaller.
    """
    noise = 0.0 if again is None else _distance(expected, again)
    scale = max(_size(expected), least)
    if _same(expected, found, 10 * noise + _RELATIVE.get(expected.dtype, 2e-2) * scale):
        return None
    distance = _distance(expected, found)
    return f"differs by {distance:.3g} (the model from itself by {noise:.3g})"


def check_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: str = ""
) -> dict[str, torch.Tensor | None]:
    """Run the model itself, so that its own complaint about its inputs is the one that is heard.

    Args:
        model: the user's model.
        args: positional inputs.
        kwargs: keyword inputs.
        seen: what tracing said, which names the place.

    Returns:
        Its outputs, parameter gradients and buffers, by name.

    Raises:
        DecouplingError: the model fails.
    """
    try:
        return _measure(model, model, args, kwargs)
    except Exception as error:
        raise DecouplingError(
            f"{type(model).__name__} itself fails on these inputs: {type(error).__name__}: "
            f"{error}; pass inputs that "
            "model(*args, **kwargs) takes" + (f" ({seen})" if seen else "")
        ) from error


def guards_hold(trace: Trace, leaves: list[torch.Tensor]) -> bool:
    """Whether a trace made for other shapes is valid for these inputs: sizes that the model looked
    at are the same.

    Args:
        trace: the trace.
        leaves: tensor inputs in placeholder order.

    Returns:
        False also where it cannot be told without running the model.
    """
    fake = Fakes()
    with restored(trace.model):
        holds = _holds_on(trace, leaves, fake)
    forget(fake)
    return holds


def _holds_on(trace: Trace, leaves: list[torch.Tensor], fake: Fakes) -> bool:
    expected = dict(trace.guards)
    values: dict[Any, Any] = {}
    inputs = iter(leaves)
    try:
        with fake, torch.no_grad():
            for node in trace.graph.nodes:
                if node.op == "placeholder":
                    values[node] = fake.from_tensor(next(inputs).detach())
                elif node.op == "get_attr":
                    value = trace.attributes[str(node.target)]
                    copied = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
                    values[node] = value.clone() if copied else value
                elif node.op == "output":
                    return True
                else:
                    values[node] = run_node(trace, node, values)
                if node in expected and plain(values[node]) != expected[node]:
                    return False
    except Exception:
        return False
    return True


def _measure(
    model: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    changes: Changes | None = None,
) -> dict[str, torch.Tensor | None]:
    """Outputs, gradients and buffers of one run, after which all is as it was."""
    try:
        with restored(model, args, kwargs) as seen:
            found = _run(model, function, args, kwargs)
    except Exception:  # a mode may be in the way of what runs: without any, then
        with restored(model, args, kwargs, whole=True) as seen:
            found = _run(model, function, args, kwargs)
    if changes is not None:
        changes.tensors, changes.contents = seen.tensors, seen.contents
    return found


def _run(
    model: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor | None]:
    with torch.enable_grad():
        # Not the state in which the model was traced: draws must not be baked in.
        torch.manual_seed(1)
        random.seed(1)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(1)
        args, kwargs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
        output = function(*args, **kwargs)
        results: dict[str, torch.Tensor | None] = {
            f"output {i}": t for i, t in enumerate(flatten(output)[0])
        }
        roots = [t for t in results.values() if t is not None and t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [_like(r, generator) for r in roots]
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        before = [p.grad for _, p in trained]
        try:  # not autograd.grad, which reentrant checkpoints refuse
            for _, parameter in trained:
                parameter.grad = None
            if roots:
                torch.autograd.backward(roots, cotangents)
            found = [
                None if p.grad is None or not p.grad.is_sparse else p.grad.to_dense()
                for _, p in trained
            ]
            found = [p.grad if f is None else f for f, (_, p) in zip(found, trained, strict=True)]
        finally:
            for (_, parameter), gradient in zip(trained, before, strict=True):
                parameter.grad = gradient
        results.update({f"gradient of {n}": g for (n, _), g in zip(trained, found, strict=True)})
        results.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
        return {n: None if t is None else t.detach() for n, t in results.items()}


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return values.to(device=tensor.device, dtype=tensor.dtype)


def _same(expected: torch.Tensor, found: torch.Tensor, allowed: float) -> bool:
    if expected.layout != torch.strided or not expected.numel():
        return True
    a, b = expected.detach(), found.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return bool((a == b).all())
    nans = a.isnan() == b.isnan()
    close = (a - b).abs().double() <= allowed
    return bool((nans & (close | a.isnan() | (a == b))).all())


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().double().nan_to_num().max()) if tensor.numel() else 0.0


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    difference = (expected.detach().double() - found.detach().double()).abs().nan_to_num()
    return float(difference.max()) if difference.numel() else 0.0
