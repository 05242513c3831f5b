"""Checkpoints of a distributed run: written by all processes at once, complete or not there at all.

``torch.distributed.checkpoint`` writes; what is under way is finished first, so that a checkpoint
holds no graphs.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ..errors import DecouplingError
from .sharing import Peers

_NAME = re.compile(r"step-(\d{9})")


class Checkpoints:
    """Writes and reads checkpoints: plain dicts, of which each process has its part.

    Args:
        peers: the processes that write together.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.writing: Future[Any] | None = None
        self.group: Any = None  # of its own: an asynchronous save talks while the run does

    def save(
        self, folder: Path, steps: int, state: dict[str, Any], asynchronous: bool, keep: int
    ) -> Path:
        """Write a checkpoint; to be called in every process.

        Args:
            folder: where all checkpoints of the run are.
            steps: number of steps made, which names the checkpoint.
            state: this process's part: tensors, and objects that are pickled, by name.
            asynchronous: copy the tensors and write while training goes on.
            keep: how many checkpoints stay.

        Returns:
            The checkpoint.

        Raises:
            DecouplingError: ``keep`` is no number of checkpoints.
        """
        if type(keep) is not int or keep < 1:
            raise DecouplingError(f"keep must be a number of checkpoints, at least 1, not {keep!r}")
        self.wait()
        final = folder / f"step-{steps:09d}"
        temporary = folder / f".{final.name}.writing"
        if self.peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was ended while it wrote
            temporary.mkdir(parents=True)
        if asynchronous:
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        self.peers.barrier()

        def complete(future: Any = None) -> None:
            if self.peers.rank == 0 and (future is None or future.exception() is None):
                if final.exists():
                    shutil.rmtree(final)
                temporary.replace(final)
                for _, old in _complete(folder)[:-keep]:
                    shutil.rmtree(old, ignore_errors=True)

        options: dict[str, Any] = {
            "checkpoint_id": temporary,
            "planner": DefaultSavePlanner(flatten_state_dict=False),
        }
        if self.peers.parallel and asynchronous:
            self.group = self.group or dist.new_group(backend="gloo")
            writing = async_save(state, process_group=self.group, **options)
            assert isinstance(writing, Future)
            writing.add_done_callback(complete)
            self.writing = writing
            return final
        with _quiet():
            save(state, **self._where(), **options)
        complete()
        self.peers.barrier()  # nobody goes on before it is there
        return final

    def wait(self) -> None:
        """Wait for an asynchronous save."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def newest(self, folder: Path) -> Path | None:
        """The newest complete checkpoint that rank 0 sees; to be called in every process."""
        self.wait()
        found = _complete(folder)
        first: Path | None = self.peers.gather(found[-1][1] if found else None)[0]
        return first

    def load(self, path: Path, wanted: Callable[[set[str]], set[str]]) -> dict[str, Any]:
        """Read a checkpoint; to be called in every process.

        Args:
            path: what :meth:`newest` returned.
            wanted: which of the saved names this process takes.

        Returns:
            Tensors and objects by name.
        """
        described = FileSystemReader(path).read_metadata().state_dict_metadata
        state: dict[str, Any] = {}
        for name in sorted(wanted(set(described))):
            about = described[name]
            state[name] = None
            if isinstance(about, TensorStorageMetadata):
                state[name] = torch.empty(about.size, dtype=about.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _quiet():
            load(state, checkpoint_id=path, planner=planner, **self._where())
        return state

    def _where(self) -> dict[str, Any]:
        """Who takes part, as torch's functions are told."""
        return {"process_group": self.peers.group} if self.peers.parallel else {"no_dist": True}


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
