"""Checkpoints of a distributed run: written by all processes at once, complete or not there at all.

``torch.distributed.checkpoint`` writes; what is under way is finished first, so that a checkpoint
holds no graphs. Each stage's state stands for itself, under names that do not tell the rank, so
that a run can go on with its stages on other ranks.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import rng_state, set_rng_state
from .process import Process
from .sharing import owned_tensors

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})")


class Checkpoints:
    """Writes and reads checkpoints: plain dicts, of which each process has its part.

    All methods but :meth:`wait` are called in every process, while nothing is under way.

    Args:
        process: whose stages are saved and loaded.
    """

    def __init__(self, process: Process) -> None:
        self.process, self.peers = process, process.peers
        self.writing: Future[Any] | None = None
        self.group: Any = None  # of its own: an asynchronous save talks while the run does

    def save(self, folder: Path, steps: int, extra: Any, asynchronous: bool, keep: int) -> Path:
        """Write a checkpoint, as :meth:`dni_fx.distributed.Trainer.save` says.

        Raises:
            DecouplingError: ``keep`` is no number of checkpoints.
        """
        if type(keep) is not int or keep < 1:
            raise DecouplingError(f"keep must be a number of checkpoints, at least 1, not {keep!r}")
        self.wait()
        state = _collect(self.process, steps, extra)
        final = folder / f"step-{steps:09d}"
        temporary = folder / f".{final.name}.writing"
        if self.peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was ended while it wrote
            temporary.mkdir(parents=True)
        if asynchronous:
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        self.peers.barrier()
        first = self.peers.rank == 0  # the future must not hold the process

        def complete(future: Any = None) -> None:
            if first and (future is None or future.exception() is None):
                if final.exists():
                    shutil.rmtree(final)
                temporary.replace(final)
                for old in _complete(folder)[:-keep]:
                    shutil.rmtree(old, ignore_errors=True)

        planner = DefaultSavePlanner(flatten_state_dict=False)
        if self.peers.parallel and asynchronous:
            self.group = self.group or dist.new_group(backend="gloo")
            writing = async_save(
                state, checkpoint_id=temporary, planner=planner, process_group=self.group
            )
            assert isinstance(writing, Future)
            writing.add_done_callback(complete)
            self.writing = writing
            return final
        with _quiet():
            save(state, checkpoint_id=temporary, planner=planner, **self._where())
        complete()
        self.peers.barrier()  # nobody goes on before it is there
        return final

    def wait(self) -> None:
        """Wait for an asynchronous save."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def load(self, folder: Path) -> tuple[int, Any] | None:
        """Take up the newest complete checkpoint that rank 0 sees, if there is one.

        Returns:
            Number of steps made, and the user's own.

        Raises:
            DecouplingError: the state belongs to another model or plan; nothing is loaded then.
        """
        self.wait()
        path: Path | None = self.peers.gather(next(reversed(_complete(folder)), None))[0]
        if path is None:
            return None
        described = FileSystemReader(path).read_metadata().state_dict_metadata
        state: dict[str, Any] = {}
        for name in _wanted(self.process, set(described)):
            about = described[name]
            state[name] = None
            if isinstance(about, TensorStorageMetadata):
                state[name] = torch.empty(about.size, dtype=about.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _quiet():
            load(state, checkpoint_id=path, planner=planner, **self._where())
        _check(self.process, state, path)
        return _apply(self.process, state)

    def _where(self) -> dict[str, Any]:
        """Who takes part, as torch's functions are told."""
        return {"process_group": self.peers.group} if self.peers.parallel else {"no_dist": True}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that there is one process, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)
        yield


def _complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))}
    return [found[step] for step in sorted(found) if (found[step] / ".metadata").exists()]


def _collect(process: Process, steps: int, extra: Any) -> dict[str, Any]:
    """Everything that a process saves, by name: tensors, and objects that are pickled."""
    state: dict[str, Any] = {n: t.detach() for n, t in _model_tensors(process).items()}
    generators = rng_state()
    for index, worker in process.workers.items():
        leaves, structure = flatten(_stage_state(process, index, steps))
        state |= {f"stage_{index}/{i}": leaf.detach() for i, leaf in enumerate(leaves)}
        state[f"stage_{index}"] = structure
        state[_at("random", process, index)] = worker.learner.random
        state[_at("devices", process, index)] = generators["devices"]
    if process.peers.rank == 0:
        plan = process.decoupled.plan.to_json()
        state["run"] = {"format": FORMAT, "plan": plan, "steps": steps, "extra": extra} | generators
    return state


def _wanted(process: Process, saved: set[str]) -> list[str]:
    """Which of the saved names a process takes up."""
    prefixes = tuple(f"stage_{k}/" for k in process.workers)
    names = {"run", *_model_tensors(process), *(f"stage_{k}" for k in process.workers)}
    names |= {_at(kind, process, k) for k in process.workers for kind in ("random", "devices")}
    return sorted(n for n in saved if n in names or n.startswith(prefixes))


def _check(process: Process, state: dict[str, Any], path: Path) -> None:
    """The state is of this plan and this model."""
    if state["run"]["plan"] != process.decoupled.plan.to_json():
        raise DecouplingError(
            f"{path} was saved with another plan: build the same model and cut it the same way "
            "(a plan is written by plan.to_json() and passed as cuts=)"
        )
    mine = _model_tensors(process)
    missing = [n for n in (*mine, *(f"stage_{k}" for k in process.workers)) if n not in state]
    if missing:
        raise DecouplingError(
            f"{path} lacks {missing[0]!r}, which this model has: it belongs to another one"
        )
    wrong = [n for n, t in mine.items() if state[n].shape != t.shape]
    if wrong:
        raise DecouplingError(
            f"{path} does not fit: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)} in it"
        )


def _apply(process: Process, state: dict[str, Any]) -> tuple[int, Any]:
    """Take up what :func:`_collect` returned, as far as it is wanted."""
    with torch.no_grad():
        for name, tensor in _model_tensors(process).items():
            tensor.copy_(state[name])
    for index, worker in process.workers.items():
        count = sum(name.startswith(f"stage_{index}/") for name in state)
        leaves = (state[f"stage_{index}/{i}"] for i in range(count))
        _load_stage_state(process, index, state[f"stage_{index}"].build(leaves))
        if (own := worker.learner.random) is not None:
            worker.learner.random = state.get(_at("random", process, index), own)
    run, first = state["run"], next(iter(process.workers))
    # All stages of a process draw from the same devices; the other generators are the same in all
    # processes.
    set_rng_state(run | {"devices": state.get(_at("devices", process, first), {})})
    return run["steps"], run["extra"]


def _model_tensors(process: Process) -> dict[str, Tensor]:
    """Parameters and buffers of the stages here, by their names in a checkpoint."""
    model = process.decoupled.model
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    owned = owned_tensors(process.decoupled)
    return {f"model/{names[id(t)]}": t for k, t in owned if k in process.workers}


def _at(kind: str, process: Process, index: int) -> str:
    """The name of what a stage has on this one of the ranks that run it."""
    return f"{kind}/{index}/{process.places.ranks[index].index(process.peers.rank)}"


def _stage_state(process: Process, index: int, steps: int) -> dict[str, Any]:
    """Optimiser, sources and unfinished gradients of a stage that is here."""
    name, learners = f"stage_{index}", _learners_of(process.decoupled, index)
    optimizer, others = process.optimizers.stages.get(name), process.optimizers.sources
    owned = process.optimizers.parameters.get(name, [])
    gradients = {n: p.grad for n, p in owned if p.grad is not None}
    return {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "sources": {n: s.state_dict() for n, s in learners.items()},
        "source_optimizers": {n: others[n].state_dict() for n in learners if n in others},
        "gradients": gradients if steps % process.objective.accumulate else {},
        "steps": steps,
    }


def _load_stage_state(process: Process, index: int, state: dict[str, Any]) -> None:
    """Put back what :func:`_stage_state` returned."""
    name, optimizers = f"stage_{index}", process.optimizers
    if name in optimizers.stages:
        optimizers.stages[name].load_state_dict(state["optimizer"])
    for learner_name, learner in _learners_of(process.decoupled, index).items():
        learner.load_state_dict(state["sources"][learner_name])
    for learner_name, saved in state["source_optimizers"].items():
        optimizers.sources[learner_name].load_state_dict(saved)
    for parameter_name, parameter in optimizers.parameters.get(name, []):
        parameter.grad = state["gradients"].get(parameter_name)
    process.workers[index].desk.steps = state["steps"]


def _learners_of(decoupled: Decoupled, index: int) -> dict[str, nn.Module]:
    """Sources that a stage asks, and synthetic inputs that it is the first to use."""
    first = {f"{i.name}@input": i.consumers[0] for i in decoupled.interfaces}
    learners = decoupled.named_learners([index])
    return {n: s for n, s in learners if first.get(n, index) == index}
