"""What the figures show: the curves of runs, put together over their seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from cifar_hpc.runs.groups import Group, labels
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

# Values beyond these are damage, and would leave nothing to be seen of the rest.
GREATEST = {"train_accuracy": 100.0, "test_accuracy": 100.0, "train_loss": 1e6, "test_loss": 1e6, "lr": 1e6}
MAX_EPOCH = 1_000_000
# Of runs with LONG epochs or more this part is steep.
LONG, FIRST_PART = 40, 0.05
Curve = dict[int, float]  # epoch -> value, in the order of the epochs


@dataclass(frozen=True)
class RunCurves:
    """The rows of one run's metrics.jsonl, as far as they make sense.

    curves: by field of the rows, those of GREATEST.
    restarts: the first epoch that was finished after each restart.
    """

    run: RunPaths
    curves: Mapping[str, Curve]
    restarts: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether no epoch is finished."""
        return not any(self.curves.values())


@dataclass(frozen=True)
class Line:
    """A field of a group: one run's curve, or the mean of several seeds.

    mean: up to the epoch that each of the seeds has finished.
    low, high: the least and the greatest of the seeds; empty for a single run.
    beyond: the curves of those seeds that are further, from the last common epoch on.
    restarts: for each restart of any of the seeds, where on what is drawn.
    """

    mean: Curve
    low: Curve
    high: Curve
    beyond: tuple[Curve, ...]
    restarts: Curve


@dataclass(frozen=True)
class Score:
    """Test accuracy in percent: mean over the seeds, and standard deviation (None for a single run).

    epoch: the last one that all seeds have finished; `last` is of it.
    best_epoch: that of `best`; None for several seeds, of which each has its own.
    """

    epoch: int
    last: float
    last_deviation: float | None
    best: float
    best_epoch: int | None


@dataclass(frozen=True)
class Series:
    """A group that has at least one finished epoch; its runs that have none are left out."""

    label: str
    group: Group
    members: tuple[RunCurves, ...]

    def line(self, field: str) -> Line:
        """The line of a field of metrics.jsonl; its parts are empty where no row has it."""
        runs = [member for member in self.members if member.curves[field]]
        curves = [member.curves[field] for member in runs]
        common = _common(curves)
        mean = {epoch: fmean(curve[epoch] for curve in curves) for epoch in common}
        shared = common[-1] if common else 0
        several = len(curves) > 1
        return Line(
            mean=mean,
            low={epoch: min(curve[epoch] for curve in curves) for epoch in common} if several else {},
            high={epoch: max(curve[epoch] for curve in curves) for epoch in common} if several else {},
            beyond=tuple(_from(curve, shared) for curve in curves if max(curve) > shared),
            restarts={
                epoch: mean.get(epoch, curve[epoch])
                for member, curve in zip(runs, curves, strict=True)
                for epoch in member.restarts
                if epoch in curve
            },
        )

    def score(self) -> Score | None:
        """Last and best test accuracy; None where there is none that all seeds have."""
        runs = [curve for member in self.members if (curve := member.curves["test_accuracy"])]
        common = _common(runs)
        if not common:
            return None
        last = [curve[common[-1]] for curve in runs]
        best = [max(curve[epoch] for epoch in common) for curve in runs]
        alone = len(runs) == 1
        return Score(
            epoch=common[-1],
            last=fmean(last),
            last_deviation=None if alone else stdev(last),
            best=fmean(best),
            best_epoch=next(epoch for epoch in common if runs[0][epoch] == best[0]) if alone else None,
        )


def read_series(groups: Sequence[Group]) -> list[Series]:
    """The groups that have anything to show, labelled by what tells them from each other."""
    series = []
    for group, label in zip(groups, labels(groups), strict=True):
        members = tuple(curves for run in group.runs if not (curves := read_curves(run)).empty)
        if members:
            series.append(Series(label, group, members))
    return series


def read_curves(run: RunPaths) -> RunCurves:
    """The curves of one run. Of a row that stands there twice the later one counts; what is no number is left out.

    Raises:
        OSError: metrics.jsonl cannot be read.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(run.metrics):
        epoch = row.get("epoch")
        if type(epoch) is int and 1 <= epoch <= MAX_EPOCH:
            rows[epoch] = row
    epochs = sorted(rows)
    curves = {
        field: {epoch: value for epoch in epochs if (value := _number(rows[epoch].get(field), greatest)) is not None}
        for field, greatest in GREATEST.items()
    }
    return RunCurves(run, curves, _restarts(epochs, rows))


def steep_part_left_out(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Least and greatest value of long runs without their first steep part, which would take most of an axis; None
    for short ones."""
    last = max((max(curve, default=0) for curve in curves), default=0)
    rest = [value for curve in curves for epoch, value in curve.items() if epoch > FIRST_PART * last]
    return (min(rest), max(rest)) if last >= LONG and rest else None


def _restarts(epochs: Sequence[int], rows: Mapping[int, Mapping[str, Any]]) -> tuple[int, ...]:
    found, before = [], 0
    for epoch in epochs:
        restart = rows[epoch].get("restart")
        if type(restart) is int and restart > before:
            found.append(epoch)
            before = restart
    return tuple(found)


def _number(value: Any, greatest: float) -> float | None:
    if type(value) not in (int, float) or not 0 <= value <= greatest or not math.isfinite(value):
        return None
    return float(value)


def _common(curves: Sequence[Curve]) -> list[int]:
    """The epochs that all curves have, ascending."""
    return sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []


def _from(curve: Curve, first: int) -> Curve:
    return {epoch: value for epoch, value in curve.items() if epoch >= first}
