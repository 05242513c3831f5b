"""Stages on several processes: started by torchrun, compared with one process, killed, stopped, and
closed.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ..helpers.comparing import assert_bits_equal
from ..helpers.processes import once, torchrun
from . import kit
from .scripts import whole
from .scripts.ranks import FOUR, TWO

FAILURES = [
    "raising_outside-0",
    "raising_in_with-1",
    "raising_inside-0",
    "not_finite-0",
    "fewer_steps-1",
    "killed-1",
    "killed_sharing-0",
    "stopped-1",
    "stopped_free-0",
    "stopped_sharing-1",
    "stopped_of_three-2",
]

ENDINGS = [
    "closed", "in_with", "unclosed", "unclosed_without_a_group", "dropped", "dropped_at_the_end",
    "failed_and_caught", "raises", "raises_in_a_module", "exits", "one_leaves", "several",
    "control",
]  # fmt: skip


@pytest.fixture
def started(shared: Path) -> Any:
    """Starts processes once, whichever of pytest's workers asks first."""

    def start(name: str) -> Path:
        folder = shared / f"ranks-{name}"
        module = "tests.ranks.scripts."
        command = {
            "two": torchrun(2, f"{module}ranks", str(folder), *TWO),
            "four": torchrun(4, f"{module}ranks", str(folder), *FOUR),
            "failures": ["-m", f"{module}failures", str(folder), *FAILURES],
            "endings": ["-m", f"{module}endings", str(folder)],
        }[name]
        return once(folder, command)

    return start


def passed(folder: Path, case: str, world: int) -> None:
    for rank in range(world):
        path = folder / f"rank{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        output = (folder / "output.txt").read_text()[-3000:]
        assert case in results, f"rank {rank} did not get to it\n{output}"
        assert results[case][0] == "", f"rank {rank}: {results[case][0]}"


@pytest.mark.parametrize("case", TWO)
def test_two_ranks(case: str, started: Any) -> None:
    passed(started("two"), case, 2)


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks(case: str, started: Any) -> None:
    passed(started("four"), case, 4)


@pytest.mark.parametrize("name", ["two", "four", "failures"])
def test_processes_end_by_themselves(name: str, started: Any) -> None:
    folder = started(name)
    ended, output = (
        json.loads((folder / "ended.json").read_text()),
        (folder / "output.txt").read_text(),
    )
    assert ended == {"code": 0, "left": 0}, output


def test_a_script_is_the_same_without_a_process_group(started: Any) -> None:
    alone = whole.alone()
    plain = kit.weights(kit.train(kit.trainer_of("each:linear", alone=True), 6))
    assert_bits_equal(alone, plain, "one process without a group")
    assert_bits_equal(torch.load(started("two") / "weights.pt"), alone, "two processes")


def failure(started: Any, case: str) -> tuple[list[Any], list[str]]:
    """Exit codes, None for a process that hung, and what was printed at the end."""
    folder = started("failures")
    path = folder / "failures.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    assert case in results, (folder / "output.txt").read_text()
    found = results[case]
    return found["codes"], [re.sub(r"(?s).*^ENDED ", "", o, flags=re.M) for o in found["outputs"]]


@pytest.mark.parametrize("case", [c for c in FAILURES if c.startswith("raising")])
def test_a_rank_that_raises_ends_all(case: str, started: Any) -> None:
    who = int(case[-1])
    codes, outputs = failure(started, case)
    assert codes == [1, 1], outputs
    assert "broke" in outputs[who]
    assert outputs[1 - who].startswith(f"ParallelError: rank {who} "), outputs
    if case != "raising_outside-0":  # else the process is gone without a word
        assert "broke" in outputs[1 - who]


def test_what_is_not_finite_ends_all(started: Any) -> None:
    codes, outputs = failure(started, "not_finite-0")
    assert codes == [1, 1], outputs
    assert re.match(
        r"NonFiniteError: stage_\d, step 11: .* is NaN; this stage was not updated", outputs[0]
    )
    assert re.match(
        r"(NonFiniteError: stage_\d|ParallelError: rank 0 failed: NonFiniteError)", outputs[1]
    )


def test_a_rank_that_makes_fewer_steps_is_noticed(started: Any) -> None:
    codes, outputs = failure(started, "fewer_steps-1")
    assert codes == [1, 1], outputs
    assert "made fewer steps" in outputs[0]
    assert re.match(r"ParallelError: rank 0 failed: .*made fewer steps", outputs[1])


@pytest.mark.parametrize("case", ["killed-1", "killed_sharing-0"])
def test_a_rank_that_is_killed_is_named(case: str, started: Any) -> None:
    who = int(case[-1])
    codes, outputs = failure(started, case)
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 1, outputs
    assert outputs[1 - who].startswith("ParallelError: "), outputs
    assert f"rank {who} " in outputs[1 - who], outputs


@pytest.mark.parametrize("case", ["stopped-1", "stopped_free-0", "stopped_sharing-1"])
def test_a_rank_that_is_stopped_is_named(case: str, started: Any) -> None:
    who = int(case[-1])
    codes, outputs = failure(started, case)
    assert codes[1 - who] == 1, outputs
    assert outputs[1 - who].startswith("ParallelError: "), outputs
    assert f"rank {who} " in outputs[1 - who], outputs


def test_a_rank_that_is_stopped_is_named_by_all_others(started: Any) -> None:
    """One of them hears of it from the other, whose connections are closed by then."""
    codes, outputs = failure(started, "stopped_of_three-2")
    assert codes == [1, 1, None], outputs
    assert all("rank 2 has shown no sign of life" in output for output in outputs[:2]), outputs


@pytest.mark.parametrize("case", ENDINGS)
def test_no_way_to_end_a_script_aborts(case: str, started: Any) -> None:
    """Nor does it hang, or leave a process; the control, a thread that waits in torch, aborts."""
    found = json.loads((started("endings") / "endings.json").read_text())
    assert found.keys() == set(ENDINGS)
    codes, outputs, orphans, expected = found[case]
    assert codes == expected, "\n".join(outputs)
    assert orphans == 0
    assert ("terminate called" in outputs[0]) == (case == "control")
