"""Figure of runs in time: waiting, training, checkpoints and interruptions."""

import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cifar_hpc.cli.figures import style
from cifar_hpc.cli.figures.style import COLOURS, DOUBLE_COLUMN, Axes, Figure, add_legend, new_figure, shorten
from cifar_hpc.runs.timeline import LOST, STARTING, TRAINING, WAITING, Timeline

MOST_ROWS = 40
ROW_HEIGHT, PROGRESS_HEIGHT, AROUND = 0.24, 1.5, style.ABOVE + style.BELOW  # inches
LABEL_LETTERS, LABEL_LINES = 40, 2
BAR = 0.5  # of a row's height
SPANS: dict[str, tuple[str, dict[str, Any]]] = {
    WAITING: ("waiting", {"facecolor": "#f4f4f4", "edgecolor": "#aaaaaa", "hatch": "//////"}),
    STARTING: ("starting", {"facecolor": "#555555", "edgecolor": "#555555"}),
    TRAINING: ("training", {"facecolor": COLOURS[5], "edgecolor": COLOURS[5]}),
    LOST: ("training that was lost and done again", {"facecolor": "white", "edgecolor": COLOURS[1], "hatch": "xxxxxx"}),
}
CHECKPOINT = "checkpoint"
UNDER, OVER = 0.36, -0.36  # the middle of a row
MARKS: dict[str, tuple[str, str, float, float]] = {  # marker, colour, size, height
    CHECKPOINT: ("|", COLOURS[0], 4.0, 0.15),
    "restart": ("^", COLOURS[2], 4.5, UNDER),
    "preempted": ("v", COLOURS[1], 4.5, OVER),
    "requeued": ("<", COLOURS[2], 4.5, OVER),
    "timeout": ("H", COLOURS[3], 4.5, OVER),
    "stopped": ("s", COLOURS[6], 4.5, OVER),
    "cancelled": ("D", COLOURS[6], 4.5, OVER),
    "failed": ("X", COLOURS[6], 5.5, OVER),
    "hung": ("P", COLOURS[6], 5.5, OVER),
    "finished": ("*", COLOURS[6], 8.0, OVER),
    "under way": (">", "#666666", 4.5, OVER),
}
UNITS = (("days", "d", 86400), ("hours", "h", 3600), ("minutes", "min", 60), ("seconds", "s", 1))


def timeline_figure(shown: Sequence[Timeline], labels: Sequence[str], left_out: int = 0) -> Figure:
    """A row for each run; for a single one the epochs and checkpoints as well.

    Args:
        shown: at most MOST_ROWS, each with at least one span or mark.
        labels: of the rows, each in one line or two.
        left_out: number of runs that are not shown, which the figure says.
    """
    alone = len(shown) == 1
    begin = min(timeline.begin for timeline in shown)
    unit, _, length = _unit(max(timeline.end for timeline in shown) - begin, 3)
    heights = [PROGRESS_HEIGHT, 1.6 * ROW_HEIGHT] if alone else [ROW_HEIGHT * len(shown)]
    figure = new_figure(DOUBLE_COLUMN, sum(heights) + AROUND)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    rows: Axes = axes[-1]
    entries = _draw_rows(rows, shown, begin, length)
    if alone:
        _draw_progress(axes[0], shown[0], begin, length)
    more = f"; {left_out} more runs are not shown" if left_out else ""
    exact = "%Y-%m-%d %H:%M:%S" if unit in ("seconds", "minutes") else "%Y-%m-%d %H:%M"
    since = f"{unit} since {datetime.fromtimestamp(begin, UTC):{exact}} UTC"
    rows.set(ylim=(len(shown) - 0.4, -0.6), xlabel=since + more)
    folded = ["\n".join(textwrap.wrap(shorten(x, LABEL_LINES * LABEL_LETTERS), LABEL_LETTERS)) for x in labels]
    rows.set_yticks([] if alone else range(len(shown)), [] if alone else folded)
    rows.tick_params(axis="y", length=0, labelsize=5.5 if any("\n" in label for label in folded) else 7)
    rows.grid(visible=False, axis="y")
    rows.spines["left"].set_visible(False)
    rows.margins(x=0.01)
    names = max((label.get_window_extent().width for label in rows.get_yticklabels()), default=0) / figure.dpi
    add_legend(figure, entries, left=style.LEFT if alone else names + 0.12, gap=0.2)
    return figure


def fits(label: str) -> bool:
    """True if the label of a row needs no more than two lines."""
    return len(textwrap.wrap(label, LABEL_LETTERS)) <= LABEL_LINES


def _draw_rows(axis: Axes, shown: Sequence[Timeline], begin: float, length: float) -> list[tuple[Any, str, str]]:
    """Draw the bars and marks; return the legend's entries, with how long each kind of bar took and the number of
    marks. Checkpoints are drawn of a single run only."""
    entries: list[tuple[Any, str, str]] = []
    for kind, (words, look) in SPANS.items():
        sample: Any = None
        for row, timeline in enumerate(shown):
            bars = [((s.begin - begin) / length, (s.end - s.begin) / length) for s in timeline.spans if s.kind == kind]
            if bars:
                sample = axis.broken_barh(bars, (row - BAR / 2, BAR), **look, linewidth=0.4, gid=kind)
        if sample:
            entries.append((sample, words, f": {in_words(sum(timeline.seconds(kind) for timeline in shown))}"))
    for kind, (marker, colour, size, height) in MARKS.items():
        moments = [((at - begin) / length, row + height) for row, one in enumerate(shown) for at in one.moments(kind)]
        if moments and (kind != CHECKPOINT or len(shown) == 1):
            edge = colour if kind == CHECKPOINT else "white"
            marks: Any = {"marker": marker, "color": colour, "markersize": size, "markeredgecolor": edge, "gid": kind}
            marks |= {"linestyle": "", "markeredgewidth": 0.4, "zorder": 4, "clip_on": False}
            (sample,) = axis.plot(*zip(*moments, strict=True), **marks)
            entries.append((sample, kind, f": {len(moments):,}"))
    return entries


def _draw_progress(axis: Axes, timeline: Timeline, begin: float, length: float) -> None:
    """Epochs against time; a thin line where nothing was trained."""
    for span in timeline.spans:
        if span.kind == WAITING:
            axis.axvspan((span.begin - begin) / length, (span.end - begin) / length, color="#f0f0f0", linewidth=0)
    before: list[tuple[float, float]] = []
    for line in filter(None, timeline.progress):
        points = [((at - begin) / length, epochs) for at, epochs in line]
        if before:
            axis.plot(*zip(before[-1], points[0], strict=True), color="#888888", linewidth=0.7, linestyle=":")
        axis.plot(*zip(*points, strict=True), color=COLOURS[0], gid="progress")
        before = points
    axis.locator_params("y", integer=True, nbins=6, min_n_ticks=1)
    axis.set(ylabel="epochs done", ylim=(0, None))


def in_words(seconds: float) -> str:
    """A length of time in the unit that suits it, such as 2.4 min."""
    _, unit, length = _unit(seconds, 1.5)
    number = seconds / length
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"


def _unit(seconds: float, least: float) -> tuple[str, str, int]:
    """The largest unit of which there are at least so many in a length of time."""
    return next((unit for unit in UNITS if seconds >= least * unit[2]), UNITS[-1])
