"""What the emitted training functions call: results, losses and the pull-back of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DecouplingError
from ..graphs.nested import map_tensors
from ..passes.trace.settings import casts
from ..sources.base import Prediction
from .casts import Carried


@dataclass
class StepResult:
    """What one stage's training function returns.

    Attributes:
        outputs: values that later stages use, detached, by name; the model's output under
            ``"output"``.
        input_gradients: for every interface that the stage uses, its gradient, or None where no
            gradient arrived. These are the targets of the upstream sources.
        predictions: what the stage's sources predicted, by the name of the first interface that
            each serves; they keep the sources' graph for ``fit``.
        loss: the loss as a detached scalar, in the stage that holds the model's output.
    """

    outputs: dict[str, Any]
    input_gradients: dict[str, torch.Tensor | None]
    predictions: dict[str, Prediction]
    loss: torch.Tensor | None = None


class Leaf:
    """A received value as the start of a stage's own autograd graph.

    Args:
        value: what was received.
        keep_layout: give back the gradient in the layout in which it came, as exact mode needs:
            ``.grad`` takes that of its tensor, and in another layout later sums run in another
            order.

    Attributes:
        tensor: the value, detached, with a gradient of its own.
    """

    def __init__(self, value: torch.Tensor, keep_layout: bool = False) -> None:
        self.tensor = value.detach().requires_grad_()
        self._raw: list[torch.Tensor] = []
        if keep_layout:
            strides, raw = self.tensor.stride(), self._raw

            def keep(gradient: torch.Tensor) -> None:
                if gradient.stride() != strides:
                    raw[:] = [gradient]

            self.tensor.register_hook(keep)

    def view(self) -> torch.Tensor:
        """The value to compute with: a node of the graph, so that it can be a root of the
        pull-back.
        """
        return self.tensor.view_as(self.tensor)

    def gradient(self) -> torch.Tensor | None:
        """What flowed back to the value, or None."""
        return self._raw[0] if self._raw else self.tensor.grad

    def clear(self) -> None:
        """Forget what flowed back, before another pull-back."""
        self._raw.clear()
        self.tensor.grad = None


def pull_back(
    roots: Sequence[Any],
    gradients: Sequence[torch.Tensor | Carried | None],
    retain_graph: bool = False,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """Accumulate into ``.grad`` what flows back from some values, given their gradients.

    Args:
        roots: tensors with an autograd graph; others are passed over.
        gradients: a gradient for each root, with those of its copies; None where nothing arrived.
        retain_graph: keep the graph for another call.
        inputs: the tensors whose ``.grad`` to accumulate; all leaves by default.
    """
    used: list[Any] = []
    given: list[torch.Tensor] = []
    for root, arrived in zip(roots, gradients, strict=True):
        gradient = arrived.own if isinstance(arrived, Carried) else arrived
        if isinstance(arrived, Carried):
            edges, of_copies = arrived.roots()
            used += edges
            given += of_copies
        if gradient is None or not isinstance(root, torch.Tensor) or not root.requires_grad:
            continue
        if gradient.shape != root.shape:
            raise DecouplingError(
                f"a source predicted a gradient of shape {tuple(gradient.shape)} for a value of "
                f"shape {tuple(root.shape)}; predict must return one gradient of the value's own "
                "shape per value"
            )
        used.append(root)
        given.append(gradient)
    if used:
        try:
            torch.autograd.backward(used, given, retain_graph=retain_graph, inputs=inputs)
        except RuntimeError as error:
            raise (used_up(error) or error) from error


def used_up(error: RuntimeError) -> DecouplingError | None:
    """The error to raise instead, where a stage's backward came to a graph that another backward
    had used up; None where the cause is another one.
    """
    if "through the graph a second time" not in str(error):
        return None
    return DecouplingError(
        "a stage's backward came to a graph that another backward has used up: another stage's, "
        "an earlier step's or one of your own. Each stage pulls back by itself, so what several of "
        "them, or the loss, use must be made within the model's forward and returned by it: detach "
        "tensors that are computed before the call or kept elsewhere (on a module, by a hook, in a "
        "list), and leave out torch.nn.utils.parametrize.cached()"
    )


def evaluate(
    loss: Callable[[Any, Any], torch.Tensor] | None, output: Any, target: Any
) -> torch.Tensor:
    """Call the loss and check that it gave a scalar.

    Raises:
        DecouplingError: no loss, or its value is not a tensor with one element.
    """
    if loss is None:
        raise DecouplingError(
            "the last stage holds the model's output and needs loss=, a callable (output, target)"
        )
    try:
        value = loss(output, target)
    except Exception as error:
        if target is None and not isinstance(error, DecouplingError):
            raise DecouplingError(
                f"the loss failed without a target ({error}); pass target= to step"
            ) from error
        raise
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = type(value).__name__
        if isinstance(value, torch.Tensor):
            found = f"a tensor of shape {tuple(value.shape)}"
        raise DecouplingError(
            f"the loss must return a tensor with one element, but returned {found}; average it "
            "first"
        )
    if not value.requires_grad and not torch.is_grad_enabled():
        raise DecouplingError(
            "gradients are switched off here, by torch.no_grad() or torch.inference_mode(): train "
            "outside of them"
        )
    if not value.requires_grad:
        raise DecouplingError(
            "the loss has no autograd graph: it must be computed from the model's output, not "
            "detached"
        )
    return value


def detached(value: Any) -> Any:
    """A nested value with every tensor detached."""
    if isinstance(value, torch.Tensor):  # as nearly always
        return value.detach()
    return map_tensors(torch.Tensor.detach, value)


@contextlib.contextmanager
def keep_modes() -> Iterator[None]:
    """Leave gradient mode and autocast as they were if a stage fails within a region of its own."""
    gradients, cache = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    before = casts()
    depth = _autocast_depth()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(gradients)
        torch.set_autocast_cache_enabled(cache)
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        for device, dtype, enabled in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        raise


def _autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth
