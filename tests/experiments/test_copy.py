"""Copy and repeat copy: the tasks ask what they should, lengths grow as they are solved, tables say
it all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from .records import interrupted, records_in, rows
from .recurrent import copying, through_time

SMALL_COPY = ["--width", "8", "--batch", "4", "--steps", "6", "--seeds", "0"]


def test_copy_asks_for_the_patterns_after_the_end_flag() -> None:
    x, target = copying.make_batch("copy", 3, 1, 5, torch.Generator().manual_seed(0))
    assert x.shape == (8, 5, 10)
    assert target.shape == (8, 5, 8)
    flags = torch.zeros(8, 5, 2)
    flags[0, :, 0] = flags[4, :, 1] = 1.0
    assert torch.equal(x[..., 8:], flags)
    assert not x[0, :, :8].any()
    assert not x[4:, :, :8].any()  # nothing is shown while it is asked for
    assert torch.equal(target[5:], x[1:4, :, :8])
    assert (target[:5] == copying.NOT_ASKED).all()
    assert 0.3 < x[1:4, :, :8].mean() < 0.7
    assert copying.bits_to_reproduce(target) == 3 * 5 * 8


def test_repeat_copy_asks_for_all_repeats_and_a_marker() -> None:
    x, target = copying.make_batch("repeat-copy", 2, 3, 5, torch.Generator().manual_seed(0))
    curriculum = copying.Curriculum("repeat-copy", patterns=2, repeats=3)
    assert len(x) == len(target) == curriculum.length == 11
    assert (x.shape[2], target.shape[2]) == (10, 9)
    assert (x[3, :, 9] == 0.3).all()
    assert x[..., 9].count_nonzero() == x[..., 8].count_nonzero() == 5
    for repeat in range(3):
        assert torch.equal(target[4 + 2 * repeat : 6 + 2 * repeat, :, :8], x[1:3, :, :8])
    assert (target[4:10, :, 8] == 0).all()
    assert (target[10, :, 8] == 1).all()
    assert (target[10, :, :8] == copying.NOT_ASKED).all()
    assert (target[:4] == copying.NOT_ASKED).all()
    assert copying.bits_to_reproduce(target) == 3 * 2 * 5 * 8


def test_batches_follow_from_the_generator() -> None:
    one, again, other = (
        copying.make_batch("copy", 4, 1, 2, torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("task", copying.TASKS)
def test_a_perfect_answer_has_no_error_and_a_coin_one_bit(task: str) -> None:
    _, target = copying.make_batch(task, 4, 2 if task == "repeat-copy" else 1, 3)
    scale = math.log(2) * copying.bits_to_reproduce(target)
    perfect = 1000.0 * (target.clamp(min=0.0) - 0.5)
    perfect[target == copying.NOT_ASKED] = 123.0  # of no interest
    assert copying.summed_error(perfect, target).item() == 0.0
    coin = copying.summed_error(torch.zeros_like(target), target).item() / scale
    markers = (
        (target[..., 8:] != copying.NOT_ASKED).sum().item()
    )  # 9 of 64 bits for these 8 patterns
    assert coin == pytest.approx(1.0 + markers / copying.bits_to_reproduce(target))
    assert (markers == 0) == (task == "copy")


def test_a_window_that_asks_for_nothing_has_a_loss_of_zero_and_a_graph() -> None:
    x, target = copying.make_batch("copy", 4, 1, 2)
    model = copying.Memory(6, 8)
    loss = copying.summed_error(model(x[:3]), target[:3])
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_error_of_windows_is_that_of_the_sequence() -> None:
    _, target = copying.make_batch("repeat-copy", 3, 2, 4)
    output = torch.randn(target.shape)
    parts = zip(output.split(5), target.split(5), strict=True)
    summed = sum(copying.summed_error(*part) for part in parts)
    torch.testing.assert_close(summed, copying.summed_error(output, target))


def test_the_curriculum_goes_through_the_lengths_of_the_paper() -> None:
    copy = copying.Curriculum("copy")
    assert not copy.see(copying.THRESHOLD)
    assert not copy.see(math.nan)
    assert (copy.patterns, copy.solved) == (1, 0)
    assert all(copy.see(0.1) for _ in range(5))
    assert (copy.patterns, copy.repeats, copy.solved) == (6, 1, 5)
    repeat = copying.Curriculum("repeat-copy")
    seen = []
    for _ in range(15):
        assert repeat.see(0.0)
        seen.append(repeat.solved)
    assert seen == [5, 7, 9, 12, 15, 19, 23, 28, 33, 39, 45, 52, 59, 67, 75]
    assert (repeat.patterns, repeat.repeats) == (9, 8)  # to be solved next


def test_methods_differ_in_nothing_but_the_source_of_the_gradient() -> None:
    args = copying.parse_arguments(
        ["--methods", *copying.METHODS, "--synthesizer-lr", "0.5", "--factor", "0.3"]
    )
    runs = copying.make_runs(args)
    assert len(runs) == 2 * 2 * 4 * len(copying.METHODS)
    of_method = {r["method"]: r["settings"] for r in runs if r["setting"] == "copy, T = 3"}
    changed = {"gradients", "auxiliary", "factor", "synthesizer_optimizer"}
    common = [
        {k: v for k, v in settings.items() if k not in changed} for settings in of_method.values()
    ]
    assert all(settings == common[0] for settings in common)
    assert {m: s["gradients"] for m, s in of_method.items()} == {
        "bptt": "zero", "dni": "auto", "dni+aux": "auto", "stale": "stale", "full": "exact",
    }  # fmt: skip
    assert [m for m, s in of_method.items() if s.get("auxiliary")] == ["dni+aux"]
    assert of_method["dni"]["synthesizer_optimizer"] == {"name": "adam", "lr": 0.5}
    assert {s["factor"] for s in of_method.values() if "factor" in s} == {0.3}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--windows", "0"], "--windows must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--tasks", "sort"], "invalid choice"),
        (["--data", "somewhere"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_errors(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        copying.parse_arguments(arguments)
    assert complaint in capsys.readouterr().err


@through_time
@pytest.mark.parametrize("task", copying.TASKS)
def test_every_method_copies(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.json"
    arguments = [*SMALL_COPY, "--tasks", task, "--windows", "2", "3", "--methods", *copying.METHODS]
    assert copying.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    printed = rows(capsys.readouterr().out)
    assert [(row["setting"], row["method"]) for row in printed] == [
        (f"{task}, T = {window}", method) for window in (2, 3) for method in copying.METHODS
    ]
    assert {row["windows"] for row in printed} == {"6"}
    records = json.loads(out.read_text())
    time_steps = {"copy": {2: 12, 3: 12}, "repeat-copy": {2: 10, 3: 15}}[task]
    for record, row in zip(records, printed, strict=True):
        assert row["longest length solved"] == f"{record['solved']} ({record['solved']})"
        # Sequences of 4 or 5 steps, so the last window may be shorter.
        assert record["time_steps"] == time_steps[record["settings"]["window"]]
        assert record["diverged"] is None
        assert len(record["curve"]["solved"]) == len(record["curve"]["steps"]) == 6
        assert (record["synthesizer_parameters"] > 0) == record["method"].startswith("dni")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@through_time
def test_a_length_is_solved_when_a_batch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copying, "THRESHOLD", 2.0)  # any net will do
    out = tmp_path / "runs.json"
    arguments = ["--tasks", "copy", "--windows", "4", "--methods", "bptt", "--out", str(out)]
    assert copying.main([*SMALL_COPY, *arguments]) == 0
    (record,) = json.loads(out.read_text())
    # 1 + 2 + 2 windows of 4 for sequences of 4, 6 and 8 steps; the next has 10.
    assert record["levels"] == [[1, 1, 1], [3, 2, 1], [5, 3, 1]]
    assert record["curve"]["solved"] == [1, 1, 2, 2, 3, 3]
    assert record["curve"]["error"][1] is record["curve"]["error"][5] is None
    assert (record["solved"], record["sequences"], record["time_steps"]) == (3, 3, 4 + 6 + 8 + 4)
    (row,) = rows(capsys.readouterr().out)
    assert row["patterns x repeats"] == "3 x 1"
    assert float(row["error of the next, bits per bit"]) == pytest.approx(1.0, abs=0.2)


@through_time
def test_dni_learns_across_a_boundary_where_truncation_cannot(tmp_path: Path) -> None:
    """The flag to answer one pattern comes a window after it: without a gradient from there,
    nothing is remembered.
    """
    out = tmp_path / "runs.json"
    arguments = [
        "--tasks",
        "copy",
        "--windows",
        "2",
        "--methods",
        "bptt",
        "dni",
        "--width",
        "64",
        "--batch",
        "16",
    ]
    assert (
        copying.main(
            [*arguments, "--steps", "1500", "--seeds", "0", "--lr", "3e-3", "--out", str(out)]
        )
        == 0
    )
    errors = {r["method"]: r["curve"]["error"][-1] for r in json.loads(out.read_text())}
    assert errors["dni"] < errors["bptt"] - 0.1


@through_time
def test_an_interrupted_experiment_goes_on_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *SMALL_COPY,
        "--tasks",
        "copy",
        "--windows",
        "2",
        "--methods",
        "bptt",
        "dni",
        "dni+aux",
    ]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert copying.main([*arguments, "--out", str(whole)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(copying, "run_one", interrupted(copying.run_one, at_run=2, at_step=3))
        assert copying.main([*arguments, "--out", str(parts)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert records_in(parts) == records_in(whole)[:1]
    assert copying.main([*arguments, "--out", str(parts)]) == 0
    assert records_in(parts) == records_in(whole)
    assert len(records_in(whole)) == 3
    # Other settings are other runs.
    assert copying.main([*arguments, "--factor", "0.5", "--out", str(parts)]) == 0
    factors = [r["settings"].get("factor") for r in records_in(parts)]
    assert factors == [None, 0.1, 0.1, 0.5, 0.5]  # BPTT has none and was not made again


@through_time
def test_a_run_that_diverges_is_kept_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    arguments = [
        "--tasks",
        "copy",
        "--windows",
        "2",
        "--methods",
        "bptt",
        "--lr",
        "3e37",
        "--out",
        str(out),
    ]
    assert copying.main([*SMALL_COPY, *arguments]) == 0
    (record,) = json.loads(out.read_text())
    assert 1 < record["diverged"] <= 6
    (row,) = rows(capsys.readouterr().out)
    assert f"diverged at step {record['diverged']}" in row["longest length solved"]
