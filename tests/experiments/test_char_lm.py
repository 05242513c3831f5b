"""The language model of characters: its data, its experiment, its table."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ..helpers.paths import EXPERIMENTS
from .kit import run_experiment
from .records import rows
from .recurrent import language, through_time

experiment, data = sys.modules["experiment"], sys.modules["data"]  # as the experiments import them


SMALL_TEXT = ["--width", "8", "--embedding", "4", "--batch", "4", "--steps", "6", "--seeds", "0"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A short text with a rule to it."""
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat; " * 200, encoding="utf-8")
    return path


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
    done = run_experiment("paper_char_lm", cwd=tmp_path, DNI_FX_DATA=str(tmp_path))
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
        ("T = 3", "bptt"),
        ("T = 9", "bptt"),
        ("T = 3", "dni"),
        ("T = 3", "dni+aux"),
        ("T = 3", "stale"),
    ]
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
    done = run_experiment(
        "paper_char_lm", *arguments, "--out", str(out), cwd=tmp_path, **dict(os.environ)
    )
    assert done.returncode == 0, done.stderr  # finished runs need no text
    assert EXPERIMENTS.exists()
