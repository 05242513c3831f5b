"""The packaging: what pyproject names is what the tree holds, and the wheel brings dni_fx and
nothing else.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dni_fx

from ..helpers.paths import ROOT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built without network from a copy, so that the tree stays clean and ignored
    files stay out.
    """
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in sources():
        copy = source / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / path).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    built = subprocess.run(
        [*command, "-w", target, source], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = target.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        return opened.namelist()


def sources() -> list[Path]:
    """Every file that a wheel could pick up, relative to the root; without the link, as on systems
    that have none.
    """
    names = ("dni_fx", "passes", "tests", "examples", "experiments", "benchmarks")
    folders = [ROOT / name for name in names]
    files = [path for folder in folders for path in walk(folder) if "__pycache__" not in path.parts]
    files += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    return sorted(path.relative_to(ROOT) for path in files)


def walk(folder: Path) -> list[Path]:
    """Files below a folder, without following links."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.is_dir():
            found += [] if path.is_symlink() else walk(path)
        else:
            found.append(path)
    return found


def test_pyproject_names_every_package_of_the_tree(project: dict[str, Any]) -> None:
    modules = {
        path.parent
        for path in sources()
        if path.suffix == ".py" and path.parts[0] in ("dni_fx", "passes")
    }
    expected = {package_of(folder): folder.as_posix() for folder in modules}
    settings = project["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(expected)
    assert settings["package-dir"] == expected


def package_of(folder: Path) -> str:
    """Import name of a folder of the repository: passes/ is imported as dni_fx.passes."""
    return ".".join(("dni_fx", *folder.parts) if folder.parts[0] == "passes" else folder.parts)


def test_every_package_folder_has_an_init() -> None:
    folders = {
        path.parent
        for path in sources()
        if path.suffix == ".py" and path.parts[0] in ("dni_fx", "passes")
    }
    assert [
        folder for folder in sorted(folders) if not (ROOT / folder / "__init__.py").exists()
    ] == []


def test_passes_is_a_link_to_the_top_level_folder() -> None:
    link = ROOT / "dni_fx" / "passes"
    if link.is_file():
        pytest.skip("checked out without symbolic links: installs work, type checkers do not")
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_wheel_contains_dni_fx_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"dni_fx", f"dni_fx-{dni_version()}.dist-info"}


def test_wheel_contains_every_module_and_the_typing_marker(wheel: list[str]) -> None:
    modules = [
        path for path in sources() if path.suffix == ".py" and path.parts[0] in ("dni_fx", "passes")
    ]
    expected = {
        (path if path.parts[0] == "dni_fx" else "dni_fx" / path).as_posix() for path in modules
    }
    assert {"dni_fx/passes/__init__.py", "dni_fx/sources/__init__.py"} <= expected
    assert {name for name in wheel if name.startswith("dni_fx/")} == expected | {"dni_fx/py.typed"}


def test_wheel_carries_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def dni_version() -> str:
    """The version in pyproject.toml."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    return version


def test_modules_come_from_this_tree() -> None:
    passes = pytest.importorskip("dni_fx.passes")
    assert Path(dni_fx.__file__).resolve() == ROOT / "dni_fx" / "__init__.py"
    assert Path(passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_passes_is_not_importable_by_itself() -> None:
    code = "import passes"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "ImportError" in run.stderr
    assert "dni_fx.passes" in run.stderr


def test_only_passes_build_or_edit_graphs() -> None:
    # dni_fx/ holds nouns and the runtime; of torch.fx it may name the type of what it runs, and
    # of what it refuses.
    refused = {
        "fx.Proxy",
        "fx.symbolic_trace",
        "from torch.fx.experimental.proxy_tensor import get_proxy_mode",
    }
    found = []
    for path in sources():
        if path.suffix == ".py" and path.parts[0] == "dni_fx":
            text = (ROOT / path).read_text(encoding="utf-8")
            names = re.findall(r"\bfx\.(?!GraphModule\b)\w+|from torch\.fx.*", text)
            found += [
                f"{path}: {name}"
                for name in set(names) - refused
                if not name.endswith("import GraphModule")
            ]
    assert found == []


def test_importing_brings_no_compiler() -> None:
    """Those of torch take as long to import as all the rest of it."""
    script = (
        "import sys, dni_fx; print([m for m in ('torch._dynamo', 'torch._inductor') "
        "if m in sys.modules], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True\n"
