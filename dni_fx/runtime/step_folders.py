"""A trainer's state as folders, one for each saved step, written and read stage by stage.

A folder takes its name once it is whole; what it should hold is written in it with checksums
(CRC-32), and read again before anything is loaded, so that a folder that is damaged is left out and
the one before it is taken.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..passes.trace.state import rng_state, set_rng_state
from ..reports import files
from .optimizing import StageOptimizers, find_misfit

_RUN, _PIECE = "run.pt", 1 << 24
Visit = Callable[[int], contextlib.AbstractContextManager[None]]


class StepFolders:
    """Writes and reads saved steps.

    Args:
        decoupled, optimizers: what is saved.
        visit: a region in which a stage is in memory.
    """

    def __init__(self, decoupled: Decoupled, optimizers: StageOptimizers, visit: Visit) -> None:
        self.decoupled, self.optimizers, self.visit = decoupled, optimizers, visit

    def save(self, folder: Path, steps: int, extra: Any, unfinished: bool, keep: int) -> Path:
        """Write a step, and remove all older ones but as many as are kept.

        Args:
            folder: where the steps' folders are.
            steps, extra: number of steps made, and the user's own.
            unfinished: whether gradients belong to an update that is still to come.
            keep: how many saved steps there may be.

        Raises:
            DecouplingError: it cannot be written; older ones are as they were.
        """
        if type(keep) is not int or keep < 1:
            raise DecouplingError(f"keep= is a number of saved steps, at least 1, not {keep!r}")
        final = files.step_folder(folder, steps)
        begun = files.writing(final)
        try:
            for left in folder.glob(files.WRITING):  # by a run that was ended
                shutil.rmtree(left)
            begun.mkdir(parents=True)
            sums = self._write_stages(begun, unfinished)
            torch.save(self._about(steps) | {"extra": extra, "sums": sums}, begun / _RUN)
            files.publish(final)
        except Exception as error:  # whatever of the user's cannot be pickled, too
            raise DecouplingError(
                f"{final} was not saved: {type(error).__name__}: {error}; see that there are room "
                "and rights, and that extra= can be pickled, and save again"
            ) from error
        finally:
            shutil.rmtree(begun, ignore_errors=True)
        files.prune(final, keep)
        return final

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Take up the newest step that is whole, if there is one.

        Returns:
            What was saved besides stages, with ``steps`` and ``extra``.

        Raises:
            DecouplingError: it belongs to another model or plan; nothing is loaded then.
        """
        for _, path in reversed(files.saved_steps(folder)):
            try:
                run: dict[str, Any] = torch.load(path / _RUN, weights_only=False)
                damaged = [n for n, total in run["sums"].items() if _sum(path / n) != total]
            except Exception as error:  # whatever a damaged file brings torch to
                run, damaged = {}, [f"{_RUN} ({type(error).__name__})"]
            if damaged:
                warnings.warn(
                    f"{path} is not whole and is left out: {damaged[0]} is damaged or missing",
                    stacklevel=3,
                )
                continue
            self._check(run, path)
            self._read_stages(path)
            set_rng_state(run["rng"])
            return run
        return None

    def _write_stages(self, begun: Path, unfinished: bool) -> dict[str, int]:
        sums = {}
        for index in range(len(self.decoupled.stages)):
            with self.visit(index):
                path = begun / _name(index)
                torch.save(self._state(index, unfinished), path)
                sums[path.name] = _sum(path)
        return sums

    def _read_stages(self, path: Path) -> None:
        for index in range(len(self.decoupled.stages)):
            with self.visit(index):
                self._take_up(index, torch.load(path / _name(index), weights_only=False))

    def _about(self, steps: int) -> dict[str, Any]:
        """What is checked before anything is loaded, and what belongs to no stage."""
        groups = {
            kind: {n: {"param_groups": _groups(o)} for n, o in every.items()}
            for kind, every in self._by_kind().items()
        }
        return {
            "plan": self.decoupled.plan.to_json(),
            "shapes": self._shapes(),
            "steps": steps,
            "rng": rng_state(),
            **groups,
        }

    def _by_kind(self) -> dict[str, dict[str, torch.optim.Optimizer]]:
        stages, sources = self.optimizers.stages, self.optimizers.sources
        return {"optimizers": stages, "synthesizer_optimizers": sources}

    def _shapes(self) -> dict[str, Tensor]:
        """Names and shapes of all that is saved, as tensors without data."""
        named = (*self.decoupled.named_parameters(), *self.decoupled.named_buffers())
        return {n: torch.empty(t.shape, device="meta") for n, t in named}

    def _check(self, run: dict[str, Any], path: Path) -> None:
        if run["plan"] != self.decoupled.plan.to_json():
            raise DecouplingError(
                f"{path} was saved with another plan: build the same model and cut it the same way "
                "(a plan is written by plan.to_json() and passed as cuts=)"
            )
        if misfit := find_misfit(self._shapes(), run["shapes"]):
            raise DecouplingError(
                f"{path} does not fit: {misfit}; decouple with the plan and sources that it was "
                "saved with"
            )
        stages = self.decoupled.stages
        if self.optimizers.check_state(run, stages):
            self.optimizers.adopt(stages)

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """Of the model, what a stage is the first to use; with the last one, what none uses."""
        every: list[tuple[str, Tensor]] = [*self.decoupled.named_parameters()]
        every += self.decoupled.named_buffers()
        stages = self.decoupled.stages
        users: dict[int, int] = {}
        for stage in stages:
            for tensor in (*stage.parameters(), *stage.module.buffers()):
                users.setdefault(id(tensor), stage.index)
            for source in stage.sources.values():
                for tensor in (*source.parameters(), *source.buffers()):
                    users.setdefault(id(tensor), stage.index)
        last = len(stages) - 1
        return {n: t for n, t in every if users.get(id(t), last) == index}

    def _optimizers(self, index: int) -> dict[str, torch.optim.Optimizer]:
        name = self.decoupled.stages[index].name
        own = {name: self.optimizers.stages.get(name)}
        own |= {n: self.optimizers.sources.get(n) for n, _ in self._learners(index)}
        return {n: o for n, o in own.items() if o is not None}

    def _learners(self, index: int) -> list[tuple[str, torch.nn.Module]]:
        return self.decoupled.named_learners([index])

    def _state(self, index: int, unfinished: bool) -> dict[str, Any]:
        tensors = self._tensors(index)
        grads = {n: t.grad for n, t in tensors.items() if unfinished and t.grad is not None}
        return {
            "tensors": {n: t.detach() for n, t in tensors.items()},
            "gradients": grads,
            "optimizers": {n: o.state_dict() for n, o in self._optimizers(index).items()},
        }

    @torch.no_grad()
    def _take_up(self, index: int, state: dict[str, Any]) -> None:
        for name, tensor in self._tensors(index).items():
            tensor.copy_(state["tensors"][name])
            tensor.grad = state["gradients"].get(name)
        for name, optimizer in self._optimizers(index).items():
            optimizer.load_state_dict(state["optimizers"][name])


def _name(index: int) -> str:
    return f"stage_{index}.pt"


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Its groups, each with as many parameters, but without them."""
    return [{"params": [*range(len(g["params"]))]} for g in optimizer.param_groups]


def _sum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total = zlib.crc32(piece, total)
    return total
