"""Programs that were written train like the trainer, bit for bit, where there is no dni_fx; and
they read as checked by ruff and mypy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_fx

from ..models.feedforward import UNet
from .kit import CASES, Ran, of_stages, run_folders, train, trained_weights, write


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    place = tmp_path_factory.mktemp("programs")
    made: dict[str, Ran] = {}
    for name, case in CASES.items():
        folder = place / re.sub(r"\W+", "_", name)
        one, batches = case.make(), case.batches()
        write(one, folder, batches)
        losses = train(one, batches)
        made[name] = Ran(folder, trained_weights(one), losses, {}, one)
    run_folders(place, [r.folder for r in made.values()])
    for each in made.values():
        each.found = torch.load(each.folder.with_suffix(".after.pt"), weights_only=False)
    return made


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_without_dni_fx_have_the_trainers_bits(ran: dict[str, Ran], name: str) -> None:
    one = ran[name]
    assert one.found.get("error") is None
    assert torch.equal(torch.stack(one.losses), torch.stack(one.found["losses"]))
    pairs = of_stages(one.found["weights"], one.trained)
    assert len(pairs) >= len(list(one.made.decoupled.model.parameters()))
    assert [n for n, (mine, trainers) in pairs.items() if not torch.equal(mine, trainers)] == []


@pytest.mark.parametrize("name", CASES)
def test_the_sources_have_learnt_the_same(ran: dict[str, Ran], name: str) -> None:
    """Of each stage's sources, all numbers: their names are the program's own."""
    one = ran[name]
    own = [t for n, t in one.found["weights"].items() if n.startswith("sources_")]
    theirs = [t for n, t in one.trained.items() if n.startswith("synthesizers.")]
    assert sorted(map(_digest, own)) == sorted(map(_digest, theirs))


def _digest(tensor: torch.Tensor) -> str:
    return str(tensor.flatten().tolist())


@pytest.mark.parametrize("name", [n for n in CASES if n[:3] in ("res", "une")])
def test_threads_that_wait_for_every_answer_have_the_bits_too(
    ran: dict[str, Ran], name: str
) -> None:
    one = ran[name]
    pairs = of_stages(one.found["on threads"], one.trained)
    assert [n for n, (mine, trainers) in pairs.items() if not torch.equal(mine, trainers)] == []


def test_a_weight_that_is_off_by_a_millionth_is_seen(ran: dict[str, Ran], tmp_path: Path) -> None:
    """Negative control of the comparison."""
    case = CASES["unet, auto"]
    one, batches = case.make(), case.batches()
    with torch.no_grad():
        one.decoupled.model.down1.bias[0] += 1e-6
    write(one, tmp_path / "off", batches)
    run_folders(tmp_path, [tmp_path / "off"])
    found = torch.load(tmp_path / "off.after.pt", weights_only=False)["weights"]
    pairs = of_stages(found, ran["unet, auto"].trained)
    assert not all(torch.equal(mine, trainers) for mine, trainers in pairs.values())


# What is written


@pytest.mark.parametrize("name", CASES)
def test_no_file_knows_dni_fx(ran: dict[str, Ran], name: str) -> None:
    for path in ran[name].folder.glob("*.py"):
        text = path.read_text()
        assert "dni_fx" not in text
        known = {"torch", "safetensors", "tests"} | {p.stem for p in ran[name].folder.glob("*.py")}
        for module in re.findall(r"^(?:import|from) ([\w]+)", text, re.MULTILINE):
            assert module in known | set(sys.stdlib_module_names), (path.name, module)


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_ruff_finds_nothing_and_would_format_nothing(ran: dict[str, Ran]) -> None:
    folders = [str(r.folder) for r in ran.values()]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *folders], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.parametrize("name", ["resnet, local", "lstm, auto"])
def test_mypy_finds_nothing(
    ran: dict[str, Ran], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "mypy"
    options = ["--strict", "--no-warn-return-any", "--allow-untyped-calls"]
    options += ["--ignore-missing-imports", "--cache-dir", str(cache), "."]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options],
        cwd=ran[name].folder, capture_output=True, text=True, check=False,
        env={**os.environ, "MYPYPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_folder_gives_the_plan_back(ran: dict[str, Ran]) -> None:
    one = ran["unet, auto"]
    text = (one.folder / "plan.json").read_text()
    plan = dni_fx.CutPlan.from_json(text)
    assert plan == one.made.decoupled.plan
    again = dni_fx.decouple(UNet(), plan, example_inputs=(torch.randn(2, 2, 8, 8),), check=False)
    assert again.plan == plan
    assert json.loads(text)["cuts"] == ["down2", "middle"]


def test_the_readme_tells_of_the_plan_and_the_files(ran: dict[str, Ran]) -> None:
    one = ran["resnet, auto"]
    text = (one.folder / "README.md").read_text()
    assert text.startswith("# ResNet18 in 4 stages\n")
    assert "layer2" in text
    for path in one.folder.glob("*.py"):
        assert path.name in text or path.name.startswith("stage_")


def test_a_stage_reads_as_a_person_would_write_it(ran: dict[str, Ran]) -> None:
    text = (ran["resnet, auto"].folder / "stage_1.py").read_text()
    assert STAGE in text
    assert STEP in text
    blocks = (ran["resnet, auto"].folder / "stage_0.py").read_text()
    assert BLOCK in blocks


STAGE = '''
class Stage1(nn.Module):
    """Stage 1 of ``ResNet18``: ``layer1`` to ``layer2``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer2 = nn.Sequential(BasicBlock2(), BasicBlock3())

    def forward(self, layer1: Tensor) -> Tensor:
        return self.layer2(layer1)
'''
STEP = '''
def step(stage: Stage1, sources: Sources1, layer1: Tensor, context: Tensor) -> Result1:
    """Run the stage and pull back; gradients are added to those that are there."""
    layer1 = layer1.detach().requires_grad_()
    layer2 = stage(layer1.view_as(layer1))  # views, since the stage writes into what it is given
    layer2_gradient, layer2_said = sources.layer2.predict(layer2.detach(), context)
    torch.autograd.backward(layer2, layer2_gradient)
    return Result1(layer2.detach(), gradient_of(layer1), layer2_said)
'''
BLOCK = '''
class BasicBlock(nn.Module):
    """The model's ``BasicBlock``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
'''


def test_the_scripts_run_as_they_are(ran: dict[str, Ran]) -> None:
    """Their own batches, the thread's staleness, weights written."""
    folder = ran["unet, auto"].folder
    for script in ("train.py", "train_threads.py"):
        code = f"import {script[:-3]} as s; s.main(3)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("loss") == 3
    assert list((folder / "trained").iterdir())


def test_an_error_in_a_thread_ends_the_others(ran: dict[str, Ran], tmp_path: Path) -> None:
    folder = ran["unet, auto"].folder
    code = (
        "import stage_1, train_threads as s\n"
        "def fail(*given): raise ValueError('no luck')\n"
        "stage_1.step = fail\n"
        "s.train(s.Program(), s.batches(50), 50)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ValueError: no luck")


def test_accumulated_steps_have_the_trainers_bits(tmp_path: Path) -> None:
    case = CASES["unet, auto"]
    plain: Any = case.make()
    made = dni_fx.Trainer(
        plain.decoupled, torch.nn.MSELoss(), optimizer=torch.optim.Adam, accumulate=2
    )
    batches = case.batches()
    folder = tmp_path / "accumulated"
    made.to_folder(folder)
    told = [(*batch, k % 2 == 1) for k, batch in enumerate(batches)]
    torch.save(told, folder.with_suffix(".batches.pt"))
    (folder / "train_threads.py").unlink()  # it is told by itself which steps update
    train(made, batches)
    run_folders(tmp_path, [folder])
    found = torch.load(folder.with_suffix(".after.pt"), weights_only=False)
    assert found.get("error") is None
    pairs = of_stages(found["weights"], trained_weights(made))
    assert [n for n, (mine, trainers) in pairs.items() if not torch.equal(mine, trainers)] == []
