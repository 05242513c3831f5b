"""The two-clocks experiment: what it asks, when its networks update, and what its table says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .kit import run_experiment
from .records import interrupted, load, records_in, rows

Record = dict[str, Any]

clocks = load("paper_two_clocks")
data = sys.modules["data"]  # as the experiment imports it

SMALL = [
    "--data-set",
    "digits",
    "--ticks",
    "2",
    "--width",
    "8",
    "--batch",
    "4",
    "--steps",
    "3",
    "--seeds",
    "0",
]


def sequences(ticks: int = 3, batch: int = 50, seed: int = 0) -> Any:
    """Of digits that are one pixel, which says what they are."""
    labels = torch.arange(10)
    images = labels[:, None, None, None].float()
    return clocks.make_sequences(images, labels, ticks, batch, torch.Generator().manual_seed(seed))


def settings(method: str, **more: Any) -> Record:
    arguments = clocks.parse_arguments([*SMALL, "--methods", method])
    return {**clocks.make_settings(arguments, method, 1e-3), **more}


# ---- the task ------------------------------------------------------------------------------------


def test_what_is_to_be_counted() -> None:
    found = sequences()
    assert found.x.shape == (9, 50, 1)
    digits = found.x[..., 0].long()
    for window in range(3):
        seen = digits[3 * window : 3 * window + 3]
        assert torch.equal(found.odd[window], (seen % 2).sum(0))
        assert torch.equal(found.threes_of_each[window], (seen == 3).sum(0))
    assert torch.equal(found.threes, (digits == 3).sum(0))
    assert found.threes.max() > 1


def test_sequences_are_drawn_by_the_generator_alone() -> None:
    assert torch.equal(sequences().x, sequences().x)
    assert not torch.equal(sequences().x, sequences(seed=1).x)


def test_errors_are_those_of_the_reports() -> None:
    """Networks that know the digits are never wrong; those that always say none are as often as
    there is one.
    """

    class Knows(torch.nn.Module):
        def forward(self, x: torch.Tensor, state: Any) -> tuple[Any, Any]:
            seen = x[..., 0].long()
            odd = torch.nn.functional.one_hot((seen % 2).sum(0), 4).float()
            return {"odd": 50 * odd, "message": (seen == 3).sum(0)[:, None].float()}, None

    class Adds(torch.nn.Module):
        def forward(self, messages: torch.Tensor, state: Any) -> tuple[Any, Any]:
            return 50 * torch.nn.functional.one_hot(messages.sum(0)[:, 0].long(), 10).float(), None

    class None_(torch.nn.Module):
        def forward(self, messages: torch.Tensor, state: Any) -> tuple[Any, Any]:
            return torch.eye(10)[torch.zeros(messages.shape[1], dtype=torch.int64)], None

    test = sequences()
    known = clocks.measure(Knows(), Adds(), test, 3)
    assert known["odd"] == known["threes"] == 0.0
    assert known["threes_loss"] < 1e-6
    ignorant = clocks.measure(Knows(), None_(), test, 3)
    assert ignorant["threes"] == pytest.approx(100 * (test.threes > 0).double().mean().item())


# ---- the networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(clocks.METHODS))
def test_how_often_the_networks_update(method: str) -> None:
    """Locked, both do so once in T x T ticks; else A does so every T ticks."""
    torch.manual_seed(0)
    updates: dict[str, int] = {}
    fast, slow = clocks.Fast(1, 8, 3), clocks.Slow(8, 3)
    collection = clocks.make_collection(fast, slow, settings(method, ticks=3), updates)
    for seed in range(2):
        clocks.train_on(collection, sequences(seed=seed), 3)
    assert updates == {"A": 2 if method == "locked" else 6, "B": 2}
    assert collection.now == 0


def test_the_message_learns_unless_there_is_no_gradient() -> None:
    moved = {}
    for method in clocks.METHODS:
        torch.manual_seed(0)
        fast, slow = clocks.Fast(1, 8, 3), clocks.Slow(8, 3)
        collection = clocks.make_collection(fast, slow, settings(method, ticks=3), {})
        before = fast.message[0].weight.detach().clone()
        for seed in range(3):
            clocks.train_on(collection, sequences(seed=seed), 3)
        moved[method] = not torch.equal(fast.message[0].weight, before)
    assert moved == {method: method != "zero" for method in clocks.METHODS}


def test_the_cosine_is_that_of_the_message() -> None:
    collection = clocks.make_collection(
        clocks.Fast(1, 8, 3), clocks.Slow(8, 3), settings("cdni", ticks=3), {}
    )
    found = [clocks.train_on(collection, sequences(batch=20, seed=seed), 3) for seed in range(4)]
    assert found[0] is None  # a source starts at zero
    assert all(-1 <= cosine <= 1 for cosine in found[2:])


# ---- the experiment ------------------------------------------------------------------------------


def test_an_interrupted_experiment_goes_on_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    arguments = [*SMALL, "--methods", "locked", "dni", "zero"]
    assert clocks.main([*arguments, "--out", str(whole)]) == 0
    expected = rows(capsys.readouterr().out)
    with monkeypatch.context() as patched:
        patched.setattr(clocks, "run_one", interrupted(clocks.run_one, at_run=2, at_step=1))
        assert clocks.main([*arguments, "--out", str(parts)]) == 130
    assert len(records_in(parts)) == 1
    assert clocks.main([*arguments, "--out", str(parts)]) == 0
    assert records_in(parts) == records_in(whole)
    assert whole.with_suffix(".png").stat().st_size > 10_000
    again = rows(capsys.readouterr().out)
    for row in (*expected, *again):
        del row["CPU seconds"]
    assert again == expected


def test_the_table_says_what_the_records_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.json"
    assert clocks.main([*SMALL, "--methods", "locked", "cdni", "--out", str(path)]) == 0
    records = records_in(path)
    for record, row in zip(records, rows(capsys.readouterr().out), strict=True):
        assert row["method"] == record["method"]
        assert row["setting"] == "T = 2, learning rate 0.0003"
        assert row["threes (B): error, %"].startswith(f"{record['threes']:.2f}")
        assert row["odd digits (A): error, %"].startswith(f"{record['odd']:.2f}")
        assert row["ticks"] == "12"
        assert (row["updates of A"], row["of B"]) == (
            ("3", "3") if record["method"] == "locked" else ("6", "3")
        )
        assert record["curve"]["ticks"] == [4, 8, 12]
    assert [r["synthesizer_parameters"] > 0 for r in records] == [False, True]


def test_when_an_error_was_reached() -> None:
    record = {"curve": {"ticks": [4, 8, 12], "threes": [50.0, 10.0, 30.0]}}
    assert clocks.ticks_until(record, "threes", 20.0) == 8
    assert clocks.ticks_until(record, "threes", 5.0) is None


def test_a_run_that_diverges_ends_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    assert clocks.main([*SMALL, "--methods", "locked", "--lr", "1e30", "--out", str(path)]) == 0
    (record,) = records_in(path)
    assert record["diverged"] in (2, 3)
    assert f"diverged at step {record['diverged']}" in capsys.readouterr().out


def test_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        clocks.parse_arguments(["--ticks", "0"])
    assert "--ticks must be at least 1" in capsys.readouterr().err


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    result = run_experiment(
        "paper_two_clocks", *SMALL, "--methods", "dni", "--out", str(out), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "errors over ticks and updates" in result.stdout
