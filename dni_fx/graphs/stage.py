"""One stage of a decoupled model, as users meet it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.fx import GraphModule

from ..errors import DecouplingError
from ..passes.cut.emission import StageFunctions, readable_code
from ..passes.cut.splitting import StageGraph
from ..sources import GradientSource, Prediction
from .graphs import Graphs


class Stage:
    """The nodes between two cuts, as a module and as an emitted training function.

    Attributes:
        index: position in program order.
        name: ``stage_0``, ``stage_1``, ...
    """

    def __init__(self, graphs: Graphs, index: int) -> None:
        self._graphs = graphs
        self.index = index
        self.name = f"stage_{index}"

    @property
    def module(self) -> GraphModule:
        """The subgraph: positional inputs as in ``inputs``, a tuple of values as in ``outputs``."""
        return self._graph.module

    @property
    def step(self) -> GraphModule:
        """The training function ``step(inputs, context=None, loss=None, target=None) ->
        StepResult``.

        ``inputs`` maps names to model inputs and to values that earlier stages sent; ``loss`` and
        ``target`` are for the last stage. Gradients accumulate in the parameters' ``.grad``.

        Raises:
            DecouplingError: a source of the stage waits for a message; its halves are what to call
                then.
        """
        self._graphs.served()  # raises where a source lacks one of its values
        waiting = [n for n, s in self.sources.items() if s.asks.wait]
        if waiting:
            raise DecouplingError(
                f"the source at {waiting[0]!r} waits for a message from later stages, so "
                f"{self.name} has no step in one piece: train with dni_fx.Trainer, or call "
                "stage.forward and stage.backward apart"
            )
        return self._functions.step

    @property
    def forward(self) -> GraphModule:
        """First half of ``step``: ``inputs -> (outputs, leaves, entries)``, keeping the autograd
        graph.
        """
        return self._functions.forward

    @property
    def backward(self) -> GraphModule:
        """Second half: ``(outputs, leaves, entries, gradients, partials, retain_graph) -> input
        gradients``.
        """
        return self._functions.backward

    @property
    def code(self) -> str:
        """Python source of ``step``; of both halves where a source waits for a message."""
        waits = any(s.asks.wait for s in self.sources.values())
        parts = [self.forward, self.backward] if waits else [self.step]
        return "\n".join(readable_code(part) for part in parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model inputs and of the earlier stages' values that the stage takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values that the stage sends; ``("output",)`` for the last one."""
        return self._graph.outputs

    @property
    def sources(self) -> dict[str, GradientSource]:
        """The gradient source of every interface that the stage sends."""
        every = self._graphs.sources_by_name()
        return {name: every[name] for name in self.outputs if name in every}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters under the model's names; those shared with other stages appear in
        each.
        """
        used = self._graphs.parameter_names(self.index)
        return ((n, p) for n, p in self._graphs.model.named_parameters() if n in used)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stage's parameters."""
        return (p for _, p in self.named_parameters())

    def fit(
        self,
        predictions: Mapping[str, Prediction],
        targets: Mapping[str, torch.Tensor],
        **messages: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Train the stage's sources on what came back; gradients accumulate in the sources'
        parameters.

        Args:
            predictions: ``StepResult.predictions`` of this stage's step.
            targets: per interface the sum of its consumers' input gradients.
            **messages: ``loss=``, ``logits=`` or ``error=`` for sources that ask for these; see
                :class:`~dni_fx.sources.Asks`.

        Returns:
            The loss of every source that learned, detached.

        Raises:
            DecouplingError: a source asks for a message that is not given.
        """
        losses: dict[str, torch.Tensor] = {}
        for group in (g for g in self._graphs.served() if g.name in predictions):
            kinds = group.source.asks.learns_from
            missing = [k for k in kinds if k != "gradient" and k not in messages]
            if missing:
                raise DecouplingError(
                    f"the source at {group.name!r} asks for its message: pass {missing[0]}= to fit"
                )
            if "gradient" in kinds and not all(n in targets for n in group.names):
                continue
            arrived = {k: [messages[k]] for k in kinds if k != "gradient"}
            arrived["gradient"] = [targets[n] for n in group.names if n in targets]
            message = tuple(part for kind in kinds for part in arrived[kind])
            with torch.enable_grad():
                loss = group.fit(predictions[group.name], message)
            if loss is not None:
                losses[group.name] = loss
        if losses:
            torch.autograd.backward(list(losses.values()))
        return {name: loss.detach() for name, loss in losses.items()}

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}>"

    @property
    def _graph(self) -> StageGraph:
        return self._graphs.current().split.stages[self.index]

    @property
    def _functions(self) -> StageFunctions:
        self._graphs.current()
        return self._graphs.functions()[self.index]
