"""Tables of text: aligned columns, fitted to the width of a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from cifar_hpc.cli.terminal import paint

GAP = "  "
Style = tuple[int | None, str]  # (index of the cell that has the style, or None for the whole row; a style of `paint`)


@dataclass
class Column:
    """One column.

    right: aligned at the right, for numbers.
    separator: a cell may continue on another line after this text; empty for cells of one line.
    width, least: characters for all cells in one line each, and for cells that are wrapped at each separator.
    """

    heading: str
    cells: Sequence[str]
    right: bool = False
    separator: str = ""
    width: int = field(init=False)
    least: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.least = max(len(self.heading), max(map(len, self.cells), default=0))
        if self.separator:
            self.least = max(len(piece) for text in (self.heading, *self.cells) for piece in self._pieces(text))

    def lines(self, text: str) -> list[str]:
        """A cell, or the heading, as padded lines."""
        first, *rest = self._pieces(text) if len(text) > self.width else [text]
        lines = [first]
        for piece in rest:
            if len(lines[-1]) + 1 + len(piece) <= self.width:
                lines[-1] += f" {piece}"
            else:
                lines.append(piece)
        return [line.rjust(self.width) if self.right else line.ljust(self.width) for line in lines]

    def _pieces(self, text: str) -> list[str]:
        return text.replace(self.separator, f"{self.separator.rstrip()}\n").split("\n")


class Line(NamedTuple):
    """A line of a table in three parts, of which `cell` has a style."""

    before: str
    cell: str
    after: str
    style: str

    @property
    def text(self) -> str:
        return self.before + self.cell + self.after

    @property
    def painted(self) -> str:
        return self.before + paint(self.cell, self.style) + self.after


def fit(columns: Sequence[Column], width: int, drop: Iterable[str]) -> list[Column]:
    """The columns that fit into `width`. Columns that wrap are as wide as the others let them be.

    Args:
        drop: headings of the columns that may be left out, the least important first.
    """
    kept = list(columns)
    for heading in drop:
        if least_width(kept) <= width:
            break
        kept = [column for column in kept if column.heading != heading]
    room = max(0, width - least_width(kept))
    for column in kept:
        column.width = min(column.width, column.least + room)
        room -= column.width - column.least
    return kept


def least_width(columns: Sequence[Column]) -> int:
    """The width of a table in which each cell that can be wrapped is."""
    return sum(column.least for column in columns) + len(GAP) * (len(columns) - 1)


def lay_out(columns: Sequence[Column], styles: Sequence[Style], width: int | None = None) -> list[Line]:
    """The lines of the table, headings first.

    Args:
        styles: one for the headings, then one for each row.
        width: lines are cut there; None for whole lines.
    """
    table = []
    rows = zip(*((column.heading, *column.cells) for column in columns), strict=True)
    for row, (styled, style) in zip(rows, styles, strict=True):
        wrapped = [column.lines(cell) for column, cell in zip(columns, row, strict=True)]
        for number, cells in enumerate(zip_longest(*wrapped)):
            padded = [" " * column.width if c is None else c for c, column in zip(cells, columns, strict=True)]
            table.append(_line(padded, styled, style if styled is None or not number else "", width))
    return table


def _line(cells: Sequence[str], styled: int | None, style: str, width: int | None) -> Line:
    if styled is None:
        text = GAP.join(cells).rstrip()
        return Line("", text if width is None else shorten(text, width), "", style)
    before, cell = GAP.join([*cells[:styled], ""]), cells[styled]
    after = GAP.join(["", *cells[styled + 1 :]]).rstrip()
    return Line(before, cell, after if width is None else shorten(after, width - len(before + cell)), style)


def shorten(text: str, width: int, keep_end: int = 0) -> str:
    """`text` in at most `width` columns of characters, with an ellipsis in place of what is left out.

    Args:
        keep_end: so many characters at the end stay, such as the hash in a run's name.
    """
    if display_width(text) <= width:
        return text
    end = text[len(text) - keep_end :] if keep_end else ""
    room, kept = width - len(end) - 1, ""
    for character in text:
        room -= display_width(character)
        if room < 0:
            break
        kept += character
    return f"{kept}…{end}"[: max(0, width)]


def display_width(text: str) -> int:
    """Columns of a terminal that the text takes (Unicode Standard Annex 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)
