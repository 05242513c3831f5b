"""Scripts for other libraries' trainers: three lines make one decoupled, and it trains, saves and
resumes as before.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ..helpers.comparing import assert_bits_equal, graph_of, state_of
from .scripts_run import differing_lines, run_script

EXACT = {'gradients="local"': 'gradients="exact"'}
ZERO = {
    'gradients="local"': 'gradients="zero"',
    "labels, **__: labels": "**__: None",
}  # not shown labels


def folder_of(path: Path, name: str) -> Path:
    path = path / name
    path.mkdir()
    return path


def learnt_sources(module: Any) -> int:
    """How many sources have learnt something."""
    return sum(bool(optimizer.state) for optimizer in module._dni_fx.optimizers.values())


@pytest.mark.parametrize("name", ["trainer", "lightning", "accelerate"])
def test_three_lines_differ(name: str) -> None:
    assert 0 < differing_lines(f"{name}_plain", f"{name}_decoupled") <= 3


def test_differing_lines_are_counted() -> None:
    assert differing_lines("trainer_plain", "trainer_plain") == 0
    assert differing_lines("trainer_plain", "lightning_plain") > 20


# ---------------------------------------------------------------------------------------- Trainer o


def falls(losses: list[float]) -> bool:
    """Whether the last quarter is clearly below the start."""
    share = len(losses) // 4
    return sum(losses[-share:]) / share < 0.5 * losses[0]


def logged(run: Any) -> list[float]:
    return [row["loss"] for row in run["trainer"].state.log_history if "loss" in row]


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    plain = run_script("trainer_plain", folder_of(tmp_path, "plain"))
    cut = run_script("trainer_decoupled", folder_of(tmp_path, "cut"))
    zero = run_script("trainer_decoupled", folder_of(tmp_path, "zero"), changes=ZERO)
    for run in (plain, cut):
        assert falls(logged(run))
        assert run["result"]["eval_accuracy"] > 0.9
    assert learnt_sources(cut["model"]) == 2
    assert list(cut["model"].state_dict()) == list(plain["model"].state_dict())
    assert logged(zero)[-1] > 2 * logged(cut)[-1]


def test_a_checkpoint_of_the_trainer_is_the_plain_classs(tmp_path: Path) -> None:
    run = run_script("trainer_decoupled", tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.BertForSequenceClassification
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    assert list(loaded.state_dict()) == list(run["model"].state_dict())
    batch = run["collate"](run["sentences"][256:272])
    model = run["model"].eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        nn.init.normal_(model.classifier.weight)
        assert not torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "more", ["", "bf16=True, ", "gradient_accumulation_steps=2, label_smoothing_factor=0.1, "]
)
def test_exact_gradients_are_the_plain_script(more: str, tmp_path: Path) -> None:
    changes = {"use_cpu=True": f"{more}use_cpu=True", "num_train_epochs=4": "num_train_epochs=1"}
    plain = run_script("trainer_plain", folder_of(tmp_path, "plain"), changes=changes)
    exact = run_script("trainer_decoupled", folder_of(tmp_path, "exact"), changes=changes | EXACT)
    want = state_of(plain["model"])
    assert_bits_equal(state_of(exact["model"]), want, "exact")
    zero = run_script("trainer_decoupled", folder_of(tmp_path, "zero"), changes=changes | ZERO)
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(state_of(zero["model"]), want, "zero")


# --------------------------------------------------------------------------------------------------


def test_lightning(tmp_path: Path) -> None:
    plain = run_script("lightning_plain", folder_of(tmp_path, "plain"))
    cut = run_script("lightning_decoupled", folder_of(tmp_path, "cut"))
    zero = run_script("lightning_decoupled", folder_of(tmp_path, "zero"), changes=ZERO)
    for run in (plain, cut):
        assert falls(run["losses"])
        assert run["result"]["accuracy"] > 0.9
    assert learnt_sources(cut["model"]) == 2
    assert zero["result"]["accuracy"] < cut["result"]["accuracy"]
    assert list(cut["classifier"].state_dict()) == list(plain["classifier"].state_dict())
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    plain["classifier"].load_state_dict(saved["state_dict"])
    x = plain["images"][:32]
    with torch.no_grad():
        assert torch.equal(plain["model"].eval()(x)["logits"], cut["model"].eval()(x)["logits"])


def test_lightning_with_exact_gradients_is_the_plain_script(tmp_path: Path) -> None:
    changes = {
        "max_epochs=4": 'max_epochs=1, precision="bf16-mixed", gradient_clip_val=0.5, '
        "accumulate_grad_batches=2"
    }
    plain = run_script("lightning_plain", folder_of(tmp_path, "plain"), changes=changes)
    exact = run_script("lightning_decoupled", folder_of(tmp_path, "exact"), changes=changes | EXACT)
    zero = run_script("lightning_decoupled", folder_of(tmp_path, "zero"), changes=changes | ZERO)
    want = state_of(plain["model"])
    assert_bits_equal(state_of(exact["model"]), want, "exact")
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(state_of(zero["model"]), want, "zero")


def test_lightning_in_half_precision_with_clipping_and_accumulation(tmp_path: Path) -> None:
    changes = {
        "max_epochs=4": 'max_epochs=6, precision="bf16-mixed", gradient_clip_val=0.5, '
        "accumulate_grad_batches=2",
        "labels, **__: labels": "labels, **__: labels, unit=1 / 2",
    }
    run = run_script("lightning_decoupled", tmp_path, changes=changes)
    assert falls(run["losses"])
    assert run["result"]["accuracy"] > 0.9
    assert learnt_sources(run["model"]) == 2


HOOKS = """    def on_save_checkpoint(self, checkpoint):
        checkpoint["sources"] = self.network.synthesizer_state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.network.load_synthesizer_state_dict(checkpoint["sources"])

    def configure_optimizers"""


@pytest.mark.parametrize("hooks", [True, False])
def test_lightning_resumes_where_it_was(hooks: bool, tmp_path: Path) -> None:
    """Bit for bit, where the sources are saved beside the model; the control saves none."""
    changes = {
        ", shuffle=True": "",
        '["first", "second"], ': (
            '["first", "second"], example_inputs=(images[:16],), '
            'example_kwargs={"labels": labels[:16]}, '
        ),
        **({"    def configure_optimizers": HOOKS} if hooks else {}),
    }
    whole = run_script("lightning_decoupled", folder_of(tmp_path, "whole"), changes=changes)
    half = folder_of(tmp_path, "half")
    run_script("lightning_decoupled", half, changes=changes | {"max_epochs=4": "max_epochs=2"})
    resumed = changes | {
        "DataLoader(test, 128),": f"DataLoader(test, 128), ckpt_path={str(half / 'last.ckpt')!r},"
    }
    rest = run_script("lightning_decoupled", folder_of(tmp_path, "rest"), half, changes=resumed)
    assert len(rest["losses"]) == len(whole["losses"]) / 2
    got, want = (state_of(run["model"]) for run in (rest, whole))
    if hooks:
        assert_bits_equal(got, want, "resumed")
    else:
        with pytest.raises(AssertionError, match="differ"):
            assert_bits_equal(got, want, "without sources")


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    plain, cut = (
        run_script(f"accelerate_{n}", tmp_path, precision) for n in ("plain", "decoupled")
    )
    for run in (plain, cut):
        assert falls(run["losses"])
        assert run["result"]["accuracy"] > 0.9
    assert learnt_sources(cut["model"]) == 2
    assert list(cut["accelerator"].get_state_dict(cut["model"])) == list(
        plain["model"].state_dict()
    )
    assert "forward" not in vars(cut["model"]._dni_fx.graphs.model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_with_exact_gradients_is_the_plain_script(
    precision: str, tmp_path: Path
) -> None:
    changes = {"range(12)": "range(2)"}
    plain = run_script("accelerate_plain", tmp_path, precision, changes)
    exact = run_script("accelerate_decoupled", tmp_path, precision, changes | EXACT)
    zero = run_script(
        "accelerate_decoupled",
        tmp_path,
        precision,
        changes | {'gradients="local"': 'gradients="zero"'},
    )
    want = state_of(plain["model"])
    assert_bits_equal(state_of(exact["model"]), want, "exact")
    with pytest.raises(AssertionError, match="differ"):
        assert_bits_equal(state_of(zero["model"]), want, "zero")


@pytest.mark.parametrize("keep", [True, False])
def test_what_accelerate_unwraps_and_copies_is_still_cut(keep: bool, tmp_path: Path) -> None:
    run = run_script("accelerate_decoupled", tmp_path, "bf16", {"range(12)": "range(1)"})
    unwrapped = run["accelerator"].unwrap_model(run["model"], keep_fp32_wrapper=keep)
    x, y = run["x"][:16], run["y"][:16]
    for m in (unwrapped, copy.deepcopy(unwrapped)):
        with m.train().context(y):
            output = m(x)
        assert output.dtype == torch.float32
        assert "StageFunctionBackward" in graph_of(output)
    plain = unwrapped._dni_fx.graphs.model
    assert "StageFunctionBackward" not in graph_of(
        plain.train()(x)
    )  # whose forward nobody replaced
