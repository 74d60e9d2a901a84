"""Accuracy, loss and learning rate as text, for a terminal far away or a file."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_hpc.cli.figures.plot_curves import OTHERS, looks, merge_equal
from cifar_hpc.cli.figures.plot_data import Curve, Score, Series, steep_part_left_out
from cifar_hpc.cli.figures.plot_legend import shorten
from cifar_hpc.text import printable

# Of xterm's 256 colours those next to Okabe and Ito's.
COLOURS = (74, 208, 36, 175, 214, 25)
LETTERS = string.ascii_uppercase + string.ascii_lowercase
LEAST_WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 40, 10, 22
FINE = "braille"  # eight dots in a character
# What a terminal without UTF-8 has for the frame.
_ASCII = str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-||++++")


@dataclass(frozen=True)
class _Drawn:
    label: str
    figures: str
    curve: Curve
    marker: str
    colour: int | None


def draw(series: Sequence[Series], width: int, height: int, *, colours: bool, ascii_only: bool = False) -> str:
    """The three charts below each other, each at most `height` lines high.

    Args:
        series: of a single one training and test are drawn; of several the test, of the best where they are many.
        width: columns of the terminal.
        height: its lines.
        colours: with escape codes; without them letters tell the lines apart.
        ascii_only: no characters beyond ASCII.
    """
    shown = [one for one, look in looks(series) if look is not OTHERS]
    width = max(width, LEAST_WIDTH)
    charts = []
    for title, lines in (
        ("accuracy (%)", _two_curves(shown, "accuracy", colours)),
        ("loss", _two_curves(shown, "loss", colours)),
        ("learning rate", _styled(merge_equal(shown), colours)),
    ):
        rows = max(LEAST_HEIGHT, min(MOST_HEIGHT, height - 2 - len(lines)))
        before = "" if len(shown) == 1 or title == "learning rate" else "test "
        charts.append("\n".join([_chart(f"{before}{title}", lines, (width, rows), colours), *_legend(lines, width)]))
    if len(shown) < len(series):
        charts.append(f"{len(series) - len(shown)} with lower test accuracy are not shown.")
    text = "\n\n".join(charts)
    return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text


def _two_curves(series: Sequence[Series], what: str, colours: bool) -> list[_Drawn]:
    if len(series) > 1:
        figures = [_figures(one.score(), what, alone=False) for one in series]
        lines = _styled([(one.label, one.line(f"test_{what}").mean) for one in series], colours)
        return [dataclasses.replace(line, figures=end) for line, end in zip(lines, figures, strict=True)]
    one, marks = series[0], (FINE, FINE) if colours else (".", "*")
    training, test = one.line(f"train_{what}").mean, one.line(f"test_{what}").mean
    return [
        _Drawn("training", "", training, marks[0], COLOURS[1] if colours else None),
        _Drawn("test", _figures(one.score(), what, alone=True), test, marks[1], COLOURS[0] if colours else None),
    ]


def _figures(score: Score | None, what: str, alone: bool) -> str:
    if score is None or what != "accuracy":
        return ""
    spread = "" if score.last_deviation is None else f" ± {score.last_deviation:.2f}"
    at = f" at epoch {score.epoch}" if alone else ""
    return f": {score.last:.2f}{spread}{at}, best {score.best:.2f}"


def _styled(curves: Sequence[tuple[str, Curve]], colours: bool) -> list[_Drawn]:
    return [
        _Drawn(
            label,
            "",
            curve,
            FINE if colours and len(curves) <= 2 else LETTERS[number % len(LETTERS)],
            COLOURS[number % len(COLOURS)] if colours else None,
        )
        for number, (label, curve) in enumerate(curves)
    ]


def _chart(title: str, lines: Sequence[_Drawn], size: tuple[int, int], colours: bool) -> str:
    import plotext  # type: ignore[import-untyped]

    plotext.terminal.limit(False, False)  # it would cut to what it takes for the terminal's size
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.canvas("default")
    figure.plot_size(*size)
    figure.title(title)
    figure.label("epoch", "x")
    limits = steep_part_left_out([line.curve for line in lines]) if title != "learning rate" else None
    if limits is not None:
        figure.ruler("y").lim(*limits)
    ticks = _ticks([epoch for line in lines for epoch in line.curve], size[0])
    figure.ruler("x").ticks(ticks, list(map(str, ticks)))
    for line in lines:
        if line.curve:
            marker = plotext.marker(line.marker, line.colour)
            figure.draw(figure.signal(list(line.curve), list(line.curve.values()), marker=marker).lines())
    text: str = figure.build().string(colorless=not colours)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _ticks(epochs: Sequence[int], width: int) -> list[int]:
    """Round numbers, with the first and the last epoch."""
    first, last = min(epochs, default=1), max(epochs, default=1)
    most = max(2, width // 12)
    sizes = (factor * 10**power for power in range(7) for factor in (1, 2, 5))
    step = next(size for size in sizes if (last - first) / size <= most)
    inside = [e for e in range(-(-first // step) * step, last, step) if e - first >= step / 2 and last - e >= step / 2]
    return sorted({first, *inside, last})


def _legend(lines: Sequence[_Drawn], width: int) -> list[str]:
    """A line for each of several; labels are cut to the width of the terminal."""
    if len(lines) < 2:
        return []
    signs = ["──" if line.marker == FINE else line.marker for line in lines]
    coloured = [
        sign if line.colour is None else f"\x1b[38;5;{line.colour}m{sign}\x1b[0m"
        for sign, line in zip(signs, lines, strict=True)
    ]
    room = width - 4 - max(map(len, signs))
    return [
        f"  {sign} {shorten(printable(line.label), room - len(line.figures))}{line.figures}"
        for sign, line in zip(coloured, lines, strict=True)
    ]
