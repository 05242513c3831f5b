"""Rows as aligned text."""

from __future__ import annotations

import pytest

from dni_fx.reports.tables import table

ROWS = [("name", "count", "share", ""), ("a", "9", "-", ""), ("long", "10", "7 %", "note")]


def test_numbers_end_at_the_right_and_words_begin_at_the_left() -> None:
    assert table(ROWS) == [
        "name  count  share",
        "----  -----  -----  ----",
        "a         9      -",
        "long     10    7 %  note",
    ]


def test_columns_at_the_left_can_be_named() -> None:
    assert table(ROWS, left=range(4)) == [
        "name  count  share",
        "----  -----  -----  ----",
        "a     9      -",
        "long  10     7 %    note",
    ]
    assert table(ROWS, left=())[2] == "   a      9      -"


def test_a_table_without_a_rule_and_one_of_titles_alone() -> None:
    assert table(ROWS, ruled=False) == [line for line in table(ROWS) if "--" not in line]
    assert table(ROWS[:1]) == ["name  count  share", "----  -----  -----"]


def test_rows_of_unequal_length_are_no_table() -> None:
    with pytest.raises(ValueError, match="shorter"):
        table([*ROWS, ("short",)])
