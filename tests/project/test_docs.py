"""The pages: every Python block runs, and what stands under it is what it printed."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest

from .pages import PAGES, Block, PageError, find_blocks, name_of, write


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
