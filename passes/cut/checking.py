"""Does the split model compute what the model computes? Asked of numbers, since tracers can be
silently wrong.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...errors import DecouplingError, user_line
from ...graphs.nested import flatten, map_tensors
from ..trace.caches import Fakes, fakes
from ..trace.interpreting import interpret
from ..trace.ports import ANOTHER
from ..trace.prefixes import ancestors, run_prefix
from ..trace.state import Changes, restored
from ..trace.symbols import plain
from ..trace.traces import Trace
from ..trace.values import copied, dense
from .splitting import Split

_RELATIVE = {torch.float64: 1e-10, torch.complex128: 1e-10}
_RELATIVE |= {torch.float32: 1e-4, torch.complex64: 1e-4}


Measured = dict[str, torch.Tensor | None]  # outputs, parameters' gradients and buffers, by name


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
        grad: whether gradients are asked for, which code may look at.
        changes: what a call of the model does besides.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], lenient: bool = False
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.grad = True
        self.note: str | None = None
        self.seen = ""
        self.changes = Changes()
        self._lenient = lenient

    def ask(self, grad: bool) -> None:
        """Whether gradients are asked for; where that is new, the model is measured anew."""
        if grad != self.grad:
            self.grad = grad
            for name in ("first", "second"):
                vars(self).pop(name, None)

    def measure(self, function: Callable[..., Any]) -> Measured:
        """The same of anything that is called as the model is, with the same seed and inputs."""
        return self._run(function)[0]

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
        found, self.changes = self._run(self.model)
        return found

    def _run(self, function: Callable[..., Any]) -> tuple[Measured, Changes]:
        """Of one run after which all is as it was, and what the run changed.

        Raises:
            _RunError: the function fails, or its backward.
        """
        try:
            with restored(self.model, self.args, self.kwargs) as changes:
                return self._call(function), changes
        except Exception:  # a mode may be in the way of what runs: without any, then
            with restored(self.model, self.args, self.kwargs, whole=True) as changes:
                return self._call(function), changes

    def _call(self, function: Callable[..., Any]) -> Measured:
        """Outputs, buffers and, where the model has a backward, gradients of the parameters."""
        copies: dict[int, torch.Tensor] = {}  # the same tensor again is one

        def own(tensor: torch.Tensor) -> torch.Tensor:
            leaf = copied(tensor)
            return copies.setdefault(id(tensor), leaf if tensor.is_leaf else leaf.view_as(leaf))

        with torch.set_grad_enabled(self.grad):
            # Not the state in which the model was traced: draws must not be baked in.
            torch.manual_seed(1)
            random.seed(1)
            if "numpy.random" in sys.modules:
                sys.modules["numpy.random"].seed(1)
            args, kwargs = map_tensors(own, (self.args, self.kwargs))
            try:
                output = function(*args, **kwargs)
            except Exception as error:
                raise _RunError(in_backward=False) from error
            results: Measured = {f"output {i}": dense(t) for i, t in enumerate(flatten(output)[0])}
            if self.note is None:
                roots = [t for t in results.values() if t is not None and t.requires_grad]
                results.update(_gradients(self.model, roots))
            results.update({f"buffer {n}": dense(b).clone() for n, b in self.model.named_buffers()})
            return {n: None if t is None else t.detach() for n, t in results.items()}


def check_stages(yardstick: Yardstick, composed: Callable[..., Any]) -> Check:
    """Compare composed stages with the model: outputs, every parameter's gradient, buffers; same
    seed, same inputs.

    Args:
        yardstick: the user's model in a call, in the mode to check.
        composed: runs the stages, called as the model is.

    Returns:
        Whether they agree, and what a call of the model changes. Model, gradients, buffers and
        random states are as they were.
    """
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
        least = largest if name.startswith("gradient") else 0.0
        check = _compare(expected, stages[name], second[name], least)
        if check.mismatch is not None:
            return Check(f"{name}: {check.mismatch}", False)
        exact &= check.exact
    return Check(None, exact, yardstick.changes)


def _compare(
    expected: torch.Tensor | None,
    found: torch.Tensor | None,
    again: torch.Tensor | None,
    least: float,
) -> Check:
    """Whether two tensors differ by more than rounding and the model's own noise explain.

    Args:
        expected: the model's.
        found: the stages'.
        again: the model's at another run.
        least: a size that counts as the tensor's own where that is smaller.
    """
    if expected is None or found is None:
        missing = "no gradient where the model has one"
        missing = "a gradient where the model has none" if expected is None else missing
        return Check(None, True) if expected is found else Check(missing, False)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        given, wanted = tuple(found.shape), tuple(expected.shape)
        return Check(f"{given} {found.dtype}, expected {wanted} {expected.dtype}", False)
    if _same(expected, found, 0.0):
        return Check(None, True)
    noise = 0.0 if again is None else _distance(expected, again)
    scale = max(_size(expected), least)
    if _same(expected, found, 10 * noise + _RELATIVE.get(expected.dtype, 2e-2) * scale):
        return Check(None, False)
    distance = _distance(expected, found)
    return Check(f"differs by {distance:.3g} (the model from itself by {noise:.3g})", False)


def call_stages(trace: Trace, split: Split, *args: Any, **kwargs: Any) -> Any:
    """Run the composed stages, called as what was traced: a window returns its state, too."""
    values = dict(zip(split.model_inputs, flatten((args, kwargs))[0], strict=True))
    output = split.run(values)
    if not trace.ports:
        return output
    state = [values[p.name] for p in trace.ports if p.feeds != ANOTHER]
    return output, state  # messages are in the output already


class _RunError(Exception):
    """What was measured failed by itself; its cause is the error."""

    def __init__(self, in_backward: bool) -> None:
        super().__init__()
        self.in_backward = in_backward


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"


def guards_hold(trace: Trace, leaves: list[torch.Tensor], every_node: bool = False) -> bool:
    """Whether a trace made for other shapes is valid for these inputs: what the model looked at
    (sizes, strides, dtypes) is the same.

    Args:
        trace: the trace.
        leaves: tensor inputs in placeholder order.
        every_node: whether all nodes must take them, since more than the batch differs.

    Returns:
        False also where it cannot be told without running the model.
    """
    if not trace.guards_by_shape and not every_node:
        return True
    with fakes() as fake, restored(trace.model):
        return _holds_on(trace, leaves, fake, every_node)


def _holds_on(trace: Trace, leaves: list[torch.Tensor], fake: Fakes, every_node: bool) -> bool:
    expected = trace.guards_by_shape
    nodes = ancestors(expected)
    if every_node:  # but those that read values
        nodes = [n for n in trace.graph.nodes if n not in trace.guards_by_value]
    try:
        found = _on_fakes(trace, leaves, fake, nodes)
        return all(n not in expected or plain(value) == expected[n] for n, value in found)
    except Exception:
        return False


def _on_fakes(
    trace: Trace, leaves: list[torch.Tensor], fake: Fakes, nodes: Iterable[fx.Node]
) -> Iterator[tuple[fx.Node, Any]]:
    """Run nodes for the shapes of their values."""
    inputs = trace.placed(leaves)

    def own(value: Any) -> Any:  # what a node may write to
        is_buffer = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        return value.clone() if is_buffer else value

    with fake, torch.no_grad():
        attributes = {name: own(value) for name, value in trace.attributes.items()}
        given = lambda node: fake.from_tensor(inputs[node].detach())  # noqa: E731
        yield from interpret(nodes, attributes, given)


def values_hold(trace: Trace, leaves: list[torch.Tensor]) -> bool:
    """Whether the values of the inputs lead the model the same way as when it was traced."""
    expected = trace.guards_by_value
    if not expected:
        return True
    try:
        sizes = _sizes_at(trace, leaves)
        values = run_prefix(expected, trace.attributes, trace.placed(leaves), sizes)
    except Exception:
        return False
    return all(plain(values[node]) == value for node, value in expected.items())


def _sizes_at(trace: Trace, leaves: list[torch.Tensor]) -> dict[fx.Node, int]:
    """Sizes within the model that the guards need, found once for each shape of the inputs."""
    wanted, known = trace.guarded_sizes, trace.known_sizes
    if not wanted:
        return {}
    key = tuple(t.shape for t in leaves)
    if key not in known:
        with fakes() as fake, restored(trace.model):
            found = _on_fakes(trace, leaves, fake, ancestors(wanted))
            known[key] = {n: int(plain(value)) for n, value in found if n in wanted}
    return known[key]


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
