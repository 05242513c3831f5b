"""Rows of text as aligned tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(
    rows: Sequence[Sequence[str]], *, left: Collection[int] | None = None, ruled: bool = True
) -> list[str]:
    """The lines of a table.

    Args:
        rows: the titles, then rows with as many cells.
        left: indices of the columns that begin at the left, the others end at the right; None: all
            but those that hold nothing except numbers and ``-``.
        ruled: whether a rule stands under the titles.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if left is None:
        left = [k for k, (_, *cells) in enumerate(columns) if not _are_numbers(cells)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    rule = ["  ".join("-" * width for width in widths if width)] if ruled else []
    return [lines[0], *rule, *lines[1:]]


def _are_numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(cell[:1].isdigit() or cell == "-" for cell in cells)
