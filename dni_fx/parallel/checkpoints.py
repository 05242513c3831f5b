"""Checkpoints of a distributed run: written by all processes at once, complete or not there at all.

``torch.distributed.checkpoint`` writes; what is under way is finished first, so that a checkpoint
holds no graphs. Each stage's state stands for itself, under names that do not tell the rank, so
that a run can go on with its stages on other ranks.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..decoupled import Decoupled
from ..errors import DecouplingError
from ..graphs.nested import flatten
from ..passes.trace.state import rng_state, set_rng_state
from ..reports import files
from . import folders
from .mailbox import ParallelError
from .process import Process
from .sharing import Peers, owned_tensors

FORMAT = 2


class Checkpoints:
    """Writes and reads checkpoints: plain dicts, of which each process has its part.

    All methods but :meth:`wait` are called in every process, while nothing is under way.

    Args:
        process: whose stages are saved and loaded.
    """

    def __init__(self, process: Process) -> None:
        self.process, self.peers = process, process.peers
        self._writing: Future[None] | None = None
        self._apart: Peers | None = None  # an asynchronous save talks while the run does

    def save(self, folder: Path, steps: int, extra: Any, asynchronous: bool, keep: int) -> Path:
        """Write a checkpoint, as :meth:`dni_fx.distributed.Trainer.save` says.

        Raises:
            DecouplingError: ``keep`` is no number of checkpoints, or a process could not write.
        """
        if type(keep) is not int or keep < 1:
            raise DecouplingError(f"keep must be a number of checkpoints, at least 1, not {keep!r}")
        self.wait()
        state = _collect(self.process, steps, extra)
        final = files.step_folder(folder, steps)
        is_first = folders.begin(self.peers, final)
        if not asynchronous:
            _write(self.peers, state, final, is_first, keep)
            return final
        if self._apart is None:
            self._apart = self.peers.twin(self.process.timeout)
        state = {
            k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()
        }
        pool = ThreadPoolExecutor(1, "dni_fx checkpoint")
        self._writing = pool.submit(_write, self._apart, state, final, is_first, keep)
        pool.shutdown(wait=False)
        return final

    def wait(self) -> None:
        """Wait for an asynchronous save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self, folder: Path) -> tuple[int, Any] | None:
        """Take up the newest checkpoint that all processes together have whole, if there is one.

        Returns:
            Number of steps made, and the user's own.

        Raises:
            DecouplingError: the state belongs to another model or plan; nothing is loaded then.
        """
        self.wait()
        for name, parts in folders.find_parts(self.peers, folder):
            path, damage = folder / name, folders.find_missing(parts)
            if damage is None:
                try:
                    state = self._read(path, parts)
                except ParallelError:  # nobody's file is to blame
                    raise
                except DecouplingError as error:
                    damage = str(error)
            if damage is None:
                folders.together(self.peers, "resuming", partial(_check, self.process, state, path))
                return _apply(self.process, state)
            warnings.warn(
                f"the checkpoint {path} is not whole and is left out: {damage}", stacklevel=4
            )
        return None

    def _read(self, path: Path, parts: list[folders.Part]) -> dict[str, Any]:
        """What this process takes up of a step; if one process cannot read its own, none does."""
        saved = set(next(part.items for part in parts if part.needed))
        wanted = _wanted(self.process, saved)
        owner = next(r for r, part in enumerate(parts) if part.items and part.has("run"))
        folders.fetch(self.peers, path, parts, wanted)

        def read_run() -> bytes:
            file = io.BytesIO()
            if self.peers.rank == owner:
                torch.save(_load(path, ["run"])["run"], file)
            return file.getvalue()

        def read_mine() -> None:
            state.update(_load(path, wanted))

        state: dict[str, Any] = {}
        run = folders.together(self.peers, "reading", read_run)[owner]
        folders.together(self.peers, "reading", read_mine)
        return state | {"run": torch.load(io.BytesIO(run), weights_only=False)}


def _write(peers: Peers, state: dict[str, Any], final: Path, is_first: bool, keep: int) -> None:
    """Write all parts, and publish the step once every process has written its own."""
    try:
        _write_parts(peers, state, final, is_first)
    except DecouplingError:
        if is_first:  # what it takes may be what others lack
            shutil.rmtree(files.writing(final), ignore_errors=True)
        raise
    if is_first:  # now that nobody needs older ones
        files.prune(final, keep)
    peers.barrier()


def _write_parts(peers: Peers, state: dict[str, Any], final: Path, is_first: bool) -> None:
    temporary, what = files.writing(final), f"saving {final}"
    where = {"process_group": peers.group} if peers.parallel else {"no_dist": True}
    try:
        with _quiet():
            planner = DefaultSavePlanner(flatten_state_dict=False)
            described = save(state, checkpoint_id=temporary, planner=planner, **where)
    except CheckpointException as error:
        failures = [f"rank {r}: {found[0]!r}" for r, found in error.failures.items()]
        raise DecouplingError(f"{final} was not saved: {'; '.join(failures)}") from error

    def describe() -> None:
        path = temporary / folders.DESCRIPTION
        if is_first and not path.exists():  # rank 0 has another folder
            path.write_bytes(pickle.dumps(described))

    folders.together(peers, what, describe)
    folders.together(peers, what, lambda: files.publish(final) if is_first else None)


def _load(path: Path, names: list[str]) -> dict[str, Any]:
    """Some items of a step."""
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for name in names:
        about = described[name]
        state[name] = None
        if isinstance(about, TensorStorageMetadata):
            state[name] = torch.empty(about.size, dtype=about.properties.dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet():
            load(state, checkpoint_id=path, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise DecouplingError(str(next(iter(error.failures.values()))[0])) from error
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that there is one process, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)
        yield


def _collect(process: Process, steps: int, extra: Any) -> dict[str, Any]:
    """Everything that a process saves, by name: tensors, and objects that are pickled."""
    state: dict[str, Any] = {n: t.detach() for n, t in _model_tensors(process).items()}
    generators = rng_state()
    for index, worker in process.workers.items():
        leaves, structure = flatten(_stage_state(process, index, steps))
        name = _at("stage", process, index)
        state |= {f"{name}/{i}": leaf.detach() for i, leaf in enumerate(leaves)}
        state[name] = structure
        state[_at("random", process, index)] = worker.learner.random
        state[_at("devices", process, index)] = generators["devices"]
    if process.peers.rank == 0:
        plan = process.decoupled.plan.to_json()
        state["run"] = {"format": FORMAT, "plan": plan, "steps": steps, "extra": extra} | generators
    return state


def _wanted(process: Process, saved: set[str]) -> list[str]:
    """Which of the saved names a process takes up."""
    stages = [_stage_name(process, k, saved) for k in process.workers]
    prefixes = tuple(f"{name}/" for name in stages)
    names = {*_model_tensors(process), *stages}
    names |= {_at(kind, process, k) for k in process.workers for kind in ("random", "devices")}
    return sorted(n for n in saved if n in names or n.startswith(prefixes))


def _check(process: Process, state: dict[str, Any], path: Path) -> None:
    """The state is of this plan and this model."""
    if state["run"]["format"] != FORMAT:
        raise DecouplingError(f"{path} was saved by another version of dni_fx")
    if state["run"]["plan"] != process.decoupled.plan.to_json():
        raise DecouplingError(
            f"{path} was saved with another plan: build the same model and cut it the same way "
            "(a plan is written by plan.to_json() and passed as cuts=)"
        )
    mine = _model_tensors(process)
    stages = [_stage_name(process, k, state) for k in process.workers]
    missing = [n for n in (*mine, *stages) if n not in state]
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
        name = _stage_name(process, index, state)
        count = sum(other.startswith(f"{name}/") for other in state)
        leaves = (state[f"{name}/{i}"] for i in range(count))
        _load_stage_state(process, index, state[name].build(leaves))
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


def _stage_name(process: Process, index: int, saved: Collection[str]) -> str:
    """Of what this rank saved of a stage; of the first that ran it, where so many did not."""
    name = _at("stage", process, index)
    return name if name in saved else f"stage/{index}/0"


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
