"""Checkpoints as files: which processes see the same folder, and who has which part of which step.

Machines with disks of their own keep the parts of their ranks. A step counts where all parts that
its description names are found, on whichever machines; what a process then lacks is sent to it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ..errors import DecouplingError
from ..reports.files import WRITING, saved_steps, writing
from .sharing import Peers

DESCRIPTION, SAVE = ".metadata", ".save"
_MARK = ".mark-"
_CHUNK = 2**26  # bytes sent at once


class Part(NamedTuple):
    """What one process sees of one step.

    Attributes:
        save: which save wrote it: a run that was ended and began again saves steps twice.
        sizes: of the files that are there, in bytes.
        needed: of all files, as the description says; none where that is not there, or damaged.
        items: the file of each item, by name.
    """

    save: str
    sizes: dict[str, int]
    needed: dict[str, int]
    items: dict[str, set[str]]

    def has(self, name: str) -> bool:
        """Whether all of an item is there."""
        files = self.items.get(name, ())
        return bool(files) and all(self.sizes.get(f, 0) >= self.needed[f] for f in files)


NOTHING = Part("", {}, {}, {})


def together(peers: Peers, what: str, act: Callable[[], Any]) -> list[Any]:
    """Do something in every process that waits for no other; if it fails in one, fail in all.

    Returns:
        What each process made, which is sent to all.

    Raises:
        DecouplingError: some process failed; which, and why.
    """
    result, error = None, None
    try:
        result = act()
    except Exception as found:
        error = found
    mine = result, None if error is None else f"{type(error).__name__}: {error}"
    every = peers.gather(mine, what)
    failed = [f"rank {r}: {text}" for r, (_, text) in enumerate(every) if text is not None]
    if failed:
        raise DecouplingError(f"{what} failed in {'; '.join(failed)}") from error
    return [result for result, _ in every]


def begin(peers: Peers, final: Path) -> bool:
    """Make the folder that a step is written to, and remove what runs that were ended have left.

    Returns:
        Whether this process looks after the folder: the first of those that see it does.
    """
    folder, what = final.parent, f"saving to {final.parent}"
    save = peers.gather(uuid.uuid4().hex, what)[0]
    marks = [folder / f"{_MARK}{save}-{rank}" for rank in range(peers.world)]

    def mark() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        marks[peers.rank].touch()

    together(peers, what, mark)
    is_first = not any(mark.exists() for mark in marks[: peers.rank])
    peers.barrier()

    def clear() -> None:
        marks[peers.rank].unlink(missing_ok=True)
        if not is_first:
            return
        for old in folder.glob(WRITING):
            shutil.rmtree(old)
        for old in folder.glob(f"{_MARK}*"):
            old.unlink(missing_ok=True)
        writing(final).mkdir()
        (writing(final) / SAVE).write_text(save)

    together(peers, what, clear)
    return is_first


def find_parts(peers: Peers, folder: Path) -> Iterator[tuple[str, list[Part]]]:
    """The names of the steps that anybody sees, newest first, with everybody's part of one save."""
    every = peers.gather({path.name: _part_of(path) for _, path in saved_steps(folder)}, "resume()")
    for name in sorted({name for parts in every for name in parts}, reverse=True):
        parts = [parts.get(name, NOTHING) for parts in every]
        saves = dict.fromkeys(part.save for part in parts if part.sizes)
        of = {save: [p if p.save == save else NOTHING for p in parts] for save in saves}
        whole = (found for found in of.values() if find_missing(found) is None)
        yield name, next(whole, next(iter(of.values()), parts))


def _part_of(path: Path) -> Part:
    sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
    needed, items, save = dict[str, int](), dict[str, set[str]](), ""
    try:
        save = (path / SAVE).read_text() if SAVE in sizes else ""
        found = FileSystemReader(path).read_metadata().storage_data
        for index, place in found.items():
            items.setdefault(index.fqn, set()).add(place.relative_path)
            end = place.offset + place.length
            needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
    except Exception:  # whatever a damaged file makes of its reader
        return Part(save, sizes, {}, {})
    return Part(save, sizes, needed, items)


def find_missing(parts: list[Part]) -> str | None:
    """What a step lacks, in words; None where it is whole, on all machines together."""
    described = next((part for part in parts if part.needed), None)
    if described is None:
        return "its description is missing or damaged"
    for name, size in described.needed.items():
        largest = max(part.sizes.get(name, 0) for part in parts)
        if largest < size:
            return f"of {name} there are {largest} bytes of {size}"
    return None


def fetch(peers: Peers, path: Path, parts: list[Part], wanted: Iterable[str]) -> None:
    """Bring what a process wants of a step into its folder, from whoever has it.

    Raises:
        DecouplingError: some process could not read or write; which, and why.
    """
    described = next(part for part in parts if part.needed)
    mine, files = parts[peers.rank], {f for n in wanted for f in described.items[n]}
    lacks = {f for f in files if mine.sizes.get(f, 0) < described.needed[f]}
    lacks |= {f for f in (DESCRIPTION, SAVE) if not mine.needed and described.sizes.get(f)}

    def make_room() -> set[str]:
        if lacks and path.exists() and not mine.sizes:  # of another save
            shutil.rmtree(path, ignore_errors=True)
        return lacks

    asked = set[str]().union(*together(peers, f"reading {path}", make_room))
    for name in sorted(asked):
        owner = _owner(name, parts, described)
        _send(peers, path / name, owner, parts[owner].sizes[name], name in lacks)


def _owner(name: str, parts: list[Part], described: Part) -> int:
    """The first rank that has all of a file."""
    if name in (DESCRIPTION, SAVE):
        return next(rank for rank, part in enumerate(parts) if part.needed)
    size = described.needed[name]
    return next(rank for rank, part in enumerate(parts) if part.sizes.get(name, 0) >= size)


def _send(peers: Peers, path: Path, owner: int, size: int, writes: bool) -> None:
    """One file from a process to all that lack it. Whoever fails takes part until the end."""
    temporary = path.with_name(f".{path.name}.rank-{peers.rank}")
    failures: list[Exception] = []

    def tried(act: Callable[[], Any]) -> None:
        try:
            failures or act()
        except Exception as error:
            failures.append(error)

    def begin_file() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)

    def read(start: int, chunk: torch.Tensor) -> None:
        with path.open("rb") as file:
            file.seek(start)
            chunk.copy_(torch.frombuffer(bytearray(file.read(len(chunk))), dtype=torch.uint8))

    def append(chunk: torch.Tensor) -> None:
        with temporary.open("ab") as file:
            file.write(chunk.numpy().tobytes())

    def end() -> None:
        if failures:
            temporary.unlink(missing_ok=True)
            raise failures[0]
        if writes:
            temporary.replace(path)

    if writes:
        tried(begin_file)
    for start in range(0, size, _CHUNK):
        chunk = torch.zeros(min(_CHUNK, size - start), dtype=torch.uint8)
        if peers.rank == owner:
            tried(partial(read, start, chunk))
        dist.broadcast(chunk, group=peers.group, group_src=owner)
        if writes:
            tried(partial(append, chunk))
    together(peers, f"reading {path}", end)
