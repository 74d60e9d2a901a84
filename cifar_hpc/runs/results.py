"""Results of runs, from their files: one for each run, a row for each group of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from cifar_hpc.errors import UserError
from cifar_hpc.runs.events import STARTS
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.groups import Group
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.state import read_state
from cifar_hpc.slurm.client import QueuedJob

Json = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """Result of one run. Values that its files do not have, or that make no sense, are None or empty.

    state: as `status` has it.
    epoch: epochs done, of `epochs`.
    test_accuracy, train_accuracy: of the last epoch, in percent; best_accuracy: the best test accuracy of any.
    training_seconds: sum of epoch_seconds, over all epochs.
    wall_seconds: of a finished run, from its first start to its end: starts, queueing for a requeue and lost work
        included, but not what passed before a person submitted it again.
    restarts: starts after the first, by cause.
    world_sizes: numbers of processes with which epochs were finished, ascending.
    date: when the last epoch was finished, ISO 8601 in UTC.
    hardware, versions: in words, each that its starts had; command: of its last submission.
    """

    name: str
    state: str
    epoch: int = 0
    epochs: int = 0
    test_accuracy: float | None = None
    best_accuracy: float | None = None
    train_accuracy: float | None = None
    training_seconds: float | None = None
    wall_seconds: float | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    world_sizes: tuple[int, ...] = ()
    shards: int | None = None
    date: str | None = None
    hardware: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    command: str | None = None

    @property
    def finished(self) -> bool:
        """Whether all of its epochs are done."""
        return self.state == "finished"


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation (ddof=1) over `count` runs; None for a single one."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """Results of a group of runs that differ in their seed alone.

    data: the images that all of them use, in words.
    """

    group: Group
    members: tuple[RunResult, ...]
    data: str = ""

    @property
    def finished(self) -> int:
        """Number of finished members."""
        return sum(member.finished for member in self.members)

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """Members that figures are taken from: the finished ones, or all if none has finished."""
        return tuple(member for member in self.members if member.finished) or self.members

    def figure(self, name: str) -> Figure | None:
        """A field of the results as one figure; None if no member has it."""
        values = [value for member in self.counted if (value := getattr(member, name)) is not None]
        return Figure(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None

    def causes(self) -> dict[str, int]:
        """Restarts of all members by cause."""
        sums: dict[str, int] = {}
        for member in self.members:
            for cause, count in member.restarts.items():
                sums[cause] = sums.get(cause, 0) + count
        return dict(sorted(sums.items()))

    def all_of(self, name: str) -> list[Any]:
        """Distinct values of a field, or of its items, over all members."""
        values = [getattr(member, name) for member in self.members]
        items = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return list(dict.fromkeys(item for item in items if item is not None))


def read_rows(groups: Sequence[Group], jobs: Mapping[str, QueuedJob] | None) -> list[Row]:
    """A row for each group. Damaged files lead to empty fields, never to an error.

    Args:
        jobs: as `slurm.queue` returns them; None where Slurm does not answer.
    """
    return [Row(group, tuple(read_result(run, jobs) for run in group.runs), _data(group)) for group in groups]


def read_result(run: RunPaths, jobs: Mapping[str, QueuedJob] | None) -> RunResult:
    """Result of one run."""
    state = read_state(run, jobs)
    try:
        events, rows = read_jsonl(run.events), read_jsonl(run.metrics)
    except OSError:
        return RunResult(run.name, "unreadable")
    by_epoch = {row["epoch"]: row for row in rows if _count(row.get("epoch")) is not None}
    last = by_epoch[max(by_epoch)] if by_epoch else {}
    past = History.of(events)
    starts = [event for event in events if event.get("event") in STARTS]
    seconds = [value for row in by_epoch.values() if (value := _number(row.get("epoch_seconds"))) is not None]
    accuracies = [value for row in by_epoch.values() if (value := _percent(row.get("test_accuracy"))) is not None]
    return RunResult(
        name=run.name,
        state=state.state,
        epoch=max(by_epoch, default=0),
        epochs=state.epochs,
        test_accuracy=_percent(last.get("test_accuracy")),
        best_accuracy=max(accuracies, default=None),
        train_accuracy=_percent(last.get("train_accuracy")),
        training_seconds=sum(seconds) if seconds else None,
        wall_seconds=past.up_seconds + past.lost_seconds if state.state == "finished" else None,
        restarts=past.restart_causes,
        world_sizes=tuple(sorted({n for row in by_epoch.values() if (n := _count(row.get("world_size"))) is not None})),
        shards=_count(last.get("shards")),
        date=_text(last.get("time")),
        hardware=_distinct(_hardware(event) for event in starts),
        versions=_distinct(_versions(event) for event in starts),
        command=next((text for e in reversed(events) if (text := _text(e.get("command")))), None),
    )


def _number(value: Any) -> float | None:
    """A finite number of sensible size; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e12 and math.isfinite(value) else None


def _percent(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 100 else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e9 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _distinct(words: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in words if text))


def _part(start: Mapping[str, Any], key: str) -> Json:
    part = start.get(key)
    return part if isinstance(part, dict) else {}


def _hardware(start: Mapping[str, Any]) -> str:
    environment, processor = _part(start, "environment"), _text(_part(start, "machine").get("processor"))
    device, ranks, threads = _text(environment.get("device")), start.get("world_size"), environment.get("threads")
    if device is None:
        return ""
    on_cpu = f", {threads} CPU thread{'s' * (threads != 1)} each" if _count(threads) else ""
    times = f"{ranks} × " if _count(ranks) else ""
    return times + (f"{processor} ({device})" if on_cpu and processor else device) + on_cpu


def _versions(start: Mapping[str, Any]) -> str:
    found = {**_part(start, "machine"), **_part(start, "environment")}
    keys = ("cifar_hpc", "python", "torch", "torchvision", "cuda", "cudnn")
    words = [f"{key} {found[key]}" for key in keys if isinstance(found.get(key), (str, int))]
    return ", ".join(filter(None, [*words, _text(found.get("amp"))]))


def _data(group: Group) -> str:
    try:
        spec = read_frozen(group.runs[0])
    except (UserError, OSError):
        return ""
    if spec is None:
        return ""
    data = spec.data
    words = [f"{data.source}:{data.root}" if data.source == "folder" else data.source]
    trained = data.train_size and data.train_size - (data.holdout or 0)
    words += [f"{trained:,} training images"] if trained else []
    words += [f"{data.test_size:,} test images"] if data.test_size else []
    words += [f"evaluated on {data.holdout:,} training images held out"] if data.holdout else []
    return ", ".join(words)
