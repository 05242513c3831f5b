"""Each experiment on the paper's networks, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dni_fx

from .records import NARROW, Record, deep, feedforward, records_in, rows, sparse, tiny


@pytest.mark.parametrize("net", ["fcn", "cnn"])
@pytest.mark.parametrize("synthesizers", ["small", "paper"])
def test_the_paper_nets_train_by_every_method(
    tmp_path: Path,
    net: str,
    synthesizers: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(feedforward, "load_data", tiny)
    arguments = [
        "--net",
        net,
        "--data-set",
        "cifar10",
        "--width",
        "8",
        "--filters",
        "4",
        "--layers",
        "2",
    ]
    arguments += ["--steps", "2", "--batch", "16", "--seeds", "0", "--synthesizers", synthesizers]
    assert feedforward.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 0
    printed = rows(capsys.readouterr().out)
    assert [row["method"] for row in printed] == ["backprop", "dni", "cdni", "zero", "stale"]
    assert len({r["batches"] for r in records_in(tmp_path / "runs.json")}) == 1


def test_ablations_change_one_thing_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feedforward, "load_data", tiny)
    out = tmp_path / "runs.json"
    arguments = [
        "--ablate",
        "--net",
        "cnn",
        "--data-set",
        "cifar10",
        "--filters",
        "4",
        "--layers",
        "2",
        "--seeds",
        "0",
    ]
    assert feedforward.main([*arguments, "--steps", "2", "--batch", "16", "--out", str(out)]) == 0
    printed = {row["method"]: row for row in rows(capsys.readouterr().out)}
    assert list(printed) == ["backprop", *feedforward.VARIATIONS, "zero"]
    records = {r["method"]: r for r in records_in(out)}
    assert len({r["batches"] for r in records.values()}) == 1
    reference = records["cdni"]["settings"]
    for name in feedforward.VARIATIONS:
        settings = records[name]["settings"]
        changed = {k for k in reference if settings[k] != reference[k]}
        if name.startswith("cdni"):
            assert changed <= {"gradients"}
        elif name == "dni":
            assert changed == {"labels"}
        options, usual = settings["gradients"], reference["gradients"]
        ablation = feedforward.ABLATIONS[name.removeprefix("cdni").removeprefix("dni")]
        different = {k for k in {**options, **usual} if options.get(k) != usual.get(k)}
        assert different == {k for k, v in ablation.items() if usual.get(k) != v}
    parameters = [records[f"cdni-depth{depth}"]["synthesizer_parameters"] for depth in (0, 1, 2)]
    assert parameters == sorted(set(parameters))


def test_variations_are_what_they_are_called() -> None:
    spec = dni_fx.plan.TensorSpec((4, 6, 8, 8), torch.float32, 1)
    value, target = torch.randn(4, 6, 8, 8), 1e-4 * torch.randn(4, 6, 8, 8)
    usual = feedforward.VariedConv([spec])
    plain = dni_fx.sources.Conv([spec])
    plain.load_state_dict(usual.state_dict())
    raw, summed = (
        feedforward.VariedConv([spec], targets=targets) for targets in ("raw", "raw sum")
    )
    started = feedforward.VariedConv([spec], start="default", targets="raw")
    losses = {}
    for source in (usual, plain, raw, summed, started):
        prediction = source((value,))
        zero = not prediction.gradients[0].any()
        assert zero == (source is not started)
        losses[source] = source.fit(prediction, (target,)).item()
    assert losses[usual] == losses[plain] == pytest.approx(1.0)  # unit size
    assert losses[raw] == pytest.approx(target.square().mean().item())
    assert losses[summed] == pytest.approx(target.square().sum().item() / 4)
    assert usual.scale.item() == pytest.approx(target.square().mean().sqrt().item())
    assert raw.scale.item() == summed.scale.item() == 1.0
    # The start is PyTorch's own in size.
    last, own = started.networks[0].layers[-1], torch.nn.Conv2d(6, 6, 3)
    for mine, theirs in zip(last.parameters(), own.parameters(), strict=True):
        assert mine.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)


def test_layers_update_equally_often_whatever_the_probability() -> None:
    args = sparse.parse_arguments(["--updates", "3000", "--measure-every", "300"])
    runs = sparse.make_runs(args)
    assert {r["settings"]["probability"] for r in runs} == {0.05, 0.1, 0.2, 0.5, 1.0}
    for run in runs:
        settings = run["settings"]
        assert settings["steps"] * settings["probability"] == pytest.approx(3000)
        assert settings["measure_every"] * settings["probability"] == pytest.approx(300)
        if run["method"] in sparse.CONTROLS:
            assert settings["probability"] == 1
        else:
            assert settings["schedule"]["probability"] == settings["probability"]


def test_sparse_updates_are_as_many_as_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dni_fx.schedules", reason="schedules came after the first version")
    out = tmp_path / "runs.json"
    arguments = [
        "--data-set",
        "digits",
        "--width",
        "16",
        "--seeds",
        "0",
        "--updates",
        "30",
        "--limit",
        "256",
    ]
    arguments += [
        "--probabilities",
        "0.25",
        "1",
        "--methods",
        "cdni",
        "cdni + inputs",
        "backprop",
        "zero",
    ]
    assert sparse.main([*arguments, "--out", str(out)]) == 0
    printed = [(row["setting"], row["method"]) for row in rows(capsys.readouterr().out)]
    assert printed == [
        ("p = 1", "cdni"),
        ("p = 0.25", "cdni"),
        ("p = 1", "cdni + inputs"),
        ("p = 0.25", "cdni + inputs"),
        ("p = 1", "backprop"),
        ("p = 1", "zero"),
    ]
    for record in records_in(out):
        updates = record["updates"].values()
        if record["settings"]["probability"] == 1:
            assert set(updates) == {30}
        else:  # 120 draws with a deviation of 4.7
            assert all(abs(n - 30) < 20 for n in updates)
            assert len(set(updates)) > 1
    seen = {(r["settings"]["probability"], r["batches"]) for r in records_in(out)}
    assert len(seen) == 2  # the same batches for all methods at one probability
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def small_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, list[Record]]:
    """The deep experiment on random images with a narrow net."""
    monkeypatch.setattr(deep, "load_data", tiny)
    out = tmp_path / "runs.json"
    status = deep.main([*NARROW, "--batch", "16", "--steps", "4", "--out", str(out), *arguments])
    return status, records_in(out)


def test_every_deep_method_trains_on_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [name for name in ("critic", "delayed") if name not in dni_fx.sources.SOURCES]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in this version")
    pytest.importorskip("dni_fx.schedules", reason="schedules came after the first version")
    status, records = small_deep(tmp_path, monkeypatch, "--seeds", "0", "--methods", *deep.METHODS)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert [row["method"] for row in rows(printed.out)] == list(deep.METHODS)
    assert len({r["batches"] for r in records}) == 1
    assert all(r["diverged"] is None for r in records)
    cosines = {r["method"]: r["curve"]["cosines"]["layer2"][-1] for r in records}
    assert all(
        cosines[name] is not None for name in ("linear", "conv", "local", "corrected", "stale")
    )
    assert all(cosines[name] is None for name in ("backprop", "delayed", "feedback", "zero"))
    of_parameters = {r["method"]: r["curve"]["parameter_cosines"]["layer2"][-1] for r in records}
    assert all(of_parameters[name] is not None for name in ("linear", "conv", "local", "stale"))
    assert all(
        of_parameters[name] is None
        for name in ("backprop", "delayed", "feedback", "zero", "corrected")
    )


def test_batches_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, records = small_deep(
        tmp_path, monkeypatch, "--seeds", "0", "1", "--methods", "backprop", "linear", "zero"
    )
    assert status == 0
    seen = {(r["seed"], r["batches"]) for r in records}
    assert len(seen) == 2
    assert len({checksum for _, checksum in seen}) == 2


def test_augmentation_moves_and_flips_whole_images() -> None:
    images = tiny()
    plain = list(deep.augmented_batches(images, 40, 2, 7, "none"))
    assert sorted(y.item() for _, part in plain for y in part) == sorted(
        images.train_y.tolist()
    )  # one epoch
    flips = list(deep.augmented_batches(images, 40, 2, 7, "flip"))
    crops = list(deep.augmented_batches(images, 40, 2, 7, "crop+flip"))
    kinds = set()
    for (x, y), (flipped, y_flipped), (cropped, y_cropped) in zip(plain, flips, crops, strict=True):
        assert torch.equal(y, y_flipped)
        assert torch.equal(y, y_cropped)
        assert cropped.is_contiguous(memory_format=torch.channels_last)
        for one, two, three in zip(x, flipped, cropped, strict=True):
            kinds.add("same" if torch.equal(one, two) else "flipped")
            assert torch.equal(one, two) or torch.equal(one, two.flip(-1))
            padded = F.pad(one if torch.equal(one, two) else one.flip(-1), (4,) * 4)
            windows = [padded[:, i : i + 16, j : j + 16] for i in range(9) for j in range(9)]
            assert any(torch.equal(three, window) for window in windows)
    assert kinds == {"same", "flipped"}


def test_resnet_has_the_layers_it_is_named_for() -> None:
    for blocks in (1, 3):
        model = deep.resnet(blocks)
        weights = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert (
            len([m for m in weights if getattr(m, "kernel_size", (3, 3)) != (1, 1)])
            == 6 * blocks + 2
        )
        model.eval()
        stem = model.stem(torch.zeros(2, 3, 32, 32))
        assert stem.shape == (2, 16, 32, 32)
        assert model.layer3(model.layer2(model.layer1(stem))).shape == (2, 64, 8, 8)
