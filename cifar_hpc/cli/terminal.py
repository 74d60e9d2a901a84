"""Output of commands: colours (https://no-color.org), tables fitted to the width of a terminal, checks of --out."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from pathlib import Path
from typing import TextIO

from cifar_hpc.errors import SpecError
from cifar_hpc.files import DIRECTORY_MODE, expand_home, kind_of
from cifar_hpc.text import shown

# SGR parameters (ECMA-48)
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36"}
GAP = "  "
Style = tuple[int | None, str]  # (index of the cell that has the style, or None for the whole row; a style of `paint`)
PLAIN: Style = (None, "")


def use_colour(stream: TextIO) -> bool:
    """Check that text for `stream` may be coloured."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, style: str) -> str:
    """`text` in a style such as `bold red`; unchanged if that is empty."""
    codes = ";".join(_CODES[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


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


def lay_out(columns: Sequence[Column], width: int | None = None, styles: Sequence[Style] = ()) -> list[str]:
    """The lines of the table, headings first.

    Args:
        width: lines are cut there; None for whole lines.
        styles: one for the headings, then one for each row; none for a table without colours.
    """
    table = []
    rows = zip(*((column.heading, *column.cells) for column in columns), strict=True)
    for row, (styled, style) in zip(rows, styles or repeat(PLAIN)):  # noqa: B905 - repeat has no end
        wrapped = [column.lines(cell) for column, cell in zip(columns, row, strict=True)]
        for number, cells in enumerate(zip_longest(*wrapped)):
            padded = [" " * column.width if c is None else c for c, column in zip(cells, columns, strict=True)]
            line = GAP.join(padded).rstrip()
            line = line if width is None else shorten(line, width)
            if styled is None:
                line = paint(line, style)
            elif number == 0:
                begin = len(GAP.join([*padded[:styled], ""]))
                end = begin + len(padded[styled])
                line = line[:begin] + paint(line[begin:end], style) + line[end:]
            table.append(line)
    return table


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
    """Columns of a terminal that the text takes."""
    if text.isascii():  # nearly always: without the time to import rich
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def output_file(text: str, suffix: str = "") -> Path:
    """The file of --out, which may exist; of a symbolic link its target. A missing folder is created.

    Args:
        suffix: required end of its name.

    Raises:
        SpecError: its suffix differs, it is no regular file, or its folder cannot be created or is not writable.
    """
    path = Path(expand_home(text, "--out"))
    if not text.endswith(suffix) or path.name in ("", suffix):
        raise SpecError(f"--out: {shown(text)} is not allowed; allowed: a file name that ends with {suffix}.")
    try:
        path = path.resolve()
        mode = path.stat().st_mode if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a circle of symbolic links, or a NUL character
        raise SpecError(f"--out: {text} cannot be written: {error}.") from None
    if mode is not None and not path.is_file():
        raise SpecError(f"--out: {path} is no regular file but {kind_of(mode)}; allowed: a file.")
    output_folder(str(path.parent))
    return path


def output_folder(text: str) -> Path:
    """The folder of --out, created if missing.

    Raises:
        SpecError: it cannot be created, or is not writable.
    """
    path = Path(expand_home(text, "--out"))
    try:
        path.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out: {path} cannot be made: {error.strerror}; allowed: a folder.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise SpecError(f"--out: the folder {path} is not writable by you.")
    return path
