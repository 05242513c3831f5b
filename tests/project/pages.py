"""The pages and their blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..helpers.paths import ROOT

SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")] + SITE


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


def write(page: Path, *lines: str) -> Path:
    page.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return page
