"""``Trainer(update=, resident=, sweep=)``: stages leave memory, and no number changes by that; for
every source and model: ``tests/matrix/``.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError, NonFiniteError
from dni_fx.residency import store as stores
from dni_fx.residency.absent import AbsentError
from dni_fx.residency.store import FolderStore, StoreError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam, sgd
from ..helpers.training import batch, largest_difference, record, train, trainer_of
from ..models.small import CHAIN, TIED

FREE = ["local", "zero"]  # of messages


@contextlib.contextmanager
def visiting(gradients: Any = "linear", **options: Any) -> Iterator[Any]:
    """A trainer whose stages are visited."""
    with contextlib.closing(trainer_of(gradients, optimizer=adam, **options)) as trainer:
        yield trainer


def gathered(trainer: Any) -> Any:
    """All that can be compared of it, once everything is in memory."""
    trainer.gather()
    return record(trainer)


def in_memory(trainer: Any) -> int:
    """Stages whose weights are in memory."""
    stages = trainer.decoupled.stages
    return sum(all(p.untyped_storage().nbytes() for p in s.parameters()) for s in stages)


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_no_more_stages_are_in_memory_than_may_be(resident: int) -> None:
    counts: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            counts.append(in_memory(trainer))
            return super().step(closure)

    trainer = trainer_of("local", optimizer=lambda p: Counting(p, 0.1), resident=resident)
    with contextlib.closing(trainer):
        train(trainer, 4)
    later = counts[len(trainer.decoupled.stages) :]
    assert max(later) <= resident
    assert in_memory(trainer) == 4
    counts.clear()
    with contextlib.closing(trainer_of("local", optimizer=lambda p: Counting(p, 0.1))) as trainer:
        train(trainer, 2)
    assert max(counts) == 4  # the control


@pytest.mark.parametrize("gradients", FREE)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_batches_a_visit_change_nothing_where_no_message_comes_back(
    gradients: str, accumulate: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"accumulate": accumulate}
    plain = train(trainer_of(gradients, optimizer=adam, **options), 8)
    with visiting(gradients, resident=1, sweep=3, store=tmp_path, **options) as trainer:
        assert_bits_equal(gathered(train(trainer, 8)), record(plain), gradients)


def test_sources_that_learn_from_messages_are_late_by_a_visit(tmp_path: Path) -> None:
    """Alike wherever the stages are; and the control of the test above."""
    plain = train(trainer_of("linear", optimizer=adam), 9)
    with visiting(sweep=3) as all_in_memory, visiting(resident=1, sweep=3, store=tmp_path) as one:
        states = [gathered(train(trainer, 9)) for trainer in (all_in_memory, one)]
    assert_bits_equal(states[0], states[1], "in memory or not")
    assert largest_difference(states[0], record(plain)) > 1e-4


def test_rates_are_those_that_a_step_was_posted_with() -> None:
    trainers = [trainer_of("local", optimizer=sgd), trainer_of("local", optimizer=sgd, sweep=4)]
    for trainer in trainers:
        for step in range(8):
            x, y = batch(step)
            trainer.step(x, target=y)
            for optimizer in trainer.optimizers.values():
                optimizer.param_groups[0]["lr"] *= 0.9
        trainer.drain()
    assert_bits_equal(record(trainers[1]), record(trainers[0]), "rates")


def test_gradients_of_one_stage_live_at_a_time() -> None:
    most: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            stages = trainer.decoupled.stages
            most.append(sum(any(p.grad is not None for p in s.parameters()) for s in stages))
            return super().step(closure)

    for update, expected in (("at_once", 1), ("together", 4)):
        most.clear()
        trainer = trainer_of("local", optimizer=lambda p: Counting(p, 0.1), update=update)
        train(trainer, 3)
        assert max(most) == expected


def test_what_is_elsewhere_is_not_read_in_silence() -> None:
    with visiting(resident=1) as trainer:
        train(trainer, 2)
        model = trainer.decoupled.model
        weight = next(model.parameters())
        assert isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.requires_grad) == ((6, 6), True)
        for read in (
            lambda: weight.sum(),
            lambda: model(batch(0)[0]),
            lambda: model.state_dict(),
            lambda: torch.save(weight, io.BytesIO()),
            lambda: repr(weight),
            lambda: weight.data.zero_(),
            lambda: trainer.optimizers["stage_0"].state[weight]["exp_avg"] + 1,
        ):
            with pytest.raises(AbsentError, match=r"stage_\d is not in memory.*trainer.gather"):
                read()
        trainer.gather()
        assert type(weight) is nn.Parameter
        model(batch(0)[0])
        train(trainer, 1)
        assert trainer.beside.executor.residency.away


def test_memory_that_others_look_at_does_not_leave() -> None:
    """Torch would crash where they are read."""
    with visiting("local", resident=1) as trainer:
        train(trainer, 2)
        trainer.gather()
        model = trainer.decoupled.model
        kept = model.state_dict()
        with pytest.raises(StoreError, match=r"stage_\d cannot leave memory.*shape \(6, 6\).*deep"):
            train(trainer, 1)
        assert all(tensor.isfinite().all() for tensor in kept.values())
        kept = copy.deepcopy(model.state_dict())
        train(trainer, 2)
        assert all(tensor.isfinite().all() for tensor in kept.values())
        assert trainer.beside.executor.residency.away


def test_states_are_saved_whole_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole = train(trainer_of("linear", optimizer=adam), 6)
    with visiting(resident=1, store=tmp_path) as first:
        state = train(first, 3).state_dict()
    with visiting(resident=2) as second:
        second.load_state_dict(state)
        assert_bits_equal(gathered(train(second, 3)), record(whole), "resumed")


def test_the_model_is_whole_when_nobody_holds_the_trainer_any_more(tmp_path: Path) -> None:
    trainer = train(trainer_of("local", optimizer=adam, resident=1, store=tmp_path), 2)
    model, decoupled = trainer.decoupled.model, trainer.decoupled
    assert list(tmp_path.glob("stage_*.bin"))
    del trainer
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert all(p.isfinite().all() for p in model.parameters())
    assert decoupled(batch(0)[0]).isfinite().all()


def test_diagnosing_brings_everything_and_training_goes_on() -> None:
    plain = train(trainer_of("linear", optimizer=adam), 4)
    with visiting(resident=1) as trainer:
        train(trainer, 2)
        x, y = batch(5)
        trainer.diagnose(x, target=y)
        assert_bits_equal(gathered(train(trainer, 2)), record(plain), "after diagnose")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def exchange(path: Path) -> None:
    path.write_bytes((path.parent / "stage_3.bin").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damage, "checksum"),
        (shorten, "shorter"),
        (exchange, "another stage"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(b"what is this"), "not a file of a stage"),
    ],
)
def test_damaged_files_are_never_loaded(spoil: Any, says: str, tmp_path: Path) -> None:
    trainer = train(trainer_of("local", optimizer=adam, resident=1, store=tmp_path), 2)
    spoil(tmp_path / "stage_0.bin")
    with pytest.raises(StoreError, match=f"stage_0.bin.*{says}.*checkpoint"):
        train(trainer, 1)
    with pytest.raises(AbsentError, match="stage_0"):
        next(trainer.decoupled.model.parameters()).sum()


def test_a_full_disk_leaves_the_stage_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(trainer_of("local", optimizer=adam), 2)
    trainer = train(trainer_of("local", optimizer=adam, resident=1, store=tmp_path), 2)
    write = stores._write_all

    def full(file: Any, memory: memoryview, total: int = 0) -> int:
        if len(memory) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, memory, total)

    monkeypatch.setattr(stores, "_write_all", full)
    with pytest.raises(StoreError, match=r"No space left.*bytes are free there: it stays"):
        train(trainer, 1)
    assert not list(tmp_path.iterdir())
    moved = largest_difference(trainer.decoupled.state_dict(), plain.decoupled.state_dict())
    assert 0 < moved < 0.1  # the first stage was visited
    monkeypatch.undo()
    with contextlib.closing(trainer):
        train(trainer, 1)
    assert in_memory(trainer) == 4


def test_a_file_takes_the_place_of_the_one_before_it_once_it_is_whole(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    storage = torch.arange(100.0).untyped_storage()
    store.write(0, [storage])
    before = store.path_of(0).read_bytes()
    (tmp_path / "stage_0.writing").write_bytes(before[:50])  # of one that was killed
    other = torch.zeros(100).untyped_storage()
    store.read(0, [other])
    assert list(other) == list(storage)
    store.write(0, [storage])
    assert not (tmp_path / "stage_0.writing").exists()


def test_a_batch_that_is_not_finite_is_refused_and_all_stages_are_there() -> None:
    with visiting("local", resident=1) as trainer:
        train(trainer, 2)
        x, y = batch(2)
        x[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="stage_0, step 3"):
            trainer.step(x, target=y)
        assert in_memory(trainer) == 4
        assert all(p.isfinite().all() for p in trainer.decoupled.parameters())
        train(trainer, 1)


def test_a_batch_of_another_size_finds_the_model(tmp_path: Path) -> None:
    """Guards may look at all of it."""
    model = dni_fx.decouple(
        Ranked(), ["first", "second"], example_inputs=(torch.randn(8, 6),), gradients="zero"
    )
    options: dict[str, Any] = {"optimizer": adam, "resident": 1, "store": tmp_path}
    with contextlib.closing(dni_fx.Trainer(model, nn.functional.cross_entropy, **options)) as one:
        for size in (8, 8, 3, 8):
            x, y = batch(0, size)
            one.step(x, target=y)
        assert one.beside.executor.residency.away


class Ranked(nn.Module):
    """Decides by a value's rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, 6)`` to ``(batch, 3)``."""
        h = self.second(self.first(x))
        return self.third(h.mean(1) if h.dim() == 3 else h)


def test_modes_are_not_changed_while_batches_wait() -> None:
    with visiting("local", sweep=2) as trainer:
        train(trainer, 1)
        trainer.decoupled.model.eval()
        with pytest.raises(DecouplingError, match=r"evaluation mode while batches.*drain"):
            train(trainer, 1)


def test_weights_that_are_mapped_from_a_file_are_copied_stage_by_stage(tmp_path: Path) -> None:
    weights, plain = CHAIN.build().state_dict(), train(trainer_of("local", optimizer=adam), 4)
    torch.save(weights, tmp_path / "weights.pt")
    model = CHAIN.build()
    model.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True), assign=True)
    with visiting("local", model=model, resident=1, store=tmp_path / "store") as trainer:
        assert_bits_equal(gathered(train(trainer, 4)), record(plain), "mapped")
    assert_bits_equal(torch.load(tmp_path / "weights.pt"), weights, "the file")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"update": "later"}, "'together' or 'at_once'"),
        ({"resident": 0}, "resident= is a whole number, at least 1, not 0"),
        ({"resident": True}, "resident="),
        ({"sweep": 1.5}, "sweep="),
        ({"resident": 1, "store": 3}, "store= is 'host' or a folder"),
        ({"resident": 1, "schedule": Threads()}, "at once: leave one of them out"),
        ({"sweep": 2, "compile": True}, "compile= makes one call"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DecouplingError, match=says):
        trainer_of("local", **options)


@pytest.mark.parametrize("gradients", ["exact", "delayed", "mix", "feedback"])
def test_stages_that_wait_are_refused_by_name(gradients: str) -> None:
    with (
        visiting(gradients, update="at_once") as trainer,
        pytest.raises(DecouplingError, match="in one visit"),
    ):
        train(trainer, 1)


def test_shared_weights_and_synthetic_inputs_are_refused() -> None:
    for options, says in (
        ({"case": TIED}, "is used by stages"),
        ({"inputs": "mlp"}, "synthetic inputs"),
    ):
        with (
            visiting("local", update="at_once", **options) as trainer,
            pytest.raises(DecouplingError, match=says),
        ):
            train(trainer, 1, **{k: v for k, v in options.items() if k == "case"})


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        visiting("local", resident=1, store=tmp_path / "file" / "store") as trainer,
        pytest.raises(StoreError, match="store= names a folder that cannot be made"),
    ):
        train(trainer, 1)
    assert dni_fx.DecouplingError in StoreError.__mro__


def test_a_store_leaves_the_files_of_a_later_one_in_its_folder(tmp_path: Path) -> None:
    """A trainer may be collected long after the next one in the same folder has begun."""
    first, second = FolderStore(tmp_path), FolderStore(tmp_path)
    weights = [torch.ones(4).untyped_storage()]
    first.write(0, weights)
    first.write(1, weights)
    second.write(0, weights)
    first.clear()
    second.read(0, weights)
    assert not second.path_of(1).exists()  # the first one's own
    second.clear()
    assert not second.path_of(0).exists()
