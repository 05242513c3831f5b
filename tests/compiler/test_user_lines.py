"""An error names the user's line, wherever the user's files and the library lie."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import dni_fx
from dni_fx import errors
from dni_fx.errors import user_line
from dni_fx.passes.trace import tracing

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x):
        h = self.a(x)
        if h.sum() > 0:  # the line to name
            h = -h
        return self.b(h)
"""
LINE = 1 + MODEL.splitlines().index("        if h.sum() > 0:  # the line to name")


def model_at(path: Path) -> nn.Module:
    """The model above, in a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODEL)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.Model()
    return model


@pytest.mark.parametrize(
    "folder", ["work", "dni_fx/passes", "passes/dni_fx", "torch/site-packages"]
)
def test_the_users_line_whatever_the_folder_is_called(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "users_model.py"
    with pytest.raises(errors.TracingError, match=re.escape(f"({path}:{LINE})")):
        tracing.trace_calls(model_at(path), (torch.randn(2, 4),), {})


def test_a_line_of_the_library_is_never_the_users(tmp_path: Path) -> None:
    """Negative control: the same file among the library's own, and a link to it."""
    model = model_at(tmp_path / "users_model.py")
    with pytest.raises(errors.DataDependentError) as caught:
        tracing.record(tracing.Recorder(model, None), model, (torch.randn(2, 4),), {}, {})
    assert user_line(caught.value) == f"{tmp_path / 'users_model.py'}:{LINE}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "_OURS", [*errors._OURS, tmp_path.resolve()])
        assert user_line(caught.value) not in (None, f"{tmp_path / 'users_model.py'}:{LINE}")


def test_whose_a_file_is(tmp_path: Path) -> None:
    library = Path(dni_fx.__file__).parent
    installed = Path(sysconfig.get_path("purelib"))
    (tmp_path / "link").symlink_to(library)
    assert {
        errors.owner_of(str(file))
        for file in (
            library / "decoupled.py",
            library / "passes" / "trace" / "tracing.py",  # through the link
            (library / "passes").resolve() / "trace" / "tracing.py",
            tmp_path / "link" / "decoupled.py",
            torch.__file__,
            re.__file__,
            "<frozen importlib._bootstrap>",
            "<eval_with_key>.3",
        )
    } == {"ours"}
    assert errors.owner_of(str(installed / "einops" / "einops.py")) == "package"
    assert {errors.owner_of(name) for name in ("<stdin>", __file__, "model.py")} == {"user"}


def test_a_copy_in_a_folder_of_its_name(tmp_path: Path) -> None:
    """A clone in ``dni_fx``, and the model beside the library: what ``git clone`` makes."""
    clone = tmp_path / "passes" / "dni_fx"
    for name in ("dni_fx", "passes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=ignored)
    (clone / "users_model.py").write_text(MODEL)
    code = (
        "import torch, dni_fx, users_model; print(dni_fx.__file__)\n"
        "dni_fx.list_cut_points(users_model.Model(), (torch.randn(2, 4),))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(clone)},
    )  # fmt: skip
    assert done.stdout.strip() == str(clone / "dni_fx" / "__init__.py")
    assert f"({clone / 'users_model.py'}:{LINE})" in done.stderr
