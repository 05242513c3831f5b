"""The recurrent experiments: their tasks ask what they should, lengths grow as they are solved,
tables say it all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ..helpers.paths import EXAMPLES
from .test_examples import run_example
from .test_experiments import interrupted, load, records_in, rows

Record = dict[str, Any]

copying, language = load("paper_copy"), load("paper_char_lm")
experiment, data = sys.modules["experiment"], sys.modules["data"]  # as the experiments import them

through_time = pytest.mark.skipif(
    importlib.util.find_spec("dni_fx.recurrent") is None,
    reason="recurrent models came after the first version",
)
SMALL_COPY = ["--width", "8", "--batch", "4", "--steps", "6", "--seeds", "0"]
SMALL_TEXT = ["--width", "8", "--embedding", "4", "--batch", "4", "--steps", "6", "--seeds", "0"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A short text with a rule to it."""
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat; " * 200, encoding="utf-8")
    return path


# ---- copy and repeat copy ------------------------------------------------------------------------


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


# ---- characters ----------------------------------------------------------------------------------


def test_streams_are_contiguous_and_windows_follow_each_other() -> None:
    text = torch.arange(43)
    side_by_side = language.streams(text, 4)
    assert side_by_side.tolist() == [[step, step + 10, step + 20, step + 30] for step in range(10)]
    drawn = language.windows(text, 4, 3)
    seen = [next(drawn) for _ in range(7)]
    assert [ends for _, _, ends in seen] == [False, False, True] * 2 + [False]
    assert [x[:, 1].tolist() for x, _, _ in seen[:4]] == [
        [10, 11, 12],
        [13, 14, 15],
        [16, 17, 18],
        [10, 11, 12],
    ]
    assert all(torch.equal(y, x + 1) for x, y, _ in seen)
    with pytest.raises(data.DataError, match="too few for 4 streams and windows of 10"):
        next(language.windows(text, 4, 10))


def test_the_evaluation_carries_the_state() -> None:
    torch.manual_seed(0)
    model = language.CharacterModel(5, 8, 4).train()
    text = torch.randint(0, 5, (language.STREAMS * 450 + 3,))
    found = language.bits_per_character(model, text)
    assert model.training
    side_by_side = language.streams(text, language.STREAMS)
    whole = F.cross_entropy(model(side_by_side[:-1]).flatten(0, 1), side_by_side[1:].flatten())
    assert found == pytest.approx(whole.item() / math.log(2), rel=1e-5)


def test_a_model_that_knows_nothing_needs_all_bits_of_a_character() -> None:
    model = language.CharacterModel(8, 4, 4)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    assert language.bits_per_character(model, torch.randint(0, 8, (500,))) == pytest.approx(3.0)


def test_a_text_is_split_in_three_parts(book: Path) -> None:
    text = language.load_text(book, None)
    symbols = sorted(set(book.read_text()))
    parts = ["".join(symbols[code] for code in part) for part in text[:3]]
    assert [len(part) for part in parts] == [4320, 240, 240]
    assert "".join(parts) == book.read_text()
    assert text.symbols == len(symbols)
    assert [len(part) for part in language.load_text(book, None, limit=250)[:3]] == [250, 240, 240]


def test_the_treebank_at_character_level() -> None:
    assert language.as_characters(" no it was n't \n aer <unk> \n") == "no_it_was_n't\naer_<unk>\n"


def test_the_treebank_has_the_published_size() -> None:
    try:
        folder = language.find_treebank(None)
    except data.DataError:
        pytest.skip(
            f"the Penn Treebank is not on this machine: neither {data.DATA_VARIABLE} nor "
            "../shared/data"
        )
    text = language.load_text(None, folder)
    assert [len(part) for part in text[:3]] == [5_017_482, 393_042, 442_423]
    assert text.symbols == 50


def test_a_missing_text_is_an_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "runs.json")]
    assert language.main(["--data", str(tmp_path), *out]) == 1
    assert f"no Penn Treebank in {tmp_path}." in (said := capsys.readouterr().err)
    assert all(
        part in said for part in ("ptb.train.txt", "--data", data.DATA_VARIABLE, "--text FILE")
    )
    (tmp_path / "ptb.train.txt").write_text("something else\n")
    assert language.main(["--data", str(tmp_path), *out]) == 1
    assert "ptb.train.txt is not the published file" in capsys.readouterr().err
    assert language.main(["--text", str(tmp_path / "none.txt"), *out]) == 1
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("short")
    assert language.main(["--text", str(tmp_path / "short.txt"), *out]) == 1
    assert "too short: 5 characters" in capsys.readouterr().err


def test_environment_names_the_treebank(tmp_path: Path) -> None:
    done = run_example("paper_char_lm", cwd=tmp_path, DNI_FX_DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"no Penn Treebank in {tmp_path} (from DNI_FX_DATA)" in done.stderr
    assert "Traceback" not in done.stderr


def test_equal_steps_or_equal_characters() -> None:
    by_window = {}
    for arguments in (["--steps", "1000"], ["--characters", "256000"], []):
        runs = language.make_runs(
            language.parse_arguments([*arguments, "--batch", "16", "--seeds", "0"])
        )
        assert [(r["method"], r["setting"]) for r in runs] == [
            ("bptt", "T = 8"), ("bptt", "T = 40"), ("dni", "T = 8"), ("dni+aux", "T = 8"),
        ]  # fmt: skip
        by_window[tuple(arguments)] = {
            r["settings"]["window"]: r["settings"]["steps"] for r in runs
        }
    assert list(by_window.values()) == [
        {8: 1000, 40: 1000},
        {8: 2000, 40: 400},
        {8: 10_000, 40: 10_000},
    ]
    with pytest.raises(SystemExit):
        language.parse_arguments(["--steps", "10", "--characters", "10"])


def test_memory_kept_for_the_backward_pass_grows_with_the_window() -> None:
    model = language.CharacterModel(20, 32, 8)

    def kept(window: int) -> int:
        x = torch.randint(0, 20, (window, 4))
        return language.kept_for_backward(
            lambda: language.cross_entropy(model(x), x).backward(), list(model.parameters())
        )

    weight = torch.randn(100, 100, requires_grad=True)
    value = torch.randn(100, 7)
    once = language.kept_for_backward(
        lambda: (weight @ value + weight @ value).sum().backward(), [weight]
    )
    assert once == value.numel() * 4  # once, and the weight not at all
    at = {window: kept(window) for window in (8, 16, 32)}
    assert at[32] - at[16] == pytest.approx(2 * (at[16] - at[8]), rel=0.05)
    assert at[8] > 8 * 4 * (32 + 20) * 4  # hidden states and logits at least


@through_time
def test_every_method_reads(tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.json"
    arguments = [*SMALL_TEXT, "--text", str(book), "--windows", "3", "--bptt-windows", "3", "9"]
    arguments += ["--methods", *language.METHODS]
    assert language.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert output.startswith("Every run: 6 steps.")
    printed = rows(output)
    assert [(row["setting"], row["method"]) for row in printed] == [
        ("T = 3", "bptt"), ("T = 9", "bptt"), ("T = 3", "dni"), ("T = 3", "dni+aux"), ("T = 3", "stale"),
    ]  # fmt: skip
    records = json.loads(out.read_text())
    for record, row in zip(records, printed, strict=True):
        assert record["characters"] == 6 * 4 * record["settings"]["window"]
        assert record["valid"] == min(record["curve"]["valid"])
        assert row["test, bits per character"] == f"{record['test']:.3f} ({record['test']:.3f})"
        assert 0 < record["test"] < 6
        assert record["diverged"] is None
        assert (record["synthesizer_parameters"] > 0) == record["method"].startswith("dni")
    assert records[1]["kept_bytes"] > records[0]["kept_bytes"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@through_time
def test_test_figures_are_those_of_the_best_validation(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = language.bits_per_character, []

    def measuring(model: Any, text: torch.Tensor) -> float:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return [0.5, 0.25, 0.75, measure(model, text)][min(len(seen) - 1, 3)]

    monkeypatch.setattr(language, "bits_per_character", measuring)
    arguments = [
        *SMALL_TEXT,
        "--text",
        str(book),
        "--methods",
        "bptt",
        "--bptt-windows",
        "8",
        "--measure-every",
        "2",
    ]
    assert language.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 0
    assert len(seen) == 4
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[3].items())
    assert not all(torch.equal(value, seen[2][name]) for name, value in seen[3].items())


@through_time
def test_a_language_model_learns_from_a_text(tmp_path: Path, book: Path) -> None:
    out = tmp_path / "runs.json"
    arguments = [
        "--text",
        str(book),
        "--width",
        "32",
        "--batch",
        "8",
        "--lr",
        "1e-2",
        "--steps",
        "150",
        "--seeds",
        "0",
    ]
    arguments += ["--methods", "dni", "--windows", "4"]
    assert language.main([*arguments, "--out", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert record["test"] < 0.7  # the text repeats itself
    assert record["curve"]["valid"][0] > 2 * record["test"]
    done = run_example(
        "paper_char_lm", *arguments, "--out", str(out), cwd=tmp_path, **dict(os.environ)
    )
    assert done.returncode == 0, done.stderr  # finished runs need no text
    assert EXAMPLES.exists()
