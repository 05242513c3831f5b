"""Stages on several processes: started by torchrun, compared with one process, killed, stopped, and
closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dni_fx
from dni_fx import distributed
from dni_fx.errors import DecouplingError
from dni_fx.graphs.nested import flatten
from dni_fx.parallel.mailbox import Address, Letter
from dni_fx.parallel.placement import Places, join, place_stages
from dni_fx.parallel.serialization import ALIGNMENT, pack, unpack

from ..helpers.comparing import assert_bits_equal, same_bits
from .scripts import ranks

SCRIPTS = Path(__file__).parent / "scripts"
LIMIT = 150  # seconds for one start of processes

TWO = [
    "exact",
    "no_staleness",
    "options",
    "synthetic_inputs_and_exact_steps",
    "interleaved",
    "shared",
    "control",
    "repeats",
    "lengths",
    "free_running",
    "free_running_on_synthetic_inputs",
    "free_running_with_schedules",
    "dropping",
    "waiting_while_dropping",
    "whole_model",
    "evaluating_between_steps",
    "channels_last",
    "refused",
    "refused_buffers",
    "after_the_end",
    "quiet_after_the_end",
    "plans",
    "same_script",
    "data_parallel_around_a_drop_in",
]
FOUR = ["four_ranks_equal_one", "four_ranks_run_free", "four_ranks_need_four_stages"]
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


def start(command: list[str], folder: Path) -> None:
    """Run processes to their end; when the time is up, end the whole group of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT)
        finally:
            left = alive(process.pid)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    (folder / "ended.json").write_text(json.dumps({"code": process.returncode, "left": len(left)}))


def alive(session: int) -> list[int]:
    """Processes of a session, which all that a command starts belong to, that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts processes once, whichever of pytest's workers asks first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str) -> Path:
        folder: Path = base / f"distributed-{name}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ended.json").exists():
                torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
                script = [str(SCRIPTS / "ranks.py"), str(folder)]
                start(
                    {
                        "two": [*torchrun, "2", *script, *TWO],
                        "four": [*torchrun, "4", *script, *FOUR],
                        "failures": [str(SCRIPTS / "failures.py"), str(folder), *FAILURES],
                        "endings": [str(SCRIPTS / "endings.py"), str(folder)],
                    }[name],
                    folder,
                )
        return folder

    return once


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
    alone = ranks.alone()
    plain = ranks.weights(ranks.train(ranks.trainer_of("each:linear", alone=True), 6))
    assert_bits_equal(alone, plain, "one process without a group")
    assert_bits_equal(torch.load(started("two") / "weights.pt"), alone, "two processes")


# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
LAYOUTS = ["plain", "transposed", "strided", "expanded", "slice", "channels_last", "flipped"]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = (torch.randn(shape, generator=generator) * 100).to(dtype)
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    elif layout == "expanded":
        tensor = tensor[None].expand(draw(st.integers(1, 40)), *tensor.shape)
    elif layout == "slice" and tensor.dim():
        tensor = tensor[..., 1:2]
    elif layout == "channels_last" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "flipped" and dtype == torch.complex64:
        tensor = tensor.conj()
    return tensor.requires_grad_(tensor.is_floating_point() and draw(st.booleans()))


CONSTANTS = st.none() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
NESTED = st.recursive(
    tensors() | CONSTANTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_letters_arrive_as_they_were(value: Any) -> None:
    buffer = pack(value)
    assert buffer.dtype == torch.uint8
    assert buffer.numel() % ALIGNMENT == 0
    longer = torch.cat(
        [buffer, torch.full((1000,), 255, dtype=torch.uint8)]
    )  # a posted receive may be longer
    for arrived in (unpack(buffer), unpack(longer)):
        left, structure = flatten(value)
        right, other = flatten(arrived)
        assert structure == other
        for a, b in zip(left, right, strict=True):
            assert same_bits(b, a.detach().resolve_conj())
            assert not b.requires_grad
            if a.numel() > 1 and not any(s == 0 for s in a.stride()) and a.is_contiguous():
                assert b.stride() == a.stride()


def test_letters_keep_the_order_of_memory_and_share_none() -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    wide, row = torch.randn(6, 1).expand(6, 1000), torch.randn(100, 100)[:, 3]
    back = unpack(pack({"image": image, "wide": wide, "row": row}))
    assert back["image"].is_contiguous(memory_format=torch.channels_last)
    assert pack(wide).numel() < 1000
    assert pack(row).numel() < 2000
    for name, tensor in {"image": image, "wide": wide, "row": row}.items():
        assert torch.equal(back[name], tensor)
        assert back[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    before = image.clone()
    image.zero_()
    assert torch.equal(back["image"], before)


# --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_divided_and_put_together(data: st.DataObject) -> None:
    """Whoever sends and takes: each taker gets its own rows, once, in order."""
    groups = [
        data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        for _ in range(2)
    ]
    size = data.draw(st.integers(max(map(len, groups)), 12))
    places = Places(tuple(map(tuple, groups)), {7: size})
    whole = torch.arange(size * 2.0).view(size, 2)
    arrived: dict[int, dict[int, Any]] = {}
    for rank in groups[0]:
        first, end = places.rows(0, rank, size)
        letter = Letter(7, {"v": whole[first:end], "n": None})
        for taker, part, payload in places.divide(0, 1, rank, letter):
            assert part.place not in arrived.setdefault(taker, {})
            arrived[taker][part.place] = (part, payload)
    assert arrived.keys() == set(groups[1])
    for taker, parts in arrived.items():
        assert {p.total for p, _ in parts.values()} == {len(parts)}
        first, end = places.rows(1, taker, size)
        found = join([parts[place] for place in sorted(parts)], add=True)
        assert torch.equal(found["v"], whole[first:end])
        assert found["n"] is None


def test_by_default_every_rank_has_as_many_stages() -> None:
    names = [f"stage_{k}" for k in range(7)]
    assert place_stages(None, names, 3).ranks == ((0,), (0,), (0,), (1,), (1,), (2,), (2,))
    assert place_stages(dict.fromkeys(names, 0), names, 1).ranks == ((0,),) * 7
    assert place_stages([0, [1, 0], 1, 1, 0, 0, (0, 1)], names, 2).divided == [1, 6]


# --------------------------------------------------------------------------------------------- in o


def alone(**options: Any) -> Any:
    return ranks.trainer_of("linear", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue must be a whole number"),
        ({"policy": "drop"}, "policy must be 'wait' or 'drop_oldest'"),
        ({"staleness": 1, "policy": "drop_oldest"}, "needs policy='wait'"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ({"timeout": "1"}, "timeout must be a positive number"),
        ({"schedule": "threads"}, "schedules.Threads is for dni_fx.Trainer"),
        ({"schedule": "thread"}, "unknown schedule"),
        ({"placement": [0, 0]}, "placement has 2 entries for 4 stages"),
        ({"placement": [0, 0, 0, 1]}, "there are ranks 0 to 0"),
        ({"placement": [0, 0, 0, True]}, "names rank True"),
        ({"placement": [0, 0, 0, []]}, "at least one rank for each stage"),
        ({"placement": {"stage_0": 0}}, "leaves out"),
        ({"placement": {"stage0": 0}}, "did you mean"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecouplingError, match=re.escape(message)):
        ranks.train(alone(**options), 1)


@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_one_process_trains_alone(staleness: int | None, tmp_path: Path) -> None:
    with alone(staleness=staleness) as trainer:
        ranks.train(trainer, 9)
        x, _ = ranks.batch(0)
        assert torch.equal(trainer.evaluate(x), trainer.decoupled.model(x))
        assert trainer.gather().keys() == trainer.decoupled.model.state_dict().keys()
        assert "stage_3" in str(trainer.status())
        trainer.save_timeline(tmp_path / "timeline.json")
        assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
        assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]
        assert trainer.mean(float("nan")) != trainer.mean(1.0) == 1.0
    trainer.close()


WHOLE = ["diagnose", "diagnose_parameters", "true_gradients", "state_dict", "load_state_dict"]


@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_the_whole_model_is_not_offered(name: str) -> None:
    """No process has the other stages' weights of now, so it can neither measure nor save them."""
    assert callable(getattr(alone(alone=True), name))
    assert not hasattr(alone(), name)


def test_a_plan_needs_no_group() -> None:
    model, x = ranks.built(ranks.Skips, torch.float32), ranks.batch(0)[0]
    decoupled = distributed.decouple(model, ["a"], example_inputs=(x,), gradients="zero")
    assert isinstance(decoupled, dni_fx.Decoupled)
    assert distributed.start() == 0


def test_addresses_and_letters_travel() -> None:
    letter = (tuple(Address("value", 1, 2)), 3, (0, 1, 0), {"h": torch.ones(2)})
    address, step, part, payload = unpack(pack(letter))
    assert Address(*address) == Address("value", 1, 2)
    assert (step, part) == (3, (0, 1, 0))
    assert torch.equal(payload["h"], torch.ones(2))
