"""What trainers of a whole model save and go on from: dicts in memory, and folders of steps."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DecouplingError
from .evaluating import Means, Sums, evaluating
from .in_turn import Batch
from .loops import Unpack
from .measuring import Measures
from .model_files import write_model
from .saving import load_trained, trained_state
from .step_folders import StepFolders
from .touring import Tour


class Keeps(Measures):
    """The state of a trainer."""

    @property
    @abstractmethod
    def under_way(self) -> tuple[Batch, ...]:
        """Batches that something is still expected for, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """End what works beside the caller."""

    @abstractmethod
    def _finish(self) -> None:
        """Finish what is under way, without bringing anything into memory."""

    @abstractmethod
    def _in_memory(self, stage: int) -> contextlib.AbstractContextManager[None]:
        """A region in which a stage is in memory."""

    @abstractmethod
    def _begin_anew(self, steps: int) -> None:
        """Another state was loaded, after so many steps."""

    @property
    @abstractmethod
    def _sweep(self) -> int | None:
        """Batches of a visit while stages are out of memory; None where all are there."""

    def _evaluate(self, loader: Iterable[Any], means: Means, unpack: Unpack | None) -> list[Sums]:
        if self._sweep is None:
            return super()._evaluate(loader, means, unpack)
        self._finish()
        tour = Tour(self.decoupled, means, self._sweep, self._in_memory, self.finish_threads)
        with evaluating(self.decoupled.model, keep_buffers=False):
            try:
                for batch in loader:
                    tour.add(*(unpack or self._unpack)(batch))
                tour.flush()
            finally:
                tour.put_back()
        return [means.sums()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on bit for bit: model, sources, optimisers, random
        states, step.

        Raises:
            DecouplingError: batches are under way to a late source; their graphs cannot be saved.
        """
        self.finish_threads()
        self._check_idle()
        return trained_state(self.decoupled, self.optimizing, self.steps, self.accumulate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the plan must be the same. Batches under way are
        dropped.

        Args:
            state: what ``state_dict`` returned, for example by ``torch.load``.

        Raises:
            DecouplingError: the state belongs to other stages or sources; nothing is loaded then.
        """
        load_trained(state, self.decoupled, self.optimizing, self.close)
        self._begin_anew(state["steps"])

    def save(self, directory: str | os.PathLike[str], *, extra: Any = None, keep: int = 2) -> Path:
        """Write the same into a folder of its own, ``step-000000500``, stage by stage: those that
        are not in memory come there one after the other. It takes its name when it is whole.

        Args:
            directory: where the steps' folders are.
            extra: what ``resume`` gives back, pickled, such as a loader's state.
            keep: how many of them there may be; older ones are removed.

        Returns:
            The step's folder.

        Raises:
            DecouplingError: batches are under way to a late source; or it cannot be written, and
                older ones are as they were.
        """
        self._make_optimizers()
        self._finish()
        self._check_idle()
        unfinished = self.steps % self.accumulate != 0
        return self._folders.save(Path(directory), self.steps, extra, unfinished, keep)

    def save_model(self, path: str | os.PathLike[str]) -> Path:
        """Write the model alone as a plain checkpoint, one file that ``model.load_state_dict`` and
        ``from_pretrained`` take, stage by stage: no more is in memory than otherwise.

        Args:
            path: ``.safetensors`` for that format, anything else for ``torch.load``.

        Returns:
            The path.

        Raises:
            DecouplingError: it cannot be written; a file that was there is as it was.
        """
        self._make_optimizers()
        self._finish()
        return write_model(Path(path), self.decoupled, self._in_memory)

    def resume(self, directory: str | os.PathLike[str]) -> Any:
        """Go on from the newest step in a directory that is whole; others are left out with a
        warning. Batches under way are dropped.

        Args:
            directory: as for :meth:`save`; it may not exist yet.

        Returns:
            What ``save`` was given as ``extra``; None also where nothing is saved. ``steps`` says
            where the data goes on.

        Raises:
            DecouplingError: it belongs to another model or plan; nothing is loaded then.
        """
        self._make_optimizers()
        self.close()
        found = self._folders.load(Path(directory))
        if found is None:
            return None
        self._begin_anew(found["steps"])
        return found["extra"]

    @property
    def _folders(self) -> StepFolders:
        return StepFolders(self.decoupled, self.optimizing, self._in_memory)

    def _check_idle(self) -> None:
        if waiting := len(self.under_way):
            raise DecouplingError(
                f"{waiting} batches are still under way to late sources and cannot be saved: call "
                "trainer.drain() first, which finishes them"
            )
