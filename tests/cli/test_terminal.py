"""Colours, tables where the terminal is narrow, and checks of --out before a command works."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from cifar_hpc.cli.terminal import Column, fit, lay_out, output_file, output_folder, paint, shorten, use_colour
from cifar_hpc.errors import SpecError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # https://no-color.org: not an empty string
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_wanted(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert use_colour(Terminal()) is expected
    assert not use_colour(io.StringIO())


def test_paint() -> None:
    assert paint("a", "bold red") == "\x1b[1;31ma\x1b[0m"
    assert paint("a", "") == "a" and paint("", "red") == ""
    assert paint("a", "bold cyan").startswith("\x1b[1;36m")


def table() -> list[Column]:
    return [
        Column("name", ["a", "long name"]),
        Column("count", ["7", "123456"], right=True),
        Column("causes", ["1 one, 2 two, 3 three", "none"], separator=", "),
    ]


def test_numbers_are_flush_right_and_no_line_ends_in_blanks() -> None:
    assert lay_out(table()) == [
        "name        count  causes",
        "a               7  1 one, 2 two, 3 three",
        "long name  123456  none",
    ]


def test_cells_are_wrapped_before_columns_are_left_out() -> None:
    assert lay_out(fit(table(), 33, ["name"])) == [
        "name        count  causes",
        "a               7  1 one, 2 two,",
        "                   3 three",
        "long name  123456  none",
    ]
    assert lay_out(fit(table(), 26, ["name"]))[1:4] == [
        "a               7  1 one,",
        "                   2 two,",
        "                   3 three",
    ]
    assert lay_out(fit(table(), 25, ["name", "count"]))[:2] == [
        " count  causes",
        "     7  1 one, 2 two,",
    ]


def test_lines_are_cut_where_no_more_columns_may_go() -> None:
    assert lay_out(fit(table(), 20, []), 20)[0] == "name        count  …"


def test_a_style_is_that_of_a_cell_or_of_a_line() -> None:
    columns = table()[:2]
    head, first, second = lay_out(columns, styles=[(None, "bold"), (1, "red"), (None, "")])
    assert head == "\x1b[1mname        count\x1b[0m"
    assert first == "a          \x1b[31m     7\x1b[0m"
    assert second == lay_out(columns)[2]


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


def test_files_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, link = tmp_path / "old.csv", tmp_path / "link.csv"
    old.write_text("x")
    link.symlink_to(old)
    assert output_file("new.csv") == tmp_path / "new.csv"
    assert output_file("old.csv", ".csv") == old
    assert output_file("link.csv") == old  # so that the link stays one
    assert output_file("none/deep/x.csv").parent.is_dir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of --out=~/x, which a shell leaves as it is
    assert output_file("~/x.csv") == tmp_path / "home" / "x.csv" and output_folder("~/a") == tmp_path / "home" / "a"
    with pytest.raises(SpecError, match=r"--out: '~nobody-here' names no user"):
        output_folder("~nobody-here")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("/dev/null", "is no regular file but a device"),
        (".", "not allowed"),
        ("", "not allowed"),
        ("file/x.csv", "file cannot be made: File exists; allowed: a folder"),
        ("file/in/x.csv", "in cannot be made: Not a directory"),
        ("folder", "is no regular file but a directory"),
        ("fifo", "is no regular file but a FIFO"),
        ("circle", "cannot be written|no regular file"),
        ("locked/x.csv", "not writable by you"),
        ("a\0b", "cannot be written"),
    ],
)
def test_files_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to("circle")
    real = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and real(path, mode))
    with pytest.raises(SpecError, match=rf"^--out: .*({words})"):
        output_file(out)


def test_a_name_has_to_end_as_it_should() -> None:
    for name in ("model.pt", ".safetensors", "model.safetensors/"):
        with pytest.raises(SpecError, match=re.escape("ends with .safetensors")):
            output_file(name, ".safetensors")


def test_folders_are_made(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").touch()
    for name in ("file", "file/x"):
        with pytest.raises(SpecError, match=r"^--out: .* cannot be made"):
            output_folder(str(tmp_path / name))
