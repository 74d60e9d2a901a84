"""Figures of accuracy, loss and learning rate against the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.figures.series import Curve, Line, Series, steep_part_left_out
from cifar_hpc.cli.figures.style import COLOURS, DOUBLE_COLUMN, SINGLE_COLUMN, add_legend, new_figure
from cifar_hpc.runs.groups import shared_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]  # as Line2D takes it
YLABELS = {"accuracy": "accuracy (%)", "loss": "loss (cross-entropy)"}
ONE_PANEL = 3  # of so many series training and test are distinguishable in one panel
MOST_STYLES = 2 * len(COLOURS)  # more are not distinguishable: of more series those with lower test accuracy are grey
PANEL_HEIGHT = 2.1  # inches
MARKED_EPOCHS = 20  # a line of so few epochs shows each of them
DENSE = 100  # with more epochs the line is thinner
GREY, DARK, BLACK = "#aaaaaa", "#555555", "#000000"
DASHES = (0, (4, 1.5))
TRAINING: Style = {"linestyle": DASHES, "linewidth": 0.9}
OTHERS: Style = {"color": GREY, "linewidth": 0.6, "zorder": 1.5}
BEYOND: Style = {"linewidth": 0.5}
BAND: Style = {"alpha": 0.2, "linewidth": 0}
RESTART: Style = {"linestyle": "", "marker": "o", "markersize": 3, "markerfacecolor": "white", "markeredgewidth": 0.8}
BEST: Style = {"linestyle": "", "marker": "*", "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.5}


def score_figure(series: Sequence[Series], what: str) -> Figure:
    """Training and test `accuracy` (the legend has the last and the best one), or `loss`, with label smoothing."""
    from matplotlib.lines import Line2D

    alone, wide = len(series) == 1, len(series) > ONE_PANEL
    figure = new_figure(DOUBLE_COLUMN if wide else SINGLE_COLUMN, PANEL_HEIGHT)
    panels = figure.subplots(1, 2 if wide else 1, sharey=True, squeeze=False)[0]
    training, test = panels[0], panels[-1]
    lines: list[Line] = []
    entries: list[tuple[Any, str, str]] = []
    for one, style in looks(series):
        trained, tested = one.line(f"train_{what}"), one.line(f"test_{what}")
        in_training = style if wide else style | TRAINING | ({"color": COLOURS[1]} if alone else {})
        _draw(training, trained, in_training)
        _draw(test, tested, style)
        lines += [trained, tested]
        if style is OTHERS:
            continue
        if tested.restarts:
            restarts = RESTART | {"color": style["color"], "zorder": 3, "gid": "restart"}
            test.plot(list(tested.restarts), list(tested.restarts.values()), **restarts)
        entries.append((Line2D([], [], **style), *_texts(one, what, alone)))
    score = series[0].score() if alone and what == "accuracy" else None
    if score and score.best_epoch and score.epoch > 1:
        (star,) = test.plot(score.best_epoch, score.best, **BEST, color=BLACK, zorder=4, gid="best")
        entries.append((star, f"best: {score.best:.2f}% at epoch {score.best_epoch}", ""))
    title = "" if alone or what == "loss" else "last test accuracy"
    if what == "accuracy" and any(len(one.members) > 1 for one in series):
        title = "last test accuracy, mean ± standard deviation over the seeds"
    add_legend(figure, entries + _explanations(series, lines), title)
    _finish(training, YLABELS[what])
    limits = steep_part_left_out([curve for line in lines for curve in (line.mean, *line.beyond)])
    if limits:
        low, high = limits
        room = 0.05 * (high - low) or 0.5
        training.set_ylim(low - room, min(100.5, high + room) if what == "accuracy" else high + room)
    if wide:
        _finish(test, "")
        training.set_title("training")
        test.set_title("test")
    return figure


def learning_rate_figure(series: Sequence[Series]) -> Figure:
    """The learning rate of each epoch's last update; series with the same one are one line."""
    from matplotlib.lines import Line2D

    merged = merge_equal(series)
    figure = new_figure(SINGLE_COLUMN, PANEL_HEIGHT)
    axis: Axes = figure.subplots()
    for number, (_, curve) in enumerate(merged):
        _plot(axis, curve, _style(number))
    _finish(axis, "learning rate")
    axis.set_ylim(bottom=0)
    entries = [(Line2D([], [], **_style(n)), label, "") for n, (label, _) in enumerate(merged[:MOST_STYLES])]
    if len(merged) > MOST_STYLES:
        entries.append((Line2D([], [], **OTHERS), f"{len(merged) - MOST_STYLES} others", ""))
    if len(merged) > 1:
        add_legend(figure, entries)
    return figure


def merge_equal(series: Sequence[Series]) -> list[tuple[str, Curve]]:
    """The different learning rates, each as far as any run got, labelled by what the series with it have in common."""
    merged: list[tuple[Curve, list[Series]]] = []
    for owner, curve in [(one, member.curves["lr"]) for one in series for member in one.members]:
        for known, owners in merged:
            if all(math.isclose(known[e], value, rel_tol=1e-9) for e, value in curve.items() if e in known):
                known.update(curve)
                owners.append(owner)
                break
        else:
            merged.append((dict(curve), [owner]))
    shared = [shared_label([one.group for one in owners]) for _, owners in merged]
    named = []
    for text, (curve, owners) in zip(shared, merged, strict=True):
        first, *others = dict.fromkeys(one.label for one in owners)
        several = f"{first} and {len(others)} more" if others else first
        named.append((text if text and shared.count(text) == 1 else several, dict(sorted(curve.items()))))
    return named


def looks(series: Sequence[Series]) -> list[tuple[Series, Style]]:
    """Each series with its style, in the given order; OTHERS for those that are too many."""
    scores = [score.last if (score := one.score()) else -1.0 for one in series]
    best = sorted(range(len(series)), key=lambda index: -scores[index])[:MOST_STYLES]
    styles = {index: _style(number) for number, index in enumerate(sorted(best))}
    return [(one, styles.get(index, OTHERS)) for index, one in enumerate(series)]


def _style(number: int) -> Style:
    if number >= MOST_STYLES:
        return OTHERS
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if number < len(COLOURS) else DASHES}


def _draw(axis: Axes, line: Line, style: Style) -> None:
    _plot(axis, line.mean, style)
    for curve in line.beyond:
        _plot(axis, curve, style | BEYOND)
    if line.low:
        low, high = list(line.low.values()), list(line.high.values())
        axis.fill_between(list(line.low), low, high, color=style["color"], **BAND)


def _plot(axis: Axes, curve: Curve, style: Style) -> None:
    marker: Style = {"marker": ".", "markersize": 4} if len(curve) <= MARKED_EPOCHS else {}
    width = style.get("linewidth", 1.2) * (0.75 if len(curve) > DENSE else 1)
    axis.plot(list(curve), list(curve.values()), **style | marker | {"linewidth": width})


def _finish(axis: Axes, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set(xlabel="epoch", ylabel=ylabel)


def _texts(one: Series, what: str, alone: bool) -> tuple[str, str]:
    """Name and values of a series in the legend; the values are in that of the accuracy only."""
    seeds = f", {len(one.members)} seeds" if len(one.members) > 1 else ""
    name = f"test{seeds}" if alone else one.label
    score = one.score() if what == "accuracy" else None
    if score is None:
        return name, ""
    at = f" at epoch {score.epoch}" if alone else ""
    best = "" if alone and score.best_epoch else f" (best {score.best:.2f})"
    return name, f": {score.last_text}%{at}{best}"


def _explanations(series: Sequence[Series], lines: Sequence[Line]) -> list[tuple[Any, str, str]]:
    """Entries of the legend for the styles that several series share."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    alone, wide = len(series) == 1, len(series) > ONE_PANEL
    scores = [one.score() for one, style in looks(series) if style is OTHERS]
    accuracies = [score.last for score in scores if score]
    between = f": {min(accuracies):.2f} to {max(accuracies):.2f}%" if accuracies else ""
    band = (Patch(color=DARK, **BAND), Line2D([], [], color=DARK))
    explained = (
        (not alone and not wide, Line2D([], [], color=BLACK), "test"),
        (not wide, Line2D([], [], color=COLOURS[1] if alone else BLACK, **TRAINING), "training"),
        (scores, Line2D([], [], **OTHERS), f"{len(scores)} with lower test accuracy{between}"),
        (any(x.beyond for x in lines), Line2D([], [], color=DARK, **BEYOND), "a seed that is further than others"),
        (any(x.low for x in lines), band, "mean of the seeds, and the band from least to greatest"),
        (any(x.restarts for x in lines), Line2D([], [], color=BLACK, **RESTART), "restart"),
    )
    return [(sample, text, "") for present, sample, text in explained if present]
