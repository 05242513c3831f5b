"""The pages: every Python block runs, what stands under it is what it printed, and every command
that is named exists.

The Python blocks of a page run in order, in one namespace and a directory of their own. What a page
leaves to its reader (a model, data) stands in comments that no reader sees, ``<!-- setup`` to
``-->``, which run in their places. There, ``shown`` is the text of the block before and ``printed``
what the last Python block printed. A ``text`` block is what the Python block before it printed.
Commands in ``sh`` blocks and in running text are not run, but looked up.
"""

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
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import dni_fx
from dni_fx import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {
    "",
    "python",
    "sh",
    "text",
    "setup",
}  # "": output that differs from machine to machine, and diagrams
COMMANDS = ("python", "torchrun", "make", "dni-fx", "pip", "mkdocs")


class PageError(AssertionError):
    """Where a page is wrong, and how."""


@dataclass(frozen=True)
class Block:
    """A fenced block, or a comment that is run.

    Attributes:
        language: what its fence says; ``"setup"`` for a comment.
        line: of its first line of text, from 1.
        text: without the fences and their indentation.
    """

    language: str
    line: int
    text: str


def name_of(page: Path) -> str:
    """As in messages."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def find_blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    found: list[Block] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        opened = re.match(r"( *)(```+)(.*)$|<!-- setup$", line)
        if opened is None:
            continue
        indent, fence, language = (
            (opened[1], opened[2], opened[3].strip()) if opened[2] else ("", "-->", "setup")
        )
        if language not in LANGUAGES:
            raise PageError(
                f"{name_of(page)}:{number}: a block of {language!r}, which is not checked"
            )
        text = []
        for inside, inner in lines:
            if inner.strip() == fence:
                break
            if inner.strip() and not inner.startswith(indent):
                raise PageError(
                    f"{name_of(page)}:{inside}: less indented than the fence of its block"
                )
            text.append(inner.removeprefix(indent))
        else:
            raise PageError(f"{name_of(page)}:{number}: this block does not end")
        found.append(Block(language, number + 1, "".join(f"{t}\n" for t in text)))
    return found


def run_page(page: Path) -> int:
    """Run a page's Python blocks in order; how many there were.

    Raises:
        PageError: one fails, or does not print what the page says; with the page and the line.
    """
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = (
        module  # where dataclasses and pickle look for what a page defines
    )
    count, printed, before = 0, None, ""
    try:
        for block in find_blocks(page):
            if block.language in ("python", "setup"):
                if block.language == "setup":
                    vars(module).update(shown=before, printed=printed)
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    run_block(page, block, module)
                if block.language == "python":
                    count, printed = count + 1, output.getvalue()
            elif block.language == "text" and (printed or "").rstrip("\n") != block.text.rstrip(
                "\n"
            ):
                raise PageError(f"{name_of(page)}:{block.line}: the block before prints\n{printed}")
            if block.language != "setup":
                before = block.text
    finally:
        del sys.modules[module.__name__]
    return count


def run_block(page: Path, block: Block, module: ModuleType) -> None:
    """Run one block, whose lines are numbered as the page's."""
    try:
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        exec(code, vars(module))
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)
        ]
        line = (
            error.lineno
            if isinstance(error, SyntaxError) and error.filename == str(page)
            else lines[-1]
        )
        raise PageError(f"{name_of(page)}:{line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in find_blocks(p))], ids=name_of
)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page) > 0


def write(page: Path, *lines: str) -> Path:
    page.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return page


def test_a_failing_block_is_named_with_its_page_and_line(tmp_path: Path) -> None:
    page = write(
        tmp_path / "page.md",
        "Text.",
        "",
        "```python",
        "x = 1",
        "```",
        "",
        "```python",
        "",
        "x / 0",
        "```",
    )
    with pytest.raises(PageError, match=r"^page\.md:9: ZeroDivisionError: division by zero"):
        run_page(page)


def test_a_block_that_is_no_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"^page\.md:3: SyntaxError"):
        run_page(write(tmp_path / "page.md", "```python", "x = 1", "x = = 2", "```"))


def test_the_line_is_the_page_s_where_the_error_is_raised_elsewhere(tmp_path: Path) -> None:
    lines = (
        "```python",
        "import json",
        "def read(text):",
        "    return json.loads(text)",
        "read('{')",
        "```",
    )
    with pytest.raises(PageError, match=r"^page\.md:4: JSONDecodeError"):
        run_page(write(tmp_path / "page.md", *lines))


def test_output_that_is_not_what_the_page_says_is_an_error(tmp_path: Path) -> None:
    lines = ["```python", "print(1 + 1)", "```", "", "```text", "2", "```"]
    assert run_page(write(tmp_path / "page.md", *lines)) == 1
    lines[5] = "3"
    with pytest.raises(PageError, match=r"^page\.md:6: the block before prints\n2\n"):
        run_page(write(tmp_path / "page.md", *lines))


def test_setup_comments_run_in_their_places_and_see_what_is_shown(tmp_path: Path) -> None:
    lines = [
        "<!-- setup",
        "x = 2",
        "-->",
        "",
        "* In a list:",
        "",
        "  ```python",
        "  y = x",
        "  print(y)",
        "  ```",
        "",
    ]
    checks = [
        "<!-- setup",
        "assert y == 2 and printed == '2\\n'",
        "assert shown.startswith('y = x'), shown",
        "-->",
    ]
    assert run_page(write(tmp_path / "page.md", *lines, *checks)) == 1
    with pytest.raises(PageError, match=r"^page\.md:2: NameError"):
        run_page(write(tmp_path / "page.md", "```python", "x", "```", *lines))


def test_a_block_of_another_language_or_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"^page\.md:2: a block of 'py', which is not checked"):
        find_blocks(write(tmp_path / "page.md", "", "```py", "x", "```"))
    with pytest.raises(PageError, match=r"^page\.md:1: this block does not end"):
        find_blocks(write(tmp_path / "page.md", "```python", "x"))
    with pytest.raises(PageError, match=r"^page\.md:4: less indented than the fence"):
        find_blocks(write(tmp_path / "page.md", "* a", "", "  ```text", "x", "  ```"))


# Commands.
# ---------------------------------------------------------------------------------------------------------


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
        ("python examples/quickstart.py --stpes 3", "no --stpes"),
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


# Links and pictures.
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_of_the_checkout(page: Path) -> None:
    """On a plain checkout too; anchors, and links within the site, are checked where the site is
    built.
    """
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in local if t and not (page.parent / t).exists()] == []
    if page.parent != ROOT:  # the site holds docs/ alone
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
    assert sorted(re.findall(r"(\S+\.md)$", text, re.M)) == sorted(
        p.name for p in PAGES if p.parent != ROOT
    )


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
    text += 'def there():\n    """:class:`There`"""\nclass There:\n    def on(self):\n        """:meth:`off`"""\n'
    path = tmp_path / "page_of_names.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    where = "page_of_names.py"
    assert unresolved(path, "page_of_names") == [
        f"{where}:1: There.off",
        f"{where}:1: gone",
        f"{where}:5: off",
    ]
