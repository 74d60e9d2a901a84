"""A legend below a figure, in as many columns as its words leave room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LETTERS_AN_INCH = 18  # of a legend's text
SAMPLE_LETTERS = 8  # the room of an entry's sample and of the gap to the next column
MOST_COLUMNS = 4
ROW = 0.15  # inches


@dataclass(frozen=True)
class Entry:
    """A line of the legend.

    figures: the end of the text, which is never cut.
    style: of the sample, as Line2D takes it, or with a `facecolor` as Patch does.
    band: whether the sample is a line in a band.
    """

    text: str
    style: Mapping[str, Any]
    figures: str = ""
    band: bool = False


def add_legend(figure: Figure, entries: Sequence[Entry], title: str = "") -> None:
    """Put the legend below the axes of a figure, which becomes as much higher."""
    if not entries:
        return
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    letters = int(width * LETTERS_AN_INCH)
    room = letters - SAMPLE_LETTERS
    texts = [shorten(entry.text, room - len(entry.figures)) + entry.figures for entry in entries]
    columns = _columns(texts, letters)
    figure.set_size_inches(width, height + ROW * (-(-len(entries) // columns) + bool(title)))
    handles: list[Any] = []
    for entry in entries:
        if "facecolor" in entry.style:
            handles.append(Patch(**dict(entry.style), linewidth=0.4))
            continue
        line = Line2D([], [], **dict(entry.style))
        handles.append((Patch(color=line.get_color(), alpha=0.2, linewidth=0), line) if entry.band else line)
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=1, pad=0)},
        title=title or None,
        title_fontsize=7,
        alignment="left",
        columnspacing=1.2,
        handlelength=2.4,
        labelspacing=0.3,
        borderpad=0.2,
    )


def shorten(text: str, letters: int) -> str:
    """`text` without its middle where it is longer than so many letters: names often differ in their ends."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


def _columns(texts: Sequence[str], letters: int) -> int:
    widest = max(map(len, texts)) + SAMPLE_LETTERS
    return max(1, min(MOST_COLUMNS, letters // widest, len(texts)))
