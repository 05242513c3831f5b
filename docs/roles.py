"""Sphinx's roles in docstrings, as the site's links and code; an extension of griffe, used by
mkdocs.yml.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """All objects below a package."""
        self._rewrite(pkg)

    def _rewrite(self, where: griffe.Object) -> None:
        if where.docstring is not None:
            where.docstring.value = rewrite(where.docstring.value, where)
        for member in where.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member)


def rewrite(text: str, where: griffe.Object) -> str:
    """One docstring."""
    text = re.sub(
        r":(?:class|func|meth|attr|mod|data):`(~?)([\w.]+)`",
        lambda m: link(m[1], m[2], where),
        text,
    )
    text = re.sub(r":math:`([^`]+)`", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"^( *)\.\. math::\n((?:\1 +\S.*\n|\n)+)", formula, text, flags=re.MULTILINE)
    text = re.sub(
        r"^( *Returns:\n[^\n]*?): ", r"\1&#58; ", text, flags=re.MULTILINE
    )  # else what is before is a type
    text = re.sub(
        r"^( *)(=+(?: +=+)+)\n.*\n\1\2\n(?:.*\n)*?\1\2\n", table, text, flags=re.MULTILINE
    )
    text = re.sub(r"^( *)>>> .*\n?(?:\1\S.*\n?)*", session, text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def link(short: str, name: str, where: griffe.Object) -> str:
    """To what a name means there; plain code where the site does not describe it."""
    scope = where if where.is_class or where.is_module else where.parent
    first, *rest = name.split(".")
    try:
        assert scope is not None
        path = ".".join([scope.resolve(first), *rest])
    except (griffe.NameResolutionError, AssertionError):
        path = name
    shown = name.split(".")[-1] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def table(match: re.Match[str]) -> str:
    """A table in columns, as it is written."""
    return f"{match[1]}```text\n{match[0]}{match[1]}```\n"


def session(match: re.Match[str]) -> str:
    """An example with its prompts, as code."""
    return f"{match[1]}```pycon\n{match[0].rstrip()}\n{match[1]}```\n"


def formula(match: re.Match[str]) -> str:
    """A displayed formula, as it is written."""
    body = textwrap.indent(textwrap.dedent(match[2]).strip("\n"), match[1])
    return f"{match[1]}```tex\n{body}\n{match[1]}```\n\n"
