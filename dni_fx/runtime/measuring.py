"""Predictions against true gradients, for trainers that hold the whole model."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnostics import Diagnosis
from ..graphs.nested import map_tensors
from ..passes.trace.state import restored
from ..reports.steps import compare
from ..schedules import Mode
from .answers import or_zeros
from .base import BaseTrainer
from .batch_state import Setting
from .emitted import keep_modes
from .evaluating import Means, Sums
from .in_turn import Batch
from .loops import Unpack
from .objective import Objective

Gradients = dict[nn.Parameter, Tensor | None]


class Measures(BaseTrainer):
    """What a trainer can tell that holds the whole model: nothing of it is changed."""

    @abstractmethod
    def finish_threads(self) -> None:
        """Wait until no thread works on the model, and no check is left."""

    def _evaluate(self, loader: Iterable[Any], means: Means, unpack: Unpack | None) -> list[Sums]:
        self.finish_threads()
        return super()._evaluate(loader, means, unpack)

    def true_gradients(self, *args: Any, target: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Backpropagation's gradient at every interface, with nothing changed.

        Args:
            *args: positional inputs of the model.
            target: what the loss takes.
            **kwargs: keyword inputs.

        Returns:
            The gradient of the loss for each interface's value, by name; zeros where none arrives.
        """
        return _arrived(self._rehearse(Mode(1.0), args, kwargs, target, ask=False)[0])

    def diagnose(self, *args: Any, target: Any = None, **kwargs: Any) -> Diagnosis:
        """Compare what the sources predict with the true gradient, with nothing changed.

        Costs a step of backpropagation and a prediction of every source.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs.

        Returns:
            A report for every interface whose source predicts, with a verdict in words; prints as a
            table.
        """
        batch, _ = self._rehearse(Mode(1.0), args, kwargs, target, ask=True)
        predicted: dict[str, Tensor | None] = {}
        own: set[str] = set()
        for group in batch.setting.served:
            guess = batch.state.predictions[group.name].guessed
            predicted.update(zip(group.names, guess or (), strict=guess is not None))
            own |= {*group.names} if group.source.has_own_loss else set()
        return Diagnosis.measure(predicted, _arrived(batch), step=self.steps, own=own)

    def diagnose_parameters(self, *args: Any, target: Any = None, **kwargs: Any) -> Diagnosis:
        """Compare what the predictions make of the parameters' gradients with the true ones, with
        nothing changed.

        That is nearer to what training does than ``diagnose``. The gradient of a weight is a sum
        over samples and positions in which much of the values' gradients cancels, but errors that
        samples have in common do not: a prediction with a high cosine at the cut may still train
        the stage before it badly. Both depend on the batch; compare means over several, or take a
        large one. Costs a step of backpropagation and a decoupled one.

        Args:
            *args: positional inputs of the model.
            target: what the loss and the context take.
            **kwargs: keyword inputs.

        Returns:
            A report by stage name, over all parameters that only this stage uses, for the stages
            all of whose sources predict at once; prints as a table.
        """
        _, true = self._rehearse(Mode(1.0), args, kwargs, target, ask=False)
        if self.decoupled.is_exact:  # nobody predicts
            return Diagnosis({}, of="stage")
        batch, predicted = self._rehearse(Mode(0.0), args, kwargs, target, ask=True)
        users = Counter(p for stage in self.decoupled.stages for p in set(stage.parameters()))
        found = {}
        for stage, run in zip(self.decoupled.stages, batch.stages, strict=True):
            own = [p for p in stage.parameters() if p.requires_grad and users[p] == 1]
            if own and run.sources.groups and not run.sources.waiting:
                guess, real = _joined(predicted, own), _joined(true, own)
                found[stage.name] = compare(guess, real, "true", self.steps)
        return Diagnosis(found, of="stage")

    def _rehearse(
        self, mode: Mode, args: Any, kwargs: Any, target: Any, ask: bool
    ) -> tuple[Batch, Gradients]:
        """Run a batch up to its gradients, also of the parameters, and put everything back."""
        self.finish_threads()
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        decoupled = self.decoupled
        values = self._bind_call(*args, **kwargs)
        parameters = list(decoupled.parameters())
        with restored(decoupled), keep_modes(), torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
            served = None if ask else ()
            batch = Batch(Setting.of(decoupled.graphs, Objective(self.loss), mode, served))
            context = self.objective.context(target) if ask else None
            batch.begin(values, context, target)
            batch.advance(0)
            return batch, {p: p.grad for p in parameters}


def _arrived(batch: Batch) -> dict[str, Tensor]:
    """By interface, zeros where nothing arrives."""
    arrived = batch.state.progress.gradients
    return {n: or_zeros(arrived.get(n), v).detach() for n, v in batch.state.sent.items()}


def _joined(gradients: Gradients, parameters: list[nn.Parameter]) -> Tensor:
    """The gradients of some parameters in one flat piece, zeros where there is none."""
    return torch.cat([or_zeros(gradients[p], p.detach()).to_dense().flatten() for p in parameters])
