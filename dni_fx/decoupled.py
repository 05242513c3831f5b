"""A decoupled model: the user's model, its stages, and the sources of their gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .graphs.graphs import Graphs
from .graphs.stage import Stage as Stage
from .plan import CutPlan, Interface
from .program.folder import write_folder
from .program.options import TrainingOptions
from .runtime.emitted import keep_modes
from .runtime.module import DropIn, DropInState
from .sources import GradientSource, InputSource


class Decoupled(nn.Module):
    """A model cut into stages; made by :func:`dni_fx.decouple`.

    Calling it runs the stages one after the other with ordinary autograd: outputs and gradients
    equal the model's. Decoupled training is :class:`dni_fx.Trainer` or ``stage.step``.

    Attributes:
        model: the user's module, trained in place.
        synthesizers: the gradient sources by interface name (dots as slashes), synthetic inputs as
            ``name@input``.
        context: turns a training target into what the sources see, or None.
        graphs: what was traced, for each kind of call.
    """

    def __init__(self, graphs: Graphs) -> None:
        super().__init__()
        self.model = graphs.model
        self.synthesizers = graphs.synthesizers
        self.context = graphs.recipe.context
        self.graphs = graphs
        self.training = graphs.model.training

    @property
    def is_traced(self) -> bool:
        """Whether stages exist; without example inputs they are made at the first call."""
        return self.graphs.is_traced

    @property
    def plan(self) -> CutPlan:
        """The cuts, stages and interfaces."""
        return self.graphs.plan

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in program order."""
        return tuple(Stage(self.graphs, k) for k in range(len(self.plan.stages)))

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """The values that carry a gradient across cuts."""
        return self.graphs.interfaces

    @property
    def sources(self) -> dict[str, GradientSource]:
        """Gradient sources by interface name; one that serves a whole boundary stands at each of
        its interfaces.
        """
        return self.graphs.sources

    @property
    def inputs(self) -> dict[str, InputSource]:
        """Synthetic inputs by interface name; empty without a forward unlock."""
        return self.graphs.inputs

    def named_learners(self, stages: Collection[int] | None = None) -> list[tuple[str, nn.Module]]:
        """Gradient sources, once each, by the first interface that they serve; synthetic inputs as
        ``name@input``.

        Args:
            stages: only the sources that these stages ask, and the synthetic inputs that they use;
                None: all.
        """
        return self.graphs.named_learners(stages)

    @property
    def is_exact(self) -> bool:
        """Whether the stages are trained with the true gradients."""
        return self.graphs.is_exact

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the composed stages, called as the model is; outputs and gradients equal its own."""
        values = self.bind(*args, **kwargs)
        with keep_modes():
            return self.graphs.variant.split.run(values)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Model inputs by name, as ``stage.step`` takes them; makes or finds the stages that fit
        the call.

        Raises:
            PlanMismatchError: an empty batch, or stages for this kind of call cannot be cut by the
                plan.
        """
        return self.graphs.bind(*args, **kwargs)

    def has_graph_for(self, *args: Any, **kwargs: Any) -> bool:
        """Whether stages for this kind of call exist, so that ``bind`` need not trace."""
        return self.graphs.has_graph_for(*args, **kwargs)

    def as_module(
        self,
        synthesizer_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        context: Callable[..., Any] | None = None,
        unit: float | Callable[[], float] = 1.0,
    ) -> DropIn:
        """The model as a module that trains decoupled in an ordinary loop.

        ``loss = criterion(m(x), y); loss.backward(); optimizer.step()``. It is of a subclass of the
        model's class, with its signature, its parameters (by reference) and its ``state_dict``. In
        evaluation mode and under ``no_grad`` it is the model. The stages' activations are freed one
        stage after the other; the sources learn in ``backward``, for which those that learn from
        gradients are asked again. A call's gradients are handed over once: losses are added up
        before ``backward``. What is not finite teaches no source.

        The unit rule: where the loss is not the mean loss itself but a multiple of it, as with a
        GradScaler (``unit=scaler.get_scale``) or accumulation over n batches (``unit=1 / n``),
        ``unit`` says which. What the sources predict is multiplied by it and what they learn from
        divided, so that all stages' gradients have one scale. A source that learns from arriving
        gradients would find a constant factor by itself, others could not.

        Args:
            synthesizer_optimizer: makes an optimiser from a source's ``(name, parameter)`` pairs;
                it steps in ``backward``.
            context: takes the call's arguments and returns the training target that the sources may
                see, such as ``lambda *, labels, **_: labels``; or use ``with m.context(y):``, which
                goes before it.
            unit: the factor in front of the mean loss, or a function that returns it.

        Returns:
            The module.

        Raises:
            DecouplingError: a source that waits, or learns from more than the sum of its gradients;
                synthetic inputs.
        """
        return DropInState(self.graphs, self.context, synthesizer_optimizer, context, unit).module

    def to_folder(
        self,
        path: str | Path,
        *,
        loss: Callable[[Any, Any], torch.Tensor] = torch.nn.functional.cross_entropy,
        optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam,
        synthesizer_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ) -> Path:
        """Write the program as Python files that import torch alone: the stages as modules, their
        sources, their training functions, the weights, a loop to edit, and a README of the plan.

        ``python FOLDER/train.py`` does what :class:`dni_fx.Trainer` does, bit for bit, for the mode
        that the model is in. What the files cannot hold is refused by name: modules that stay one
        node and are none of ``torch.nn``, sources that wait or are not the library's own. Functions
        of the user's own modules are imported from there.

        Args:
            path: of the folder, which is made; it must not be there, or be empty.
            loss, optimizer, synthesizer_optimizer, clip_norm, accumulate: what ``train.py`` trains
                with, as for :class:`dni_fx.Trainer`, whose own ``to_folder`` knows them already.

        Returns:
            The path.

        Raises:
            DecouplingError: the folder holds something, the model is not traced yet, or a part of
                the program cannot be written.
        """
        told = TrainingOptions(loss, optimizer, synthesizer_optimizer, clip_norm, accumulate)
        return write_folder(self.graphs, told, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoupled:
        """A copy of model and sources under the same plan, traced anew at its first call."""
        other = Decoupled(copy.deepcopy(self.graphs, memo))
        other.context = copy.deepcopy(self.context, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a Decoupled object is not pickled: save its state_dict() and plan.to_json(), and "
            "decouple again"
        )
