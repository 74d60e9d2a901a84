"""Tables of text: what is left out, cut or wrapped where the terminal is narrow."""

from __future__ import annotations

import pytest

from cifar_hpc.cli.table import Column, fit, lay_out, shorten

PLAIN = [(None, "")] * 3


def texts(columns: list[Column], width: int | None = None) -> list[str]:
    return [line.text for line in lay_out(columns, PLAIN, width)]


def table() -> list[Column]:
    return [
        Column("name", ["a", "long name"]),
        Column("count", ["7", "123456"], right=True),
        Column("causes", ["1 one, 2 two, 3 three", "none"], separator=", "),
    ]


def test_numbers_are_flush_right_and_no_line_ends_in_blanks() -> None:
    assert texts(table()) == [
        "name        count  causes",
        "a               7  1 one, 2 two, 3 three",
        "long name  123456  none",
    ]


def test_cells_are_wrapped_before_columns_are_left_out() -> None:
    assert texts(fit(table(), 33, ["name"])) == [
        "name        count  causes",
        "a               7  1 one, 2 two,",
        "                   3 three",
        "long name  123456  none",
    ]
    assert texts(fit(table(), 26, ["name"]))[1:4] == [
        "a               7  1 one,",
        "                   2 two,",
        "                   3 three",
    ]
    assert texts(fit(table(), 25, ["name", "count"]))[:2] == [
        " count  causes",
        "     7  1 one, 2 two,",
    ]


def test_lines_are_cut_where_no_more_columns_may_go() -> None:
    assert texts(fit(table(), 20, []), 20)[0] == "name        count  …"


def test_a_style_is_that_of_a_cell_or_of_a_line() -> None:
    columns = table()[:2]
    head, first, second = lay_out(columns, [(None, "bold"), (1, "red"), (None, "")])
    assert head.painted == "\x1b[1mname        count\x1b[0m"
    assert first.painted == "a          \x1b[31m     7\x1b[0m" and first.text == "a               7"
    assert second.painted == second.text


@pytest.mark.parametrize(
    ("text", "width", "keep", "expected"),
    [
        ("abcdef", 6, 0, "abcdef"),
        ("abcdef", 5, 0, "abcd…"),
        ("abcdefgh", 6, 2, "abc…gh"),
        ("日本語", 6, 0, "日本語"),
        ("日本語", 5, 0, "日本…"),
        ("日本語", 4, 0, "日…"),
        ("e\u0301abc", 4, 0, "e\u0301abc"),
        ("abc", 0, 0, ""),
    ],
)
def test_shorten(text: str, width: int, keep: int, expected: str) -> None:
    assert shorten(text, width, keep) == expected
