"""Loops over loaders: training, and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import unpack_batch
from ..reports.steps import StepReport
from .evaluating import Means, Metric, Sums, evaluating
from .objective import Loss

Unpack = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Any]]


class Loops(ABC):
    """What can be done with a loader, by a trainer that makes steps.

    Attributes:
        decoupled: the model.
        steps: number of steps made.
    """

    decoupled: Decoupled
    steps: int

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """The user's loss."""

    @abstractmethod
    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> StepReport:
        """Train on one batch: the model's own call, plus the target."""

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        progress: bool = True,
        unpack: Unpack | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> StepReport | None:
        """Train over a loader with a progress bar.

        Args:
            loader: gives batches ``(input, ..., target)``, or mappings with ``"target"`` or
                ``"labels"`` beside the model's keyword inputs.
            epochs: how often to go through it.
            progress: whether to show a bar.
            unpack: turns a batch of another form into ``(args, kwargs, target)``.
            on_step: called with each report, for learning-rate schedulers and logs.

        Returns:
            The last report; None if the loader was empty.
        """
        report = None
        for epoch in range(epochs):
            with tqdm(
                loader, f"epoch {epoch + 1}/{epochs}", disable=not progress, leave=False
            ) as bar:
                for batch in bar:
                    args, kwargs, target = (unpack or self._unpack)(batch)
                    report = self.step(*args, target=target, **kwargs)
                    if progress and self.steps % 10 == 0:
                        bar.set_postfix(loss=f"{report.loss.item():.4f}")
                    if on_step is not None:
                        on_step(report)
        self._settle()
        return report

    def _settle(self) -> None:
        """Look at what no step has looked at yet; here every step looks at itself."""
        return

    _unpack = staticmethod(unpack_batch)

    def evaluate(
        self,
        loader: Iterable[Any],
        metric: Metric | Mapping[str, Metric] | None = None,
        *,
        unpack: Unpack | None = None,
    ) -> Any:
        """The mean of a metric over a loader, by the model in evaluation mode.

        Training goes on as if nothing had happened: modes, buffers, gradients and random states are
        as before, those that the loader draws from included. Batches that are under way on threads
        are finished first, and stages that are out of memory are visited one after the other. On
        several processes it is called in all of them with the same batches, and all get the same
        numbers. Through time the state is carried from window to window, from a new sequence on;
        what the trainer carries stays.

        Args:
            loader: as for :meth:`fit`.
            metric: ``metric(output, target)``, a tensor of one number (or truth value) for each
                sample, or one number, which counts as often as the output's first tensor is long
                (through time: as a window has samples and steps); or several by name. By default
                the loss.
            unpack: as for :meth:`fit`.

        Returns:
            The mean over all samples, a float; of several metrics a dict of them.

        Raises:
            DecouplingError: a loader without batches, or a metric that returns no number.
        """
        if isinstance(loader, torch.Tensor):
            raise DecouplingError(
                "evaluate takes a loader of batches, (input, ..., target) each, not a tensor: the "
                "output for one is decoupled(x), on several processes trainer.forward(x)"
            )
        self._settle()
        means = Means(metric, self.loss)
        return means.result(self._evaluate(loader, means, unpack))

    def _evaluate(self, loader: Iterable[Any], means: Means, unpack: Unpack | None) -> list[Sums]:
        """What was found, by each who looked."""
        self._run_over(loader, self._judge(means), unpack)
        return [means.sums()]

    def _judge(self, means: Means) -> Callable[..., None]:
        """What evaluates a batch, given as ``(args, kwargs, target)``."""
        model = self.decoupled.model
        return lambda args, kwargs, target: means.add(model(*args, **kwargs), target)

    def _run_over(
        self, loader: Iterable[Any], run: Callable[..., None], unpack: Unpack | None
    ) -> None:
        """Give every batch, as ``(args, kwargs, target)``, to what evaluates it."""
        with evaluating(self.decoupled.model):
            for batch in loader:
                run(*(unpack or self._unpack)(batch))
