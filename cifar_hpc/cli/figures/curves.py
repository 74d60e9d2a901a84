"""Curves of runs, averaged over their seeds, and figures of them: accuracy, loss and learning rate by epoch."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from cifar_hpc.cli.figures.style import COLOURS, DOUBLE_COLUMN, SINGLE_COLUMN, Axes, Figure, add_legend, new_figure
from cifar_hpc.errors import UserError
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.results import Group, labels, one_a_seed, shared_label

Curve = dict[int, float]  # epoch -> value, in the order of the epochs
# Greater values are damage, and would flatten everything else.
GREATEST = {"train_accuracy": 100.0, "test_accuracy": 100.0, "train_loss": 1e6, "test_loss": 1e6, "lr": 1e6}
MAX_EPOCH = 1_000_000
# Of runs with LONG epochs or more this part is steep.
LONG, FIRST_PART = 40, 0.05

Style = dict[str, Any]  # as Line2D takes it
YLABELS = {"accuracy": "accuracy (%)", "loss": "loss (cross-entropy)"}
ONE_PANEL = 3  # of so many series training and test are distinguishable in one panel
MOST_STYLES = 2 * len(COLOURS)  # more are not distinguishable: of more series those with lower test accuracy are grey
PANEL_HEIGHT = 2.2  # inches
MARKED_EPOCHS = 20  # a line of so few epochs shows each of them
DENSE = 100  # with more epochs the line is thinner
GREY, DARK, BLACK = "#aaaaaa", "#555555", "#000000"
DASHES = (0, (4, 1.5))
TRAINING: Style = {"linestyle": DASHES, "linewidth": 0.9}
OTHERS: Style = {"color": GREY, "linewidth": 0.6, "zorder": 1.5}
BEYOND: Style = {"linewidth": 0.5, "marker": ""}
BAND: Style = {"alpha": 0.2, "linewidth": 0}
MARKERS = "os^Dv<P"  # of a few lines, which are told apart without colours, too
RESTART: Style = {"linestyle": "", "marker": "o", "markersize": 3, "markerfacecolor": "white", "markeredgewidth": 0.8}
BEST: Style = {"linestyle": "", "marker": "*", "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.5}


class RunCurves(NamedTuple):
    """Valid rows of one run's metrics.jsonl.

    curves: by field of the rows, those of GREATEST.
    restarts: the first epoch that was finished after each restart.
    epochs: how many its spec has; 0 if that cannot be read.
    """

    run: RunPaths
    curves: Mapping[str, Curve]
    restarts: tuple[int, ...]
    epochs: int

    @property
    def done(self) -> int:
        """The last epoch."""
        return max((epoch for curve in self.curves.values() for epoch in curve), default=0)


class Line(NamedTuple):
    """A field of a group: one run's curve, or the mean of several seeds.

    mean: over those seeds that have finished, or over all where none has; up to the epoch that each of them has done.
    low, high: the mean less and plus the sample standard deviation of these seeds; empty for a single one.
    beyond: the curves of seeds that are further, from the last common epoch on, and of those that are not in the mean.
    restarts: for each restart of any of the seeds, its epoch and the drawn value.
    """

    mean: Curve
    low: Curve
    high: Curve
    beyond: tuple[Curve, ...]
    restarts: tuple[tuple[int, float], ...]


class Score(NamedTuple):
    """Test accuracy in percent: mean over the seeds as in `Line`, and standard deviation (None for a single one).

    epoch: the last one that all seeds have finished, to which `last` belongs.
    best_epoch: that of `best`; None for several seeds, of which each has its own.
    """

    epoch: int
    last: float
    last_deviation: float | None
    best: float
    best_epoch: int | None

    @property
    def last_text(self) -> str:
        """The last accuracy and its deviation, such as `93.10 ± 0.20`."""
        return f"{self.last:.2f}" + ("" if self.last_deviation is None else f" ± {self.last_deviation:.2f}")


class Series(NamedTuple):
    """A group that has at least one finished epoch, without its runs that have none."""

    label: str
    group: Group
    members: tuple[RunCurves, ...]

    @property
    def counted(self) -> tuple[RunCurves, ...]:
        """The members that have finished, or all where none has, as `compare` counts them."""
        return tuple(member for member in self.members if member.done >= member.epochs) or self.members

    @property
    def name(self) -> str:
        """The label, with the number of seeds, and how far those got that have not finished."""
        late = sorted({member.done for member in self.members if member.done < member.epochs})
        far = " to ".join(map(str, dict.fromkeys((late[0], late[-1])))) if late else ""
        progress = far and f" ({far} of {max(member.epochs for member in self.members)} epochs)"
        if len(self.members) == 1:
            return self.label + progress
        more = len(self.members) - len(self.counted)
        seeds = f"{self.label}, {len(self.counted)} seed{'s' * (len(self.counted) > 1)}"
        return seeds + (f" and {more} unfinished" if more else "") + progress

    def line(self, field: str) -> Line:
        """The line of a field of metrics.jsonl; its parts are empty where no row has it."""
        curves, by_epoch = self._common(field)
        end = max(by_epoch, default=0)
        mean = {epoch: fmean(values) for epoch, values in by_epoch.items()}
        several = {epoch: stdev(values) for epoch, values in by_epoch.items() if len(values) > 1}
        low, high = ({epoch: mean[epoch] + sign * std for epoch, std in several.items()} for sign in (-1, 1))
        beyond = [{e: value for e, value in curve.items() if e >= end} for curve in curves if max(curve) > end]
        beyond += [curve for member in self.members if member not in self.counted if (curve := member.curves[field])]
        restarts = [
            (epoch, mean.get(epoch, curve[epoch]) if member in self.counted else curve[epoch])
            for member in self.members
            for epoch in member.restarts
            if epoch in (curve := member.curves[field])
        ]
        return Line(mean, low, high, tuple(beyond), tuple(restarts))

    def score(self) -> Score | None:
        """Last and best test accuracy; None where the seeds have no epoch in common."""
        curves, by_epoch = self._common("test_accuracy")
        if not by_epoch:
            return None
        end, alone = max(by_epoch), len(curves) == 1
        best = [max(by_epoch, key=curve.__getitem__) for curve in curves]
        mean = fmean(curve[epoch] for curve, epoch in zip(curves, best, strict=True))
        last, deviation = fmean(by_epoch[end]), None if alone else stdev(by_epoch[end])
        return Score(end, last, deviation, mean, best[0] if alone else None)

    def _common(self, field: str) -> tuple[list[Curve], dict[int, list[float]]]:
        """The counted curves that have the field, and all their values at each epoch that they share."""
        curves = [curve for member in self.counted if (curve := member.curves[field])]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        return curves, {epoch: [curve[epoch] for curve in curves] for epoch in epochs}


def read_series(groups: Sequence[Group]) -> list[Series]:
    """The groups that have anything to show, each labelled by its differences from the others."""
    series = []
    for group, label in zip(groups, labels(groups), strict=True):
        pairs = zip(map(read_curves, group.runs), group.seeds or (0,), strict=True)
        if members := one_a_seed([pair for pair in pairs if pair[0].done], lambda read: read.done):
            series.append(Series(label, group, tuple(members)))
    return series


def read_curves(run: RunPaths) -> RunCurves:
    """The curves of one run. The last row wins for a duplicate epoch; invalid values are left out.

    Raises:
        OSError: metrics.jsonl cannot be read.
    """
    found = {row["epoch"]: row for row in read_jsonl(run.metrics) if type(row.get("epoch")) is int}
    rows = {epoch: found[epoch] for epoch in sorted(found) if 1 <= epoch <= MAX_EPOCH}
    curves: dict[str, Curve] = {field: {} for field in GREATEST}
    restarts: dict[int, int] = {}  # the epoch by the number of the restart, which only grows
    for epoch, row in rows.items():
        for field, greatest in GREATEST.items():
            value: Any = row.get(field)
            if type(value) in (int, float) and 0 <= value <= greatest:
                curves[field][epoch] = float(value)
        restart: Any = row.get("restart")
        if type(restart) is int and restart > max(restarts, default=0):
            restarts[restart] = epoch
    try:
        spec = read_frozen(run)
    except UserError:  # which plot reports
        spec = None
    return RunCurves(run, curves, tuple(restarts.values()), spec.train.epochs if spec else 0)


def steep_part_left_out(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Least and greatest value of long runs without their first steep part, which would take most of an axis; None
    for short ones."""
    last = max((epoch for curve in curves for epoch in curve), default=0)
    rest = [value for curve in curves for epoch, value in curve.items() if epoch > FIRST_PART * last]
    return (min(rest), max(rest)) if last >= LONG and rest else None


def score_figure(series: Sequence[Series], what: str) -> Figure:
    """Training and test `accuracy` (the legend has the last and the best one), or `loss`, with label smoothing."""
    from matplotlib.lines import Line2D

    alone, wide, accuracy = len(series) == 1, len(series) > ONE_PANEL, what == "accuracy"
    figure = new_figure(DOUBLE_COLUMN if wide else SINGLE_COLUMN, PANEL_HEIGHT)
    panels = figure.subplots(1, 2 if wide else 1, sharey=True, squeeze=False)[0]
    training, test = panels[0], panels[-1]
    lines: list[Line] = []
    entries: list[tuple[Any, str, str]] = []
    for one, style in looks(series):
        trained, tested = one.line(f"train_{what}"), one.line(f"test_{what}")
        _draw(training, trained, style if wide else style | TRAINING | ({"color": COLOURS[1]} if alone else {}))
        _draw(test, tested, style)
        lines += [trained, tested]
        if style is not OTHERS:
            if tested.restarts:
                restarts = RESTART | {"color": style["color"], "zorder": 3, "gid": "restart"}
                test.plot(*zip(*tested.restarts, strict=True), **restarts)
            entries.append((Line2D([], [], **style), *_texts(one, what, alone)))
    score = series[0].score() if alone and accuracy else None
    if score and score.best_epoch not in (None, score.epoch):
        (star,) = test.plot(score.best_epoch, score.best, **BEST, color=BLACK, zorder=4, gid="best")
        entries.append((star, f"best: {score.best:.2f}% at epoch {score.best_epoch}", ""))
    entries += _explanations(series, lines, accuracy)
    title = "last test accuracy" if accuracy else ""
    if alone:  # its name is in no entry, and none that is not given is needed
        title = "" if series[0].label == series[0].group.runs[0].name else series[0].label
    add_legend(figure, entries, title)
    last = max(member.done for one in series for member in one.members)
    _finish(training, last, YLABELS[what], "training" if wide else "")
    if limits := steep_part_left_out([curve for line in lines for curve in (line.mean, *line.beyond)]):
        room = 0.05 * (limits[1] - limits[0]) or 0.5
        training.set_ylim(limits[0] - room, min(limits[1] + room, 100.5 if accuracy else math.inf))
    if wide:
        _finish(test, last, "", "test")
    return figure


def learning_rate_figure(series: Sequence[Series]) -> Figure:
    """The learning rate of each epoch's last update; series with the same one are one line."""
    from matplotlib.lines import Line2D

    merged = merge_equal(series)
    figure = new_figure(SINGLE_COLUMN, PANEL_HEIGHT)
    axis: Axes = figure.subplots()
    styles = [_style(number, len(merged)) for number in range(len(merged))]
    for style, (_, curve) in zip(styles, merged, strict=True):
        _plot(axis, curve, style)
    _finish(axis, max(member.done for one in series for member in one.members), "learning rate")
    axis.set_ylim(bottom=0)
    texts = [label for label, _ in merged[:MOST_STYLES]]
    texts += [f"{len(merged) - MOST_STYLES} others"] if len(merged) > MOST_STYLES else []
    samples = [(Line2D([], [], **style), text, "") for style, text in zip(styles, texts, strict=False)]
    add_legend(figure, samples if len(merged) > 1 else [])
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
        named.append((text if others and text and shared.count(text) == 1 else several, dict(sorted(curve.items()))))
    return named


def looks(series: Sequence[Series]) -> list[tuple[Series, Style]]:
    """Each series with its style, in the given order; OTHERS for those that are too many."""
    scores = [score.last if (score := one.score()) else -1.0 for one in series]
    best = sorted(range(len(series)), key=lambda index: -scores[index])[:MOST_STYLES]
    styles = {index: _style(number, len(series)) for number, index in enumerate(sorted(best))}
    return [(one, styles.get(index, OTHERS)) for index, one in enumerate(series)]


def _style(number: int, of: int) -> Style:
    if number >= MOST_STYLES:
        return OTHERS
    # Markers stand apart along the axes, at another place on each line.
    few = 1 < of <= len(MARKERS)
    marker = {"marker": MARKERS[number], "markersize": 2.5, "markevery": (0.02 * number, 0.16)} if few else {}
    return marker | {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": "-" if number < len(COLOURS) else DASHES,
    }


def _draw(axis: Axes, line: Line, style: Style) -> None:
    _plot(axis, line.mean, style)
    for curve in line.beyond:
        _plot(axis, curve, style | BEYOND)
    if line.low:
        low, high = (list(bound.values()) for bound in (line.low, line.high))
        axis.fill_between(list(line.low), low, high, color=style["color"], **BAND)
        if len(low) == 1:  # the band has no width
            axis.vlines(list(line.low), low, high, color=style["color"], alpha=BAND["alpha"], linewidth=5)


def _plot(axis: Axes, curve: Curve, style: Style) -> None:
    marker: Style = {}
    if len(curve) <= MARKED_EPOCHS:
        marker = {"markevery": None} if style.get("marker") else {"marker": ".", "markersize": 4, "markevery": None}
    width = style.get("linewidth", 1.2) * (0.75 if len(curve) > DENSE else 1)
    axis.plot(list(curve), list(curve.values()), **style | marker | {"linewidth": width})


def _finish(axis: Axes, last: int, ylabel: str, title: str = "") -> None:
    room = min(0.03 * (last - 1), 0.9) or 0.5
    axis.set_xlim(1 - room, last + room)
    axis.locator_params("x", integer=True, nbins=6, min_n_ticks=1, steps=[1, 2, 5, 10])
    axis.set(xlabel="epoch", ylabel=ylabel, title=title)


def _texts(one: Series, what: str, alone: bool) -> tuple[str, str]:
    """Name and values of a series in the legend; the values are in that of the accuracy only."""
    name = one._replace(label="test").name if alone else one.name
    score = one.score() if what == "accuracy" else None
    if score is None:
        return name, ""
    at = f" at epoch {score.epoch}" if alone else ""
    best = f" (best {score.best:.2f})"
    if (alone and score.best_epoch) or f"{score.best:.2f}" == f"{score.last:.2f}":
        best = ""
    return name, f": {score.last_text}%{at}{best}"


def _explanations(series: Sequence[Series], lines: Sequence[Line], accuracy: bool) -> list[tuple[Any, str, str]]:
    """Entries of the legend for the styles that several series share."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    alone, wide = len(series) == 1, len(series) > ONE_PANEL
    scores = [one.score() for one, style in looks(series) if style is OTHERS]
    accuracies = [score.last for score in scores if score]
    between = f": {min(accuracies):.2f} to {max(accuracies):.2f}%" if accuracies and accuracy else ""
    band = (Patch(color=DARK, **BAND), Line2D([], [], color=DARK))
    explained = (
        (not alone and not wide, Line2D([], [], color=BLACK), "test"),
        (not wide, Line2D([], [], color=COLOURS[1] if alone else BLACK, **TRAINING), "training"),
        (scores, Line2D([], [], **OTHERS), f"{len(scores)} with lower test accuracy{between}"),
        (
            any(x.beyond for x in lines),
            Line2D([], [], color=DARK, **BEYOND),
            "a seed that is unfinished or further than others",
        ),
        (any(x.low for x in lines), band, "mean ± sample standard deviation over the seeds"),
        (any(x.restarts for x in lines), Line2D([], [], color=BLACK, **RESTART), "restart"),
    )
    return [(sample, text, "") for present, sample, text in explained if present]
