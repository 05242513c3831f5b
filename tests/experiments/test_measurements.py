"""What experiments measure: like is compared with like."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dni_fx

from .records import SMALL, Record, experiment, feedforward, rows, tiny


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
        "steps": 4,
        "batch": 8,
        "measure_every": 4,
        "decay": "cosine",
        "rate_warm_up": 2,
        "gradients": "linear",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "synthesizer_optimizer": {"name": "adam", "lr": 0.02},
        "earlier_rate": 0.5,
    }
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
