"""Accuracy, loss and learning rate as text, for a terminal or a file."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import cycle

from cifar_hpc.cli.figures.curves import OTHERS, looks, merge_equal
from cifar_hpc.cli.figures.series import Curve, Series, steep_part_left_out
from cifar_hpc.cli.figures.style import shorten
from cifar_hpc.text import printable

# Of xterm's 256 colours those next to Okabe and Ito's.
COLOURS = (74, 208, 36, 175, 214, 25)
LETTERS = string.ascii_uppercase + string.ascii_lowercase
LEAST_WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 40, 10, 22
LEARNING_RATE = "learning rate"
Labelled = tuple[str, str, Curve]  # label, its values, curve
# The frame on a terminal without UTF-8.
_ASCII = str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-||++++")


def draw(series: Sequence[Series], width: int, height: int, *, colours: bool, ascii_only: bool = False) -> str:
    """The three charts below each other, each at most `height` lines high.

    Args:
        series: of a single one training and test are drawn; of several the test, of the best where they are many.
        width: columns of the terminal.
        height: its lines.
        colours: with escape codes; without them letters tell the lines apart.
        ascii_only: no characters beyond ASCII.
    """
    shown = [one for one, style in looks(series) if style is not OTHERS]
    size = max(width, LEAST_WIDTH), height
    alone = len(shown) == 1
    charts = []
    for title, what in (("accuracy (%)", "accuracy"), ("loss", "loss")):
        lines = [(one.label, _values(one, what, alone), one.line(f"test_{what}").mean) for one in shown]
        if alone:
            lines = [("training", "", shown[0].line(f"train_{what}").mean), ("test", *lines[0][1:])]
        charts.append(_chart(title if alone else f"test {title}", lines, size, colours, alone))
    rates = [(label, "", curve) for label, curve in merge_equal(shown)]
    charts.append(_chart(LEARNING_RATE, rates, size, colours, False))
    if len(shown) < len(series):
        charts.append(f"{len(series) - len(shown)} with lower test accuracy are not shown.")
    text = "\n\n".join(charts)
    return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text


def _values(one: Series, what: str, alone: bool) -> str:
    score = one.score() if what == "accuracy" else None
    at = f" at epoch {score.epoch}" if score and alone else ""
    return f": {score.last_text}{at}, best {score.best:.2f}" if score else ""


def _chart(title: str, lines: Sequence[Labelled], size: tuple[int, int], colours: bool, pair: bool) -> str:
    """A chart, and below it a legend where there are several lines; labels are cut to the width.

    Args:
        pair: the lines are training and test of one series.
    """
    import plotext  # type: ignore[import-untyped]

    width, height = size
    plotext.terminal.limit(False, False)  # it would cut to what it takes for the terminal's size
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.canvas("default")
    figure.plot_size(width, max(LEAST_HEIGHT, min(MOST_HEIGHT, height - 2 - len(lines))))
    figure.title(title)
    figure.label("epoch", "x")
    limits = steep_part_left_out([curve for *_, curve in lines])
    if limits and title != LEARNING_RATE:
        figure.ruler("y").lim(*limits)
    ticks = _ticks([epoch for *_, curve in lines for epoch in curve], width)
    figure.ruler("x").ticks(ticks, list(map(str, ticks)))
    letters, palette = (".*", COLOURS[1::-1]) if pair else (LETTERS, COLOURS)
    legend = []
    for (label, values, curve), letter, colour in zip(lines, cycle(letters), cycle(palette), strict=False):
        fine = colours and len(lines) <= 2
        if curve:
            marker = plotext.marker("braille" if fine else letter, colour if colours else None)
            figure.draw(figure.signal(list(curve), list(curve.values()), marker=marker).lines())
        sign = "──" if fine else letter
        name = shorten(printable(label), width - 4 - len(sign) - len(values))
        legend.append(f"  \x1b[38;5;{colour}m{sign}\x1b[0m {name}{values}" if colours else f"  {sign} {name}{values}")
    text: str = figure.build().string(colorless=not colours)
    return "\n".join([line.rstrip() for line in text.splitlines()] + (legend if len(lines) > 1 else []))


def _ticks(epochs: Sequence[int], width: int) -> list[int]:
    """Round numbers, with the first and the last epoch."""
    first, last = min(epochs, default=1), max(epochs, default=1)
    most = max(2, width // 12)
    step = next(n * 10**power for power in range(7) for n in (1, 2, 5) if last - first <= most * n * 10**power)
    inside = [e for e in range(-(-first // step) * step, last, step) if e - first >= step / 2 and last - e >= step / 2]
    return sorted({first, *inside, last})
