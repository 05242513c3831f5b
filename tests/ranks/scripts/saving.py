"""Checkpoints of ranks that share a folder, and of ranks that do not."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...helpers.comparing import assert_bits_equal
from .. import kit
from ..kit import fails, train, trainer_of, weights

Damage = Callable[[Path, int], None]


def own_folder(name: str) -> Path:
    """A folder that only this rank sees."""
    return kit.OUT / f"{name}-{dist.get_rank()}" / "checkpoints"


def shared_folder(name: str) -> Path:
    return kit.OUT / name / "checkpoints"


def going_on(folder: Path, **options: Any) -> None:
    """Two saves, more steps, and another trainer that goes on: as one that was never ended."""
    made = {"staleness": 0} | options
    trainer = train(trainer_of("linear", **made), 4)
    trainer.save(folder, extra={"seen": 4})
    train(trainer, 3)
    assert trainer.save(folder, extra={"seen": 7}, asynchronous=True).name == "step-000000007"
    want = weights(train(trainer, 3))
    other = trainer_of("linear", **made)
    assert other.resume(folder) == {"seen": 7}
    assert other.steps == 7
    assert_bits_equal(weights(train(other, 3)), want, f"{folder.name}, {options}")
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000004", "step-000000007"]


def saving_to_one_folder() -> None:
    going_on(shared_folder("one"))
    going_on(shared_folder("rows"), placement=[0, [0, 1], 1, 1])


def saving_to_folders_of_their_own() -> None:
    folder = own_folder("apart")
    going_on(folder)
    parts = [p.name for p in (folder / "step-000000007").glob("*.distcp")]
    assert parts == [f"__{dist.get_rank()}_0.distcp"], parts  # nobody needed the other's
    going_on(own_folder("rows-apart"), placement=[0, [0, 1], 1, 1])


def stages_that_go_on_elsewhere() -> None:
    """What a rank needs now is on the other's disk."""
    folder = own_folder("elsewhere")
    trainer = train(trainer_of("linear", staleness=0), 4)
    trainer.save(folder, keep=1)
    want = weights(train(trainer, 3))
    other = trainer_of("linear", staleness=0, placement=[1, 1, 0, 0])
    other.resume(folder)
    assert_bits_equal(weights(train(other, 3)), want, "stages on the other rank")


def damaged(name: str, damage: Damage) -> None:
    """The newest step is left out, with a warning that names it, and the one before taken."""
    for folder in (own_folder(name), shared_folder(name)):
        trainer = train(trainer_of("linear", staleness=0), 4)
        trainer.save(folder)
        want = weights(train(trainer, 3))
        trainer = train(trainer_of("linear", staleness=0), 6)
        newest = trainer.save(folder)
        trainer.close()
        dist.barrier()
        if dist.get_rank() == 1:
            damage(newest, 1)
        dist.barrier()
        other = trainer_of("linear", staleness=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.resume(folder)
        assert any("step-000000006 is not whole" in str(w.message) for w in caught)
        assert other.steps == 4
        assert_bits_equal(weights(train(other, 3)), want, name)


def _lose_part(path: Path, rank: int) -> None:
    (path / f"__{rank}_0.distcp").unlink()


def _cut_part(path: Path, rank: int) -> None:
    part = path / f"__{rank}_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])


def _spoil_part(path: Path, rank: int) -> None:
    part = path / f"__{rank}_0.distcp"
    part.write_bytes(b"?" * part.stat().st_size)


def _lose_all(path: Path, _: int) -> None:
    shutil.rmtree(path)


def _not_published(path: Path, _: int) -> None:
    path.rename(path.parent / f".{path.name}.writing")


def steps_that_are_not_whole() -> None:
    damaged("lost", _lose_part)
    damaged("cut", _cut_part)
    damaged("spoilt", _spoil_part)
    for damage in (_lose_all, _not_published):  # the other rank's part is still there
        folder = own_folder(damage.__name__)
        trainer = train(trainer_of("linear", staleness=0), 4)
        trainer.save(folder)
        trainer.close()
        trainer = train(trainer_of("linear", staleness=0), 6)
        newest = trainer.save(folder)
        trainer.close()
        if dist.get_rank() == 1:
            damage(newest, 1)
        other = trainer_of("linear", staleness=0)
        other.resume(folder)
        assert other.steps == 4
        train(other, 1)
        other.save(folder)
        assert not [p.name for p in folder.iterdir() if "writing" in p.name]
        other.close()


def a_folder_that_cannot_be_written() -> None:
    """One error in all ranks, nothing published, and training goes on."""
    folder = own_folder("full")
    trainer = train(trainer_of("linear", staleness=0), 4)
    trainer.save(folder)
    if dist.get_rank() == 1:
        shutil.rmtree(folder)
        folder.write_text("a file is in the way")
    fails("failed in rank 1: FileExistsError", lambda: trainer.save(folder))
    train(trainer, 2)
    if dist.get_rank() == 1:
        folder.unlink()
    trainer.save(folder)
    other = trainer_of("linear", staleness=0)
    other.resume(folder)
    assert other.steps == 6
    trainer.close()
    other.close()


TWO = [
    saving_to_one_folder,
    saving_to_folders_of_their_own,
    stages_that_go_on_elsewhere,
    steps_that_are_not_whole,
    a_folder_that_cannot_be_written,
]
