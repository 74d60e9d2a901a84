"""The figures of what was learnt: accuracy, loss and learning rate against the epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.figures.figure_style import COLOURS, DOUBLE_COLUMN, SINGLE_COLUMN, new_figure
from cifar_hpc.cli.figures.plot_data import Curve, Line, Series, steep_part_left_out
from cifar_hpc.cli.figures.plot_legend import Entry, add_legend
from cifar_hpc.runs.groups import shared_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ONE_PANEL = 3  # so many series can be told apart with training and test in one panel
# Of more series those with the lower test accuracy are grey: more styles than this nobody can tell apart.
MOST_STYLES = 2 * len(COLOURS)
PANEL_HEIGHT = 2.1  # inches
MARKED_EPOCHS = 20  # a line of so few epochs shows each of them
DENSE = 100  # with more epochs the line is thinner
THIN = 0.5
GREY = "#aaaaaa"
DASHES = (0, (4, 1.5))
RESTART: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 3,
    "markerfacecolor": "white",
    "markeredgewidth": 0.8,
}
BEST: dict[str, Any] = {
    "linestyle": "",
    "marker": "*",
    "markersize": 7,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    color: str
    linestyle: Any = "-"
    linewidth: float = 1.2
    zorder: float = 2

    @property
    def style(self) -> dict[str, Any]:
        """As Line2D takes it."""
        return dataclasses.asdict(self)


OTHERS = Look(GREY, linewidth=0.6, zorder=1.5)


def accuracy_figure(series: Sequence[Series]) -> Figure:
    """Training and test accuracy in percent; the legend has the last and the best test accuracy."""
    return _figure(series, "accuracy", "accuracy (%)")


def loss_figure(series: Sequence[Series]) -> Figure:
    """Training and test loss, label smoothing included."""
    return _figure(series, "loss", "loss (cross-entropy)")


def learning_rate_figure(series: Sequence[Series]) -> Figure:
    """The learning rate of each epoch's last update; series that have the same one are one line."""
    merged = merge_equal(series)
    entries = []
    figure = new_figure(SINGLE_COLUMN, PANEL_HEIGHT)
    axis: Axes = figure.subplots()
    for number, (label, curve) in enumerate(merged):
        look = _look(number) if number < MOST_STYLES else OTHERS
        _plot(axis, curve, look)
        if number < MOST_STYLES:
            entries.append(Entry(label, look.style))
    if len(merged) > MOST_STYLES:
        entries.append(Entry(f"{len(merged) - MOST_STYLES} others", OTHERS.style))
    _finish(axis, [curve for _, curve in merged], "learning rate")
    axis.set_ylim(bottom=0)
    add_legend(figure, entries if len(merged) > 1 else [])
    return figure


def merge_equal(series: Sequence[Series]) -> list[tuple[str, Curve]]:
    """The different learning rates, each as far as any run has got, with what the series that have it share."""
    merged: list[tuple[list[Series], Curve]] = []
    for one in series:
        for curve in (member.curves["lr"] for member in one.members):
            for owners, known in merged:
                if all(math.isclose(known[e], value, rel_tol=1e-9) for e, value in curve.items() if e in known):
                    known |= curve
                    owners.append(one)
                    break
            else:
                merged.append(([one], dict(curve)))
    words = [shared_label([one.group for one in owners]) for owners, _ in merged]
    names = [
        text if words.count(text) == 1 and text else _joined(dict.fromkeys(one.label for one in owners))
        for text, (owners, _) in zip(words, merged, strict=True)
    ]
    return [(name, dict(sorted(curve.items()))) for name, (_, curve) in zip(names, merged, strict=True)]


def _joined(labels: Iterable[str]) -> str:
    first, *others = labels
    return f"{first} and {len(others)} more" if others else first


def _figure(series: Sequence[Series], what: str, ylabel: str) -> Figure:
    wide = len(series) > ONE_PANEL
    figure = new_figure(DOUBLE_COLUMN if wide else SINGLE_COLUMN, PANEL_HEIGHT)
    panels = figure.subplots(1, 2 if wide else 1, sharey=True, squeeze=False)[0]
    training, test = panels[0], panels[-1]
    entries: list[Entry] = []
    seen: list[Curve] = []
    for one, look in looks(series):
        tested, trained = one.line(f"test_{what}"), one.line(f"train_{what}")
        beside = look if wide else _training_look(look, alone=len(series) == 1)
        _draw(training, trained, beside)
        _draw(test, tested, look)
        _mark_restarts(test, tested, look)
        seen += [tested.mean, trained.mean, *tested.beyond, *trained.beyond]
        if look.color != GREY:
            entries.append(_entry(one, look, what, alone=len(series) == 1))
    if len(series) == 1 and what == "accuracy":
        entries += _mark_best(test, series[0])
    entries += _explanations(series, what)
    for panel in panels:
        _finish(panel, seen, ylabel if panel is training else "")
    _limit(training, seen, what)
    if wide:
        training.set_title("training")
        test.set_title("test")
    add_legend(figure, entries, _legend_title(series) if what == "accuracy" else "")
    return figure


def looks(series: Sequence[Series]) -> list[tuple[Series, Look]]:
    """Each series with how it is drawn, in the given order."""
    scores = {id(one): (score.last if (score := one.score()) else -1.0) for one in series}
    best = sorted(series, key=lambda one: -scores[id(one)])[:MOST_STYLES]
    chosen = {id(one) for one in best}
    coloured = [one for one in series if id(one) in chosen]
    styles = {id(one): _look(number) for number, one in enumerate(coloured)}
    return [(one, styles.get(id(one), OTHERS)) for one in series]


def _look(number: int) -> Look:
    return Look(COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else DASHES)


def _training_look(look: Look, alone: bool) -> Look:
    return Look(COLOURS[1] if alone else look.color, DASHES, 0.9)


def _draw(axis: Axes, line: Line, look: Look) -> None:
    _plot(axis, line.mean, look)
    for curve in line.beyond:
        _plot(axis, curve, dataclasses.replace(look, linewidth=THIN))
    if line.low:
        epochs = list(line.low)
        axis.fill_between(
            epochs, list(line.low.values()), list(line.high.values()), color=look.color, alpha=0.2, linewidth=0
        )  # fmt: skip


def _plot(axis: Axes, curve: Curve, look: Look) -> None:
    marker: dict[str, Any] = {"marker": ".", "markersize": 4} if len(curve) <= MARKED_EPOCHS else {}
    width = look.linewidth * (0.75 if len(curve) > DENSE else 1)
    axis.plot(list(curve), list(curve.values()), **{**look.style, "linewidth": width}, **marker)


def _mark_restarts(axis: Axes, line: Line, look: Look) -> None:
    if line.restarts and look.color != GREY:
        style = {**RESTART, "color": look.color, "zorder": 3, "gid": "restart"}
        axis.plot(list(line.restarts), list(line.restarts.values()), **style)


def _mark_best(axis: Axes, one: Series) -> list[Entry]:
    score = one.score()
    if score is None or score.best_epoch is None or score.epoch == 1:
        return []
    style = {**BEST, "color": COLOURS[6]}
    axis.plot([score.best_epoch], [score.best], **style, zorder=4, gid="best")
    return [Entry(f"best: {score.best:.2f}% at epoch {score.best_epoch}", style)]


def _entry(one: Series, look: Look, what: str, alone: bool) -> Entry:
    """A series in the legend; in that of the accuracy with its figures."""
    seeds = f", {len(one.members)} seeds" if alone and len(one.members) > 1 else ""
    name = f"test{seeds}" if alone else one.label
    score = one.score() if what == "accuracy" else None
    if score is None:
        return Entry(name, look.style)
    spread = "" if score.last_deviation is None else f" ± {score.last_deviation:.2f}"
    at = f" at epoch {score.epoch}" if alone else ""
    best = "" if alone and score.best_epoch is not None else f" (best {score.best:.2f})"
    return Entry(name, look.style, figures=f": {score.last:.2f}{spread}%{at}{best}")


def _explanations(series: Sequence[Series], what: str) -> list[Entry]:
    """What the legend says beside the series: training, seeds, restarts, the grey ones."""
    entries = []
    alone, wide = len(series) == 1, len(series) > ONE_PANEL
    black = "#000000"
    if not wide:
        look = _training_look(Look(black), alone)
        entries.append(Entry("training", look.style))
    if not wide and not alone:
        entries.insert(0, Entry("test", Look(black).style))
    grey = [one for one, look in looks(series) if look.color == GREY]
    if grey:
        entries.append(Entry(_others(grey), OTHERS.style))
    lines = [one.line(f"test_{what}") for one in series]
    if any(line.beyond for line in lines):
        entries.append(Entry("a seed that is further than others", Look("#555555", linewidth=THIN).style))
    if any(line.low for line in lines):
        look = Look("#555555")
        entries.append(Entry("mean of the seeds, and the band from least to greatest", look.style, band=True))
    if any(line.restarts for line in lines):
        entries.append(Entry("restart", {**RESTART, "color": black, "markeredgecolor": black}))
    return entries


def _legend_title(series: Sequence[Series]) -> str:
    """What the figures in the legend are."""
    if any(len(one.members) > 1 for one in series):
        return "last test accuracy, mean ± standard deviation over the seeds"
    return "last test accuracy" if len(series) > 1 else ""


def _others(series: Sequence[Series]) -> str:
    scores = [score.last for one in series if (score := one.score())]
    between = f": {min(scores):.2f} to {max(scores):.2f}%" if scores else ""
    return f"{len(series)} with lower test accuracy{between}"


def _finish(axis: Axes, curves: Sequence[Curve], ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max((max(curve, default=1) for curve in curves), default=1)
    first = min((min(curve, default=1) for curve in curves if curve), default=1)
    room = max(0.4, 0.02 * (last - first))
    axis.set_xlim(first - room, last + room)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_xlabel("epoch")
    axis.set_ylabel(ylabel)


def _limit(axis: Axes, curves: Sequence[Curve], what: str) -> None:
    limits = steep_part_left_out(curves)
    if limits is not None:
        low, high = limits
        room = 0.05 * (high - low) or 0.5
        axis.set_ylim(low - room, min(100.5, high + room) if what == "accuracy" else high + room)
