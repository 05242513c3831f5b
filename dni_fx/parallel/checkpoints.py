"""Checkpoints of a distributed run: written by all processes at once, complete or not there at all.

``torch.distributed.checkpoint`` writes; what is under way is finished first, so that a checkpoint
holds no graphs. Each stage's state stands for itself, so that a run can go on with its stages on
other ranks.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ..errors import DecouplingError
from ..graphs.nested import flatten

if TYPE_CHECKING:
    from .trainer import Trainer

_NAME = re.compile(r"step-(\d{9})")
FORMAT = 1


class Checkpoints:
    """Writes and reads the checkpoints of one trainer.

    Args:
        trainer: whose stages are saved.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.writing: Future[Any] | None = None
        self.group: Any = None  # of its own: an asynchronous save talks while the run does

    def save(self, directory: str | Path, extra: Any, asynchronous: bool, keep: int) -> Path:
        """See :meth:`dni_fx.distributed.Trainer.save`."""
        trainer, folder = self.trainer, Path(directory)
        if type(keep) is not int or keep < 1:
            raise DecouplingError(f"keep must be a number of checkpoints, at least 1, not {keep!r}")
        self.wait()
        final = folder / f"step-{trainer.steps:09d}"
        temporary = folder / f".{final.name}.writing"
        if trainer.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was ended while it wrote
            temporary.mkdir(parents=True)
        state = self._state(extra)
        if asynchronous:
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        self._barrier()

        def complete(future: Any = None) -> None:
            if trainer.rank == 0 and (future is None or future.exception() is None):
                if final.exists():
                    shutil.rmtree(final)
                temporary.replace(final)
                for _, old in _complete(folder)[:-keep]:
                    shutil.rmtree(old, ignore_errors=True)

        options: dict[str, Any] = {
            "checkpoint_id": temporary,
            "planner": DefaultSavePlanner(flatten_state_dict=False),
        }
        if trainer.parallel and asynchronous:
            self.group = self.group or dist.new_group(backend="gloo")
            writing = async_save(state, process_group=self.group, **options)
            assert isinstance(writing, Future)
            writing.add_done_callback(complete)
            self.writing = writing
            return final
        if trainer.parallel:
            save(state, process_group=trainer.group, **options)
        else:
            with _quiet():
                save(state, no_dist=True, **options)
        complete()
        self._barrier()  # nobody goes on before it is there
        return final

    def wait(self) -> None:
        """Wait for an asynchronous save."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def resume(self, directory: str | Path) -> Any:
        """See :meth:`dni_fx.distributed.Trainer.resume`."""
        trainer = self.trainer
        self.wait()
        found = _complete(Path(directory))
        told = [found[-1][1] if found else None]
        if trainer.parallel:
            dist.broadcast_object_list(told, group=trainer.group, group_src=0)
        if told[0] is None:
            return None
        return self._load(told[0])

    def _state(self, extra: Any) -> dict[str, Any]:
        """Everything that this process saves, by name: tensors, and objects that are pickled."""
        trainer, state = self.trainer, dict[str, Any]()
        names = trainer.tensor_names()
        for index, tensor in trainer._owned_tensors():
            if index in trainer._team_now().workers:
                state[f"model/{names[id(tensor)]}"] = tensor.detach()
        for index, worker in trainer._team_now().workers.items():
            leaves, structure = flatten(trainer.stage_state(index))
            state |= {f"stage_{index}/{i}": leaf.detach() for i, leaf in enumerate(leaves)}
            state[f"stage_{index}"] = structure
            state[f"random/{index}/{trainer.place_of(index)}"] = worker.random
        if trainer.rank == 0:
            state["run"] = {
                "format": FORMAT,
                "plan": trainer.decoupled.plan.to_json(),
                "steps": trainer.steps,
                "torch": torch.get_rng_state(),
                "python": random.getstate(),
                "extra": extra,
            }
        return state

    def _load(self, path: Path) -> Any:
        trainer = self.trainer
        team = trainer._team_now()
        described = FileSystemReader(path).read_metadata().state_dict_metadata
        wanted = {"run", *(f"random/{k}/{trainer.place_of(k)}" for k in team.workers)}
        names = trainer.tensor_names()
        mine = {
            f"model/{names[id(t)]}": t for k, t in trainer._owned_tensors() if k in team.workers
        }
        prefixes = tuple(f"stage_{k}/" for k in team.workers)
        wanted |= {
            *mine,
            *(f"stage_{k}" for k in team.workers),
            *(n for n in described if n.startswith(prefixes)),
        }
        state: dict[str, Any] = {}
        for name in sorted(wanted & described.keys()):
            about = described[name]
            state[name] = None
            if isinstance(about, TensorStorageMetadata):
                state[name] = torch.empty(about.size, dtype=about.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        where = {"process_group": trainer.group} if trainer.parallel else {"no_dist": True}
        with _quiet():
            load(state, checkpoint_id=path, planner=planner, **where)
        run = state["run"]
        if run["plan"] != trainer.decoupled.plan.to_json():
            raise DecouplingError(
                f"{path} was saved with another plan: build the same model and cut it the same way "
                "(a plan is written by plan.to_json() and passed as cuts=)"
            )
        missing = [n for n in (*mine, *(f"stage_{k}" for k in team.workers)) if n not in state]
        if missing:
            raise DecouplingError(
                f"{path} lacks {missing[0]!r}, which this model has: it belongs to another one"
            )
        wrong = [n for n, t in mine.items() if state[n].shape != t.shape]
        if wrong:
            raise DecouplingError(
                f"{path} does not fit: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)} in it"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])
        trainer.steps = run["steps"]
        for index, worker in team.workers.items():
            count = sum(name.startswith(f"stage_{index}/") for name in state)
            leaves = [state[f"stage_{index}/{i}"] for i in range(count)]
            trainer.load_stage_state(index, state[f"stage_{index}"].build(iter(leaves)))
            worker.random = state.get(f"random/{index}/{trainer.place_of(index)}", worker.random)
        torch.set_rng_state(run["torch"])
        version, internal, gauss = run["python"]
        random.setstate((version, tuple(internal), gauss))
        return run["extra"]

    def _barrier(self) -> None:
        if self.trainer.parallel:
            dist.barrier(group=self.trainer.group)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that there is one process, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)
        yield


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return sorted((step, path) for step, path in found if (path / ".metadata").exists())
