"""Does the split model compute what the model computes? Asked of numbers, since tracers can be
silently wrong.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import DecouplingError, user_line
from ...graphs.nested import flatten, map_tensors
from ..trace.nodes import run_node
from ..trace.state import restored, untouched
from ..trace.symbols import plain
from ..trace.tracing import Trace
from ..trace.values import dense

_RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.complex128: 1e-10,
}


Measured = dict[str, torch.Tensor | None]  # outputs, parameters' gradients and buffers, by name


@dataclass(frozen=True)
class Check:
    """Result of the self-check.

    Attributes:
        mismatch: the first thing that differs and by how much, or None.
        exact: whether everything was equal bit for bit.
    """

    mismatch: str | None
    exact: bool


class Yardstick:
    """What a model computes in a call: outputs, every parameter's gradient, buffers; measured when
    first asked for.

    Args:
        model: the user's model, in the mode to check.
        args: example positional inputs.
        kwargs: example keyword inputs.
        lenient: whether to do without gradients where the model has none in this mode (reversible
            blocks that record what their backward needs in training alone).

    Attributes:
        note: a remark for the plan: that gradients were not compared.
        seen: what tracing said, which names the place.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], lenient: bool = False
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.note: str | None = None
        self.seen = ""
        self._lenient = lenient

    def measure(self, function: Callable[..., Any]) -> Measured:
        """The same of anything that is called as the model is, with the same seed and inputs."""
        pulled = self.note is None
        return _measure(self.model, function, self.args, self.kwargs, pulled)

    @functools.cached_property
    def first(self) -> Measured:
        """Of the model.

        Raises:
            DecouplingError: the model itself fails, so that its own complaint is the one that is
                heard.
        """
        try:
            return self.measure(self.model)
        except _RunError as error:
            if not error.in_backward or not self._lenient:
                raise self._failure(error) from error.__cause__
            mode = "training" if self.model.training else "evaluation"
            self.note = (
                f"in {mode} mode the model's own backward fails ({_text(error.__cause__)}): "
                "outputs and buffers were compared there, gradients were not"
            )
        return self.measure(self.model)

    def _failure(self, error: _RunError) -> DecouplingError:
        cause = error.__cause__ or error
        name, seen = type(self.model).__name__, self.seen or user_line(cause)
        where = f" ({seen})" if seen else ""
        if error.in_backward:
            return DecouplingError(
                f"{name}'s own backward fails: {_text(error.__cause__)}{where}; pass inputs that "
                "it can be trained with, and put it into the mode for that"
            )
        return DecouplingError(
            f"{name} itself fails on these inputs: {_text(error.__cause__)}; pass inputs that "
            f"model(*args, **kwargs) takes{where}"
        )

    @functools.cached_property
    def second(self) -> Measured:
        """Of the model again, since eager PyTorch is not always repeatable."""
        return self.measure(self.model)


def check_stages(
    model: nn.Module,
    composed: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    yardstick: Yardstick | None = None,
) -> Check:
    """Compare composed stages with the model: outputs, every parameter's gradient, buffers; same
    seed, same inputs.

    Args:
        model: the user's model, in the mode to check.
        composed: runs the stages, called as the model is.
        args: example positional inputs.
        kwargs: example keyword inputs.
        yardstick: of the model in this call, where there is one already.

    Returns:
        Whether they agree. Model, gradients, buffers and random states are as they were.
    """
    yardstick = yardstick or Yardstick(model, args, kwargs)
    first, second = yardstick.first, yardstick.second
    try:
        stages = yardstick.measure(composed)
    except _RunError as error:
        if isinstance(error.__cause__, DecouplingError):
            raise error.__cause__ from None
        part = "the backward of the stages" if error.in_backward else "the stages"
        return Check(f"{part} failed: {_text(error.__cause__)}", False)
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
    return Check(None, exact)


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


class _RunError(Exception):
    """What was measured failed by itself; its cause is the error."""

    def __init__(self, in_backward: bool) -> None:
        super().__init__()
        self.in_backward = in_backward


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"


def guards_hold(trace: Trace, leaves: list[torch.Tensor]) -> bool:
    """Whether a trace made for other shapes is valid for these inputs: sizes that the model looked
    at are the same.

    Args:
        trace: the trace.
        leaves: tensor inputs in placeholder order.

    Returns:
        False also where it cannot be told without running the model.
    """
    expected = dict(trace.guards)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[Any, Any] = {}
    inputs = iter(leaves)
    try:
        with untouched(trace.model), fake, torch.no_grad():
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
    pulled: bool = True,
) -> Measured:
    """Outputs, buffers and, if gradients are to be pulled back, those of the parameters.

    Raises:
        _RunError: the function fails, or its backward.
    """
    with restored(model), torch.enable_grad():
        # Not the state in which the model was traced: draws must not be baked in.
        torch.manual_seed(1)
        random.seed(1)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(1)
        args, kwargs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
        try:
            output = function(*args, **kwargs)
        except Exception as error:
            raise _RunError(in_backward=False) from error
        results: Measured = {f"output {i}": dense(t) for i, t in enumerate(flatten(output)[0])}
        if pulled:
            roots = [t for t in results.values() if t is not None and t.requires_grad]
            results.update(_gradients(model, roots))
        results.update({f"buffer {n}": dense(b).clone() for n, b in model.named_buffers()})
        return {n: None if t is None else t.detach() for n, t in results.items()}


def _gradients(model: nn.Module, roots: list[torch.Tensor]) -> Measured:
    """Of every trainable parameter, for cotangents that are the same each time."""
    generator = torch.Generator().manual_seed(0)
    cotangents = [_like(r, generator) for r in roots]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    before = [p.grad for _, p in trained]
    try:  # not autograd.grad, which reentrant checkpoints refuse
        for _, parameter in trained:
            parameter.grad = None
        if roots:
            torch.autograd.backward(roots, cotangents)
        return {f"gradient of {n}": None if p.grad is None else dense(p.grad) for n, p in trained}
    except Exception as error:
        raise _RunError(in_backward=True) from error
    finally:
        for (_, parameter), gradient in zip(trained, before, strict=True):
            parameter.grad = gradient


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
