"""What no files are written for is refused by name; and what the shell says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx.errors import DecouplingError
from dni_fx.program.constructors import constructed
from dni_fx.program.text import literal, wrapped

from ..cli.kit import MODELS, run


class Kept(nn.Linear):
    """Stays one node."""

    is_graph_leaf = True


class OwnSource(dni_fx.sources.Zero):
    pass


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda *_: None)
    return layer


def decoupled(middle: nn.Module | None = None, **options: Any) -> dni_fx.Decoupled:
    model = nn.Sequential(nn.Linear(6, 6), middle or nn.Tanh(), nn.Linear(6, 3))
    given = {"gradients": "linear", "check": False} | options
    return dni_fx.decouple(model, ["0"], example_inputs=(torch.randn(4, 6),), **given)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"middle": Kept(6, 6)},
            r"submodule '1' \(tests.program.test_refusals.Kept\) is no module",
        ),
        ({"middle": hooked()}, "submodule '1' .* has hooks"),
        ({"gradients": "exact"}, "gradients='exact'"),
        ({"gradients": "delayed"}, "the source at '0', a Delayed, cannot be written"),
        ({"gradients": OwnSource}, "the source at '0', a OwnSource, cannot be written"),
        ({"inputs": "linear"}, "synthetic inputs"),
    ],
)
def test_what_files_cannot_hold_is_named(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DecouplingError, match=told):
        decoupled(**options).to_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_a_loss_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    with pytest.raises(DecouplingError, match="use a loss of torch"):
        decoupled().to_folder(tmp_path / "out", loss=lambda output, _: output.sum())


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(DecouplingError, match="name a new or empty folder"):
        decoupled().to_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_other_shapes_than_the_program_holds_for_are_checked(tmp_path: Path) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            return self.b(h * 2 if x.shape[0] > 3 else h)

    made = dni_fx.decouple(Looks(), ["a"], example_inputs=(torch.randn(4, 6),), check=False)
    text = (made.to_folder(tmp_path / "out") / "program.py").read_text()
    assert "if not (x.size(0) > 3):" in text


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Conv2d(3, 64, 7, 2, 3, bias=False),
         "nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)"),
        (nn.Conv1d(2, 4, 3, dilation=2), "nn.Conv1d(2, 4, kernel_size=3, dilation=2)"),
        (nn.Linear(3, 4, dtype=torch.float64), "nn.Linear(3, 4, dtype=torch.float64)"),
        (nn.LayerNorm((4, 5)), "nn.LayerNorm((4, 5))"),
        (nn.LSTM(3, 4, 2, dropout=0.1), "nn.LSTM(3, 4, num_layers=2, dropout=0.1)"),
        (nn.TransformerEncoderLayer(8, 2, 16),
         "nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)"),
        (nn.BatchNorm2d(4).eval(), "nn.BatchNorm2d(4).eval()"),
        (nn.GELU("tanh"), 'nn.GELU(approximate="tanh")'),
    ],
)  # fmt: skip
def test_modules_as_the_calls_that_make_them(module: nn.Module, text: str) -> None:
    assert constructed(module, "m") == text
    again = eval(text)
    assert repr(again) == repr(module)
    assert [p.shape for p in again.parameters()] == [p.shape for p in module.parameters()]


@pytest.mark.parametrize(
    "value",
    [1, -2.5, None, "it's", 'say "x"', (1,), [1, (2, 3)], {"a": 1}, torch.half, slice(2)],
)
def test_values_are_read_back(value: Any) -> None:
    assert eval(literal(value)) == value


def test_an_object_has_no_text() -> None:
    with pytest.raises(DecouplingError, match="object in it"):
        literal(object())


def test_long_lines_are_broken_within_brackets() -> None:
    names = [f"argument_{k}" for k in range(12)]
    text = wrapped([f"    found = call({', '.join(names)})"])
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1] == "    )"


def test_the_shell_writes_a_program(tmp_path: Path) -> None:
    (tmp_path / "models_here.py").write_text(MODELS)
    command = ["emit", "models_here:chain", "--input", "4x6", "--cut", "1", "--out", "program"]
    done = run(*command, "--classes", "6", "--optimizer", "SGD", "--lr", "0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "torch.optim.SGD(self.stage_0.parameters(), lr=0.5)"
        in (tmp_path / "program" / "program.py").read_text()
    )
    again = run(*command, "--loss", "cross_entropie", cwd=tmp_path)
    assert again.returncode == 1
    assert "no loss 'cross_entropie'" in again.stderr
