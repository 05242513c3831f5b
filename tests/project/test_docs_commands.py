"""The pages: every command that is named exists, every link leads somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import dni_fx
from dni_fx import cli

from ..helpers.paths import ROOT
from .pages import COMMANDS, PAGES, SITE, find_blocks, name_of, write


def find_commands(page: Path) -> list[tuple[int, str]]:
    """Commands with their lines: those of ``sh`` blocks, and what stands in code font and begins
    like one.
    """
    found = []
    for block in find_blocks(page):
        if block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [
                (block.line + k, line) for k, line in enumerate(lines) if line.split("#")[0].strip()
            ]
    text = page.read_text(encoding="utf-8")
    for inline in re.finditer(
        r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^ *```.*?^ *```", blank, text, flags=re.S | re.M)
    ):
        if inline[1].split()[0] in COMMANDS and len(inline[1].split()) > 1:
            found.append((text[: inline.start()].count("\n") + 1, " ".join(inline[1].split())))
    return found


def blank(match: re.Match[str]) -> str:
    """As many characters and lines, without a word."""
    return re.sub(r"[^\n]", " ", match[0])


def wrong_with(command: str) -> str | None:
    """What is wrong with a command; None where it could be run."""
    words = list(
        itertools.dropwhile(
            lambda w: re.fullmatch(r"[A-Z_]+=.*", w), shlex.split(command, comments=True)
        )
    )
    if "--" in words:
        both = shlex.join(words[: words.index("--")]), shlex.join(words[words.index("--") + 1 :])
        return wrong_with(both[0]) or wrong_with(both[1])
    name, *rest = words
    if name == "make":
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [
            w for w in rest if "=" not in w and not re.search(rf"^{re.escape(w)}:", text, re.M)
        ]
        variables = [w for w in rest if "=" in w and f"$({w.split('=')[0]})" not in text]
        return f"the Makefile has no {(targets + variables)[0]}" if targets or variables else None
    if name == "dni-fx":
        with contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                options, more = cli.make_parser().parse_known_args(rest)
            except SystemExit as end:
                return told.getvalue() if end.code else None
        return f"unknown {more}" if more and options.command != "demo" else None
    if name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", rest[-1])))
        known = rest[0] == "install" and set(asked) <= set(project["optional-dependencies"])
        return None if known else f"cannot install {rest[-1]}"
    if name in ("python", "torchrun"):
        return wrong_with_script(name, rest)
    return f"unknown command {name}"


def wrong_with_script(name: str, words: list[str]) -> str | None:
    """For Python and torchrun."""
    if name == "python" and words[0] == "-m":
        return None if importlib.util.find_spec(words[1]) else f"no module {words[1]}"
    place = next((k for k, w in enumerate(words) if w.endswith(".py")), None)
    if place is None:
        return "names no script"
    known = set(get_args_parser()._option_string_actions) if name == "torchrun" else set()
    unknown = [w for w in words[:place] if w.startswith("-") and w.split("=")[0] not in known]
    if unknown:
        return f"{name} has no {unknown[0]}"
    if words[place] == "train.py":
        return None  # the reader's own
    script = ROOT / words[place]
    if not script.is_file():
        return f"there is no {words[place]}"
    options = script_options(script)
    unknown = [
        w for w in words[place + 1 :] if w.startswith("--") and w.split("=")[0] not in options
    ]
    return f"{words[place]} has no {unknown[0]}" if unknown else None


def script_options(script: Path) -> set[str]:
    """Options that a script, or a module beside it that it imports, adds to a parser."""
    text = script.read_text(encoding="utf-8")
    found = set(re.findall(r"[\"'](--[a-z][a-z0-9-]*)[\"']", text))
    for module in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M):
        beside = script.with_name(f"{module}.py")
        if beside.is_file() and beside != script:
            found |= script_options(beside)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    wrong = [(line, command, wrong_with(command)) for line, command in find_commands(page)]
    assert [
        f"{name_of(page)}:{line}: {command}: {why}" for line, command, why in wrong if why
    ] == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("make tests", "no tests"),
        ("make demo DEMO_ARG=1", "no DEMO_ARG"),
        ("python examples/quick.py", "there is no examples/quick.py"),
        ("python experiments/digits.py --stpes 3", "no --stpes"),
        ("OMP_NUM_THREADS=1 torchrun --nprocs 2 train.py", "torchrun has no --nprocs"),
        (
            "python benchmarks/netns.py --delay 50ms -- python benchmarks/parallel.py --tran 3",
            "no --tran",
        ),
        ("python -m dni_fy", "no module"),
        ("dni-fx plan a:b --input 8x3 --stage 4", "stage"),
        ("dni-fx plans a:b", "plans"),
        ("pip install '.[document]'", "cannot install"),
        ("rm -r docs", "unknown command"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, why: str) -> None:
    assert why in (wrong_with(command) or "")


def test_commands_are_found_in_blocks_and_in_text(tmp_path: Path) -> None:
    lines = (
        "`make demo` or `python",
        "a.py`.",
        "",
        "```sh",
        "# not this",
        "make test",
        "```",
        "`x`",
    )
    page = write(tmp_path / "page.md", *lines)
    assert find_commands(page) == [(6, "make test"), (1, "make demo"), (1, "python a.py")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_of_the_checkout(page: Path) -> None:
    """On a plain checkout too; anchors, and links within the site, are checked where the site is
    built.
    """
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in local if t and not (page.parent / t).exists()] == []
    if page in SITE:  # the site holds docs/ alone
        assert [t for t in local if ".." in t] == []


def test_the_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    script, folder = ROOT / "docs" / "pictures.py", ROOT / "docs" / "pictures"
    command = [sys.executable, "-W", "error", str(script), "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    assert sorted(made) == sorted(p.name for p in folder.iterdir())
    assert [n for n, text in made.items() if text != (folder / n).read_text(encoding="utf-8")] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"(\S+\.md)$", text, re.M)) == sorted(p.name for p in SITE)


def test_the_reference_describes_what_there_is() -> None:
    """Every name on the page exists, and what is public at the top level, a source or a schedule is
    on the page.
    """
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = [pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)", text, re.M)]
    named += [
        getattr(dni_fx.schedules, name)
        for name in re.findall(r"members: \[(.*)\]", text)[0].split(", ")
    ]
    public = [getattr(dni_fx, name) for name in dni_fx.__all__]
    wanted = [*public, *dni_fx.sources.SOURCES.values(), *dni_fx.schedules.SCHEDULES.values()]
    assert [thing.__name__ for thing in wanted if not any(thing is known for known in named)] == []


def unresolved(path: Path, module: str) -> list[str]:
    """Names in a module's docstrings, as Sphinx's roles, that stand for nothing there."""
    wrong = []

    def known(name: str, places: list[Any]) -> bool:
        first, *rest = name.split(".")
        found: Any = next((getattr(p, first) for p in places if hasattr(p, first)), None)
        found = dni_fx if found is None and first == "dni_fx" else found
        for attribute in rest:
            if not hasattr(found, attribute) and isinstance(found, ModuleType):
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{found.__name__}.{attribute}")
            if isinstance(found, type) and not hasattr(
                found, attribute
            ):  # set by its methods, or a field
                return (
                    f"self.{attribute}" in inspect.getsource(found)
                    or attribute in found.__annotations__
                )
            found = getattr(found, attribute, None)
        return found is not None

    def visit(node: Any, places: list[Any]) -> None:
        inner = places
        if isinstance(node, ast.ClassDef):
            inner = [getattr(places[0], node.name, places[0]), *places]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for name in re.findall(
                r":(?:class|func|meth|attr|mod|data):`~?([\w.]+)`", ast.get_docstring(node) or ""
            ):
                if not known(name, inner):
                    wrong.append(f"{path.name}:{getattr(node, 'lineno', 1)}: {name}")
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8")), [importlib.import_module(module)])
    return wrong


def test_names_in_docstrings_stand_for_something() -> None:
    found = [
        name
        for entry in pkgutil.walk_packages(dni_fx.__path__, "dni_fx.")
        for name in unresolved(
            Path(inspect.getsourcefile(importlib.import_module(entry.name)) or ""), entry.name
        )
    ]
    assert found == []


def test_a_name_that_stands_for_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '"""See :func:`there`, :meth:`There.on`, :meth:`There.off` and :func:`gone`."""\n'
    text += 'def there():\n    """:class:`There`"""\n'
    text += 'class There:\n    def on(self):\n        """:meth:`off`"""\n'
    path = tmp_path / "page_of_names.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    where = "page_of_names.py"
    assert unresolved(path, "page_of_names") == [
        f"{where}:1: There.off",
        f"{where}:1: gone",
        f"{where}:5: off",
    ]
