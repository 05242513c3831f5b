"""``Trainer.save`` and ``resume``: a run goes on bit for bit, whatever was in memory, and whenever
it was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dni_fx.errors import DecouplingError
from dni_fx.schedules import Threads

from ..helpers.comparing import assert_bits_equal
from ..helpers.optimisers import adam, sgd
from ..helpers.paths import ROOT
from ..helpers.training import largest_difference, record, train, trainer_of
from ..models.small import SKIPS

WAYS: list[dict[str, Any]] = [
    {}, {"update": "at_once"}, {"resident": 1}, {"resident": 2, "sweep": 2}, {"accumulate": 2},
    {"schedule": Threads(staleness=0)},
]  # fmt: skip


def weights(trainer: Any) -> Any:
    """All of it, in memory."""
    trainer.gather()
    return record(trainer)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("gradients", ["linear", "local"])
def test_a_run_goes_on_bit_for_bit(gradients: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "optimizer": adam}
    if "sweep" in options or "resident" in options:
        options["store"] = tmp_path / "store"
    with contextlib.closing(trainer_of(gradients, **options)) as first:
        assert first.resume(tmp_path / "saved") is None
        train(first, 3)
        path = first.save(tmp_path / "saved", extra={"epoch": 1})
        assert path.name == "step-000000003"
        if "resident" in options:  # saving brings no more in than may be
            assert first.beside.executor.residency.away
        whole = weights(train(first, 3))
    with contextlib.closing(trainer_of(gradients, **options)) as second:
        train(second, 2)
        assert largest_difference(weights(second), whole) > 1e-4  # the control
        assert second.resume(tmp_path / "saved") == {"epoch": 1}
        assert second.steps == 3
        assert_bits_equal(weights(train(second, 3)), whole, f"{gradients}, {options}")


def test_older_ones_are_removed_and_damaged_ones_left_out(tmp_path: Path) -> None:
    trainer = trainer_of("local", optimizer=sgd)
    states = {}
    for step in range(1, 4):
        trainer.save(train(trainer, 1) and tmp_path, keep=2)
        states[step] = weights(trainer)
    names = ["step-000000002", "step-000000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    file = tmp_path / names[1] / "stage_1.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"000000003 is not whole.*stage_1\.pt is damaged"):
        trainer.resume(tmp_path)
    assert trainer.steps == 2
    assert_bits_equal(weights(trainer), states[2], "the one before")
    (tmp_path / names[0] / "run.pt").unlink()
    with pytest.warns(UserWarning, match="is not whole"):
        trainer.resume(tmp_path)
    assert_bits_equal(weights(trainer), states[2], "nothing was loaded")


def test_a_step_is_kept_though_newer_ones_are_damaged(tmp_path: Path) -> None:
    trainer = trainer_of("local", optimizer=sgd)
    for _ in range(4):
        trainer.save(train(trainer, 1) and tmp_path, keep=4)
    for newer in ("step-000000003", "step-000000004"):
        (tmp_path / newer / "run.pt").write_bytes(b"")
    again = trainer_of("local", optimizer=sgd)
    with pytest.warns(UserWarning, match="is not whole"):
        again.resume(tmp_path)
    assert again.steps == 2
    again.save(train(again, 1) and tmp_path, keep=1)
    with pytest.warns(UserWarning, match="000000004 is not whole"):
        trainer.resume(tmp_path)
    assert trainer.steps == 3


def test_what_cannot_be_pickled_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    trainer = train(trainer_of("local", optimizer=sgd), 1)
    with pytest.raises(DecouplingError, match=r"000000001 was not saved:.*extra= can be pickled"):
        trainer.save(tmp_path, extra=lambda: None)
    assert not list(tmp_path.iterdir())


def test_other_plans_models_and_unwritable_folders_are_refused(tmp_path: Path) -> None:
    train(trainer_of("local", optimizer=sgd), 1).save(tmp_path)
    other = trainer_of("linear", optimizer=sgd)
    before = weights(other)
    with pytest.raises(DecouplingError, match="saved with another plan"):
        other.resume(tmp_path)
    with pytest.raises(DecouplingError, match="another plan"):
        trainer_of("local", SKIPS).resume(tmp_path)
    assert_bits_equal(weights(other), before, "refused")
    with pytest.raises(DecouplingError, match="keep= is a number of saved steps"):
        other.save(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DecouplingError, match="was not saved"):
        other.save(tmp_path / "file")


SCRIPT = """
import sys, torch
from tests.helpers.optimisers import adam
from tests.helpers.training import train, trainer_of, record
folder, store = sys.argv[1:]
trainer = trainer_of("linear", optimizer=adam, resident=1, store=store)
trainer.resume(folder)
while trainer.steps < 40:
    train(trainer, 1)
    trainer.save(folder)
    print(trainer.steps, flush=True)
trainer.gather()
torch.save(record(trainer), folder + "/result.pt")
"""


END = """
import sys
from dni_fx.residency.residency import Residency
from tests.helpers.training import train, trainer_of
trainer = train(trainer_of("local", resident=1, store=sys.argv[1]), 2)
Residency._come = None
"""


def test_the_end_of_a_process_brings_nothing_into_memory_and_removes_the_files(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", END, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_run_that_is_killed_again_and_again_comes_to_the_same_weights(tmp_path: Path) -> None:
    """At whatever moment: while a stage works, leaves, or is saved."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ends: list[int] = []

    def run(folder: str, seconds: float | None) -> None:
        command = [sys.executable, str(script), str(tmp_path / folder), str(tmp_path / "store")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        if seconds is not None:
            process.stdout.readline()  # it has begun
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        lines = process.communicate(timeout=300)[0].split()
        ends.append(process.returncode)
        assert seconds is not None or lines[-1:] == ["40"] or not lines

    for seconds in (0.05, 0.21):
        run("killed", seconds)
    run("killed", None)
    run("whole", None)
    assert ends[-2:] == [0, 0]
    assert -signal.SIGKILL in ends
    results = [torch.load(tmp_path / n / "result.pt") for n in ("killed", "whole")]
    assert_bits_equal(*results, "killed or not")
