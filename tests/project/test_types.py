"""What mypy says of a user's own file: a page's training loop, against an editable install."""

from __future__ import annotations

import os
import re
import site
import subprocess
import venv
from pathlib import Path

import pytest

from ..helpers.paths import ROOT
from .test_layout import sources

BEFORE = """
import torch
import torch.nn.functional as F
from torch import nn

import dni_fx

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
x, y = torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
batches = [(x, y)] * 3
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), context=dni_fx.one_hot(2))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its link, so that what an installation writes does not end in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in sources():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / path).read_bytes())
    if not (ROOT / "dni_fx" / "passes").is_symlink():
        pytest.skip("checked out without symbolic links: installs work, type checkers do not")
    (folder / "dni_fx" / "passes").symlink_to("../passes")
    return folder


def installed(checkout: Path, folder: Path, *settings: str) -> Path:
    """The Python of an environment of its own that sees this one's packages, and ``pip install -e``
    of the checkout.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(site.getsitepackages()))
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation"]
    command += ["--no-deps", "--force-reinstall", *settings, "-e", checkout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def mypy(python: Path, folder: Path, *arguments: str) -> list[str]:
    """Its errors, run where no file of the checkout lies."""
    config = ("--config-file", str(ROOT / "pyproject.toml"))
    settings = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [python, "-P", "-m", "mypy", *config, *arguments],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_the_loop_of_a_page_is_well_typed(checkout: Path, tmp_path: Path) -> None:
    python = installed(checkout, tmp_path / "environment")
    page = (ROOT / "docs" / "pretrained.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    loop = next(block for block in blocks if ".as_module(" in block).split("print(")[0]
    (tmp_path / "loop.py").write_text(BEFORE + loop + "state = m.synthesizer_state_dict()\n")
    assert "m.context(y)" in loop
    misspelt = loop.replace("m.context(y)", "m.contxt(y)")
    (tmp_path / "misspelt.py").write_text(BEFORE + misspelt)
    (tmp_path / "wrong.py").write_text(BEFORE + "decoupled.as_module(unit='half')\n")
    found = mypy(python, tmp_path, "loop.py", "misspelt.py", "wrong.py")
    assert sorted(line.split(":")[0] for line in found) == ["misspelt.py", "wrong.py"], found


def test_an_editable_install_by_import_hooks_would_not_be_found(
    checkout: Path, tmp_path: Path
) -> None:
    """Why pyproject.toml asks for another kind."""
    settings = ("--config-settings", "editable_mode=lenient")
    python = installed(checkout, tmp_path / "environment", *settings)
    (tmp_path / "page.py").write_text("import dni_fx\n")
    (error,) = mypy(python, tmp_path, "--follow-imports=skip", "page.py")
    assert 'module named "dni_fx"' in error
