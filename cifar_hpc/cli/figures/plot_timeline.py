"""The figure of what happened to runs in time: waiting, training, checkpoints, and what came between."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.figures.figure_style import COLOURS, DOUBLE_COLUMN, new_figure
from cifar_hpc.cli.figures.plot_legend import Entry, add_legend, shorten
from cifar_hpc.runs.timeline import LOST, STARTING, TRAINING, WAITING, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_ROWS = 40
ROW_HEIGHT, PROGRESS_HEIGHT, AROUND = 0.24, 1.5, 0.5  # inches
LABEL_LETTERS = 40
BAR = 0.5  # of a row's height
SPANS: dict[str, tuple[str, dict[str, Any]]] = {
    WAITING: ("waiting", {"facecolor": "#f4f4f4", "edgecolor": "#aaaaaa", "hatch": "//////"}),
    STARTING: ("starting", {"facecolor": COLOURS[4], "edgecolor": COLOURS[4]}),
    TRAINING: ("training", {"facecolor": COLOURS[5], "edgecolor": COLOURS[5]}),
    LOST: ("training that was lost and done again", {"facecolor": "white", "edgecolor": COLOURS[1], "hatch": "xxxxxx"}),
}
MARKS: dict[str, tuple[str, str]] = {
    "restart": ("^", COLOURS[2]),
    "preempted": ("v", COLOURS[1]),
    "timeout": ("v", COLOURS[3]),
    "stopped": ("s", COLOURS[6]),
    "cancelled": ("D", COLOURS[6]),
    "failed": ("X", COLOURS[6]),
    "hung": ("P", COLOURS[6]),
    "finished": ("*", COLOURS[6]),
    "under way": (">", "#666666"),
}
CHECKPOINT: dict[str, Any] = {
    "linestyle": "",
    "marker": "|",
    "color": COLOURS[0],
    "markersize": 4,
    "markeredgewidth": 0.5,
}
UNITS = (("seconds", 1.0, 300.0), ("minutes", 60.0, 3 * 3600.0), ("hours", 3600.0, 4 * 86400.0), ("days", 86400.0, 0.0))


def timeline_figure(shown: Sequence[Timeline], labels: Sequence[str], left_out: int = 0) -> Figure:
    """A row for each run; for a single one the epochs as well.

    Args:
        shown: at most MOST_ROWS; each has a span at least.
        labels: of the rows.
        left_out: how many runs are not shown, which the figure says.
    """
    begin, end = min(t.begin for t in shown), max(t.end for t in shown)
    unit, seconds, _ = next(u for u in UNITS if end - begin < u[2] or u is UNITS[-1])
    alone = len(shown) == 1
    heights = [PROGRESS_HEIGHT, 1.6 * ROW_HEIGHT] if alone else [ROW_HEIGHT * len(shown)]
    figure = new_figure(DOUBLE_COLUMN, sum(heights) + AROUND)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if alone:
        _draw_progress(axes[0], shown[0], begin, seconds)
        saved = [(at - begin) / seconds for at in shown[0].moments("checkpoint")]
        _draw_marks(axes[-1], saved, 0.15, "checkpoint", CHECKPOINT)
    for row, timeline in enumerate(shown):
        _draw_row(axes[-1], row, timeline, begin, seconds)
    names = [shorten(label, LABEL_LETTERS) for label in labels]
    _finish_rows(axes[-1], [] if alone else names)
    axes[-1].set_xlabel(
        f"{unit} since {datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M} UTC"
        + (f"; {left_out} more runs are not shown" if left_out else "")
    )
    room = 0.01 * (end - begin) or seconds
    axes[-1].set_xlim(-room / seconds, (end - begin + room) / seconds)
    add_legend(figure, _entries(shown))
    return figure


def _draw_row(axis: Axes, row: int, timeline: Timeline, begin: float, unit: float) -> None:
    for kind, (_, style) in SPANS.items():
        bars = [((s.begin - begin) / unit, (s.end - s.begin) / unit) for s in timeline.spans if s.kind == kind]
        if bars:
            axis.broken_barh(bars, (row - BAR / 2, BAR), **style, linewidth=0.4, gid=kind)
    for kind, (marker, colour) in MARKS.items():
        height = row + 0.36 if kind == "restart" else row - 0.36
        _draw_marks(axis, [(at - begin) / unit for at in timeline.moments(kind)], height, kind, _style(marker, colour))


def _draw_marks(axis: Axes, moments: Sequence[float], height: float, kind: str, style: dict[str, Any]) -> None:
    if moments:  # an empty line would take room in the layout
        axis.plot(moments, [height] * len(moments), **style, zorder=4, clip_on=False, gid=kind)


def _draw_progress(axis: Axes, timeline: Timeline, begin: float, unit: float) -> None:
    """Epochs against time; a thin line where nothing was trained."""
    for span in timeline.spans:
        if span.kind == WAITING:
            axis.axvspan((span.begin - begin) / unit, (span.end - begin) / unit, color="#f0f0f0", linewidth=0)
    before: tuple[float, float] | None = None
    for line in timeline.progress:
        points = [((at - begin) / unit, epochs) for at, epochs in line]
        if before and points:
            axis.plot(*zip(before, points[0], strict=True), color="#888888", linewidth=0.7, linestyle=":")
        if points:
            axis.plot(*zip(*points, strict=True), color=COLOURS[0], gid="progress")
            before = points[-1]
    axis.set_ylabel("epochs done")
    axis.set_ylim(bottom=0)


def _finish_rows(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_ylim(max(len(labels), 1) - 0.4, -0.6)
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)


def _style(marker: str, colour: str) -> dict[str, Any]:
    size = {"*": 8.0, "X": 5.5, "P": 5.5}.get(marker, 4.5)
    return {
        "linestyle": "",
        "marker": marker,
        "color": colour,
        "markersize": size,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _entries(timelines: Sequence[Timeline]) -> list[Entry]:
    """What there is in the figure, with how long it took and how often it happened."""
    entries = []
    for kind, (words, style) in SPANS.items():
        seconds = sum(timeline.seconds(kind) for timeline in timelines)
        if seconds:
            entries.append(Entry(f"{words}: {in_words(seconds)}", style))
    checkpoints = len(timelines[0].moments("checkpoint"))
    if checkpoints and len(timelines) == 1:
        entries.append(Entry(f"checkpoint: {checkpoints:,}", CHECKPOINT))
    for kind, (marker, colour) in MARKS.items():
        count = sum(len(timeline.moments(kind)) for timeline in timelines)
        if count:
            entries.append(Entry(f"{kind}: {count:,}", _style(marker, colour)))
    return entries


def in_words(seconds: float) -> str:
    """A length of time in the unit that suits it, such as 2.4 min."""
    units = (("d", 86400), ("h", 3600), ("min", 60))
    unit, length = next((u for u in units if seconds >= 1.5 * u[1]), ("s", 1))
    number = seconds / length
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
