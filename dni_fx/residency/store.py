"""Where the bytes of stages are kept that are not in memory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import DecouplingError

_MAGIC = b"dni_fx stage\n"
_SIZE, _SUM = struct.Struct("<Q"), struct.Struct("<I")
_PIECE = 1 << 24  # bytes that are summed and moved at once


class StoreError(DecouplingError):
    """A stage could not be written, or what was written cannot be read."""


class Store(ABC):
    """Keeps the bytes of a stage's storages under the stage's index."""

    @abstractmethod
    def write(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        """Keep the contents of all of them, whole or not at all.

        Raises:
            StoreError: there is no room, or no right.
        """

    @abstractmethod
    def read(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        """Fill these, which have the sizes that were written.

        Raises:
            StoreError: nothing such was written, or it was damaged since.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""


class HostStore(Store):
    """In host memory, pinned where an accelerator's copies go through it."""

    def __init__(self) -> None:
        self._kept: dict[int, list[torch.Tensor]] = {}

    def write(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        known = self._kept.setdefault(stage, [])
        if [len(t) for t in known] != [s.nbytes() for s in storages]:
            known = self._kept[stage] = [_host_bytes(s) for s in storages]
        for kept, storage in zip(known, storages, strict=True):
            kept.copy_(_as_bytes(storage))

    def read(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        for kept, storage in zip(self._kept[stage], storages, strict=True):
            _as_bytes(storage).copy_(kept)

    def clear(self) -> None:
        self._kept.clear()


class FolderStore(Store):
    """A file for each stage, in a folder: a header, the bytes, and their checksum (CRC-32).

    A file is written beside the one before it and takes its place once it is whole, so that what
    was written before a kill or on a full disk is never half of it.

    Args:
        folder: made where it does not exist; nothing else in it is touched.

    Raises:
        StoreError: it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._written: dict[Path, tuple[int, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store= names a folder that cannot be made: {error}") from error

    def path_of(self, stage: int) -> Path:
        """The file of a stage."""
        return self.folder / f"stage_{stage}.bin"

    def write(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        path = self.path_of(stage)
        begun = path.with_suffix(".writing")
        header = json.dumps({"stage": stage, "sizes": [s.nbytes() for s in storages]}).encode()
        try:
            with open(begun, "wb", buffering=0) as file:
                for part in (_MAGIC, _SIZE.pack(len(header)), header):
                    _write_all(file, memoryview(part))
                total = 0
                for storage in storages:
                    total = _write_all(file, _memory_of(storage), total)
                _write_all(file, memoryview(_SUM.pack(total)))
            os.replace(begun, path)
            self._written[path] = _identity(path)
        except OSError as error:
            begun.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            raise StoreError(
                f"stage_{stage} ({sum(s.nbytes() for s in storages):,} bytes) could not be written "
                f"to {path} ({error}); {free:,} bytes are free there: it stays in memory"
            ) from error

    def read(self, stage: int, storages: Sequence[torch.UntypedStorage]) -> None:
        path = self.path_of(stage)
        try:
            with open(path, "rb", buffering=0) as file:
                sizes = self._header(file, path)
                if sizes != [s.nbytes() for s in storages]:
                    raise _damaged(path, "is of another stage or model")
                total = 0
                for storage in storages:
                    total = _read_all(file, storage, total, path)
                if _read_exactly(file, _SUM.size, path) != _SUM.pack(total):
                    raise _damaged(path, "does not have the checksum that it was written with")
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error})") from error

    def _header(self, file: object, path: Path) -> list[int]:
        if file.read(len(_MAGIC)) != _MAGIC:  # type: ignore[attr-defined]
            raise _damaged(path, "is not a file of a stage")
        (size,) = _SIZE.unpack(_read_exactly(file, _SIZE.size, path))
        try:
            sizes: list[int] = json.loads(_read_exactly(file, size, path))["sizes"]
        except (ValueError, KeyError, OverflowError, MemoryError) as error:
            raise _damaged(path, "has a damaged header") from error
        return sizes

    def clear(self) -> None:
        """Remove the files, but those that a later store in the same folder has put there."""
        while self._written:
            path, identity = self._written.popitem()
            if path.exists() and _identity(path) == identity:
                path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    """Of a file: another in its place has another."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path} {what}: the weights that it held are lost, so load a checkpoint "
        "(trainer.load_state_dict) into a new model"
    )


def _host_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """Room in host memory for as many bytes."""
    pinned = storage.device.type != "cpu" and torch.accelerator.is_available()
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The same memory as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    """Its bytes in host memory, to read from."""
    if storage.device.type != "cpu":
        storage = _as_bytes(storage).cpu().untyped_storage()
    # Not by way of NumPy, after which a storage can no more be freed.
    size = storage.nbytes()
    array = (ctypes.c_char * size).from_address(storage.data_ptr()) if size else b""
    return memoryview(array).cast("B")


def _write_all(file: object, memory: memoryview, total: int = 0) -> int:
    """Write it all; returns the checksum of what went before, with it."""
    for start in range(0, len(memory), _PIECE):
        piece = memory[start : start + _PIECE]
        total = zlib.crc32(piece, total)
        while len(piece):
            piece = piece[file.write(piece) :]  # type: ignore[attr-defined]
    return total


def _read_all(file: object, storage: torch.UntypedStorage, total: int, path: Path) -> int:
    """Fill a storage; returns the checksum of what went before, with it."""
    on_host = storage.device.type == "cpu"
    host = storage if on_host else _host_bytes(storage).untyped_storage()
    memory = _memory_of(host)
    for start in range(0, len(memory), _PIECE):
        piece = memory[start : start + _PIECE]
        place = 0
        while place < len(piece):
            count = file.readinto(piece[place:])  # type: ignore[attr-defined]
            if not count:
                raise _damaged(path, "is shorter than it was written")
            place += count
        total = zlib.crc32(piece, total)
    if not on_host:
        _as_bytes(storage).copy_(_as_bytes(host))
    return total


def _read_exactly(file: object, size: int, path: Path) -> bytes:
    found = file.read(size)  # type: ignore[attr-defined]
    if len(found) != size:
        raise _damaged(path, "is shorter than it was written")
    return bytes(found)
