"""Series of a figure: the curves of runs, averaged over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from cifar_hpc.runs.groups import Group, labels
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

# Greater values are damage, and would flatten everything else.
GREATEST = {"train_accuracy": 100.0, "test_accuracy": 100.0, "train_loss": 1e6, "test_loss": 1e6, "lr": 1e6}
MAX_EPOCH = 1_000_000
# Of runs with LONG epochs or more this part is steep.
LONG, FIRST_PART = 40, 0.05
Curve = dict[int, float]  # epoch -> value, in the order of the epochs


@dataclass(frozen=True)
class RunCurves:
    """Valid rows of one run's metrics.jsonl.

    curves: by field of the rows, those of GREATEST.
    restarts: the first epoch that was finished after each restart.
    """

    run: RunPaths
    curves: Mapping[str, Curve]
    restarts: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """A field of a group: one run's curve, or the mean of several seeds.

    mean: up to the epoch that each of the seeds has finished.
    low, high: the least and the greatest of the seeds; empty for a single run.
    beyond: the curves of those seeds that are further, from the last common epoch on.
    restarts: for each restart of any of the seeds, the drawn value at its epoch.
    """

    mean: Curve
    low: Curve
    high: Curve
    beyond: tuple[Curve, ...]
    restarts: Curve


@dataclass(frozen=True)
class Score:
    """Test accuracy in percent: mean over the seeds, and standard deviation (None for a single run).

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


@dataclass(frozen=True)
class Series:
    """A group that has at least one finished epoch, without its runs that have none."""

    label: str
    group: Group
    members: tuple[RunCurves, ...]

    def line(self, field: str) -> Line:
        """The line of a field of metrics.jsonl; its parts are empty where no row has it."""
        curves, by_epoch = self._common(field)
        end = max(by_epoch, default=0)
        mean = {epoch: fmean(values) for epoch, values in by_epoch.items()}
        several = by_epoch if len(curves) > 1 else {}
        low, high = ({epoch: of(values) for epoch, values in several.items()} for of in (min, max))
        beyond = tuple({e: value for e, value in curve.items() if e >= end} for curve in curves if max(curve) > end)
        restarts = [(epoch, member.curves[field]) for member in self.members for epoch in member.restarts]
        return Line(mean, low, high, beyond, {e: mean.get(e, curve[e]) for e, curve in restarts if e in curve})

    def score(self) -> Score | None:
        """Last and best test accuracy; None where the seeds have no epoch in common."""
        curves, by_epoch = self._common("test_accuracy")
        if not by_epoch:
            return None
        end, alone = max(by_epoch), len(curves) == 1
        best = [max(by_epoch, key=curve.__getitem__) for curve in curves]
        mean = fmean(curve[epoch] for curve, epoch in zip(curves, best, strict=True))
        deviation = None if alone else stdev(by_epoch[end])
        return Score(end, fmean(by_epoch[end]), deviation, mean, best[0] if alone else None)

    def _common(self, field: str) -> tuple[list[Curve], dict[int, list[float]]]:
        """The curves of the runs that have the field, and all their values at each epoch that they share."""
        curves = [curve for member in self.members if (curve := member.curves[field])]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        return curves, {epoch: [curve[epoch] for curve in curves] for epoch in epochs}


def read_series(groups: Sequence[Group]) -> list[Series]:
    """The groups that have anything to show, each labelled by its differences from the others."""
    series = []
    for group, label in zip(groups, labels(groups), strict=True):
        members = tuple(read for run in group.runs if any((read := read_curves(run)).curves.values()))
        if members:
            series.append(Series(label, group, members))
    return series


def read_curves(run: RunPaths) -> RunCurves:
    """The curves of one run. The last row wins for a duplicate epoch; invalid values are left out.

    Raises:
        OSError: metrics.jsonl cannot be read.
    """
    rows = {row["epoch"]: row for row in read_jsonl(run.metrics) if type(row.get("epoch")) is int}
    epochs = [epoch for epoch in sorted(rows) if 1 <= epoch <= MAX_EPOCH]
    curves = {
        field: {e: float(rows[e][field]) for e in epochs if _valid(rows[e].get(field), greatest)}
        for field, greatest in GREATEST.items()
    }
    restarts, before = [], 0
    for epoch in epochs:
        restart = rows[epoch].get("restart")
        if type(restart) is int and restart > before:
            restarts.append(epoch)
            before = restart
    return RunCurves(run, curves, tuple(restarts))


def _valid(value: Any, greatest: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= greatest


def steep_part_left_out(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Least and greatest value of long runs without their first steep part, which would take most of an axis; None
    for short ones."""
    last = max((epoch for curve in curves for epoch in curve), default=0)
    rest = [value for curve in curves for epoch, value in curve.items() if epoch > FIRST_PART * last]
    return (min(rest), max(rest)) if last >= LONG and rest else None
