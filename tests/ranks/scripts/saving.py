"""Checkpoints of ranks that share a folder, and of ranks that do not."""

from __future__ import annotations

import contextlib
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
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


def damaged(name: str, damage: Damage, who: int = 1) -> None:
    """The newest step is left out, with a warning that names it, and the one before taken."""
    for folder in (own_folder(name), shared_folder(name)):
        trainer = train(trainer_of("linear", staleness=0), 4)
        trainer.save(folder)
        want = weights(train(trainer, 3))
        trainer = train(trainer_of("linear", staleness=0), 6)
        newest = trainer.save(folder)
        trainer.close()
        dist.barrier()
        if dist.get_rank() == who:
            damage(newest, who)
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
    damaged("spoilt-first", _spoil_part, who=0)  # who has what all others wait for
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
        (folder / "step-000000099").mkdir()  # that was being removed
        other = trainer_of("linear", staleness=0)
        other.resume(folder)
        assert other.steps == 4
        train(other, 1)
        other.save(folder, keep=1)
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
        other.close()
        other = trainer_of("linear", staleness=0)
        other.resume(folder)
        assert other.steps == 5
        other.close()


def parts_of_two_saves() -> None:
    """A run that was ended while it published, and another that came to the same step."""
    for kept in (0, 1):
        folder = own_folder(f"twice-{kept}")
        trainer = train(trainer_of("linear", staleness=0), 4)
        trainer.save(folder)
        want = weights(train(trainer, 3))
        for seed in (6, 7):  # of whose saves each rank has one in the end
            trainer = train(trainer_of("linear", staleness=0), seed)
            trainer.steps = 6
            newest = trainer.save(folder, keep=3)
            trainer.close()
            if seed == 6 and dist.get_rank() == kept:
                shutil.move(newest, newest.with_name("first"))
        if dist.get_rank() == kept:
            shutil.rmtree(newest)
            shutil.move(newest.with_name("first"), newest)
        other = trainer_of("linear", staleness=0)
        other.resume(folder)
        assert other.steps == 4
        assert_bits_equal(weights(train(other, 3)), want, "parts of two saves")


def a_save_that_others_have_lost() -> None:
    """What is there of another save makes way for what a rank needs of the whole one."""
    folder = own_folder("other-save")
    trainer = train(trainer_of("linear", staleness=0, placement=[1, 1, 1, 0]), 4)
    trainer.save(folder)
    want = weights(train(trainer, 3))
    if dist.get_rank() == 1:  # has all that there is to have, of one save; rank 0 nothing of it
        copied = folder.parent.parent / "other-save-0" / "checkpoints" / "step-000000004"
        for path in copied.iterdir():
            if path.name.endswith(".distcp"):
                shutil.copy(path, folder / "step-000000004")
    dist.barrier()
    if dist.get_rank() == 0:
        newest = folder / "step-000000004"
        (newest / ".save").write_text("another")
        for path in newest.glob("*.distcp"):
            path.write_bytes(b"?" * path.stat().st_size)
    dist.barrier()
    other = trainer_of("linear", staleness=0)
    other.resume(folder)
    assert other.steps == 4
    assert_bits_equal(weights(train(other, 3)), want, "of the save that is whole")


@contextlib.contextmanager
def full(who: int, size: int = 2000) -> Iterator[None]:
    """On one rank no file can grow longer than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == who:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_disk_that_is_full() -> None:
    """While saving, on either rank: one error in all, nothing published or left, and all go on."""
    for who, asynchronous in ((0, False), (1, False), (1, True)):
        folder = own_folder(f"full-{who}-{asynchronous}")
        trainer = train(trainer_of("linear", staleness=0), 4)
        trainer.save(folder)
        train(trainer, 2)
        with full(who):

            def save(trainer: Any = trainer, folder: Path = folder) -> None:
                trainer.save(folder, asynchronous=True)
                trainer.save(folder)

            fails(f"rank {who}: ", save if asynchronous else lambda t=trainer, f=folder: t.save(f))
        assert [p.name for p in folder.iterdir()] == ["step-000000004"], list(folder.iterdir())
        train(trainer, 1)
        trainer.save(folder)
        trainer.close()
        assert (folder / "step-000000007").exists()


def a_disk_that_is_full_while_resuming() -> None:
    """What a rank lacks is sent to it, and does not fit: all leave the step out, none hangs."""
    folder = own_folder("full-resume")
    trainer = train(trainer_of("linear", staleness=0), 4)
    trainer.save(folder)
    trainer.close()
    for placement in ([1, 1, 0, 0], [0, 0, 1, 1]):
        other = trainer_of("linear", staleness=0, placement=placement)
        with full(1), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.resume(folder)
        assert other.steps == (0 if placement[0] else 4)
        assert any("rank 1: OSError" in str(w.message) for w in caught) == bool(placement[0])
        train(other, 1).close()


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
    parts_of_two_saves,
    a_save_that_others_have_lost,
    a_disk_that_is_full,
    a_disk_that_is_full_while_resuming,
    a_folder_that_cannot_be_written,
]
