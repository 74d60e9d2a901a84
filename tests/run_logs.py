"""Logs of runs that never ran, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from helpers import tiny_spec

from cifar_hpc.cli.figures.curves import Series, read_series
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.logs import metrics_text
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.results import group_runs

BEGIN = datetime(2026, 1, 2, 3, 0, tzinfo=UTC)
STEPS = 10  # in an epoch


def make_run(root: Path, name: str, **sections: dict[str, Any]) -> RunPaths:
    """A run with a frozen spec and no logs."""
    paths = RunPaths(root, name)
    paths.create()
    freeze(paths, tiny_spec(**sections))
    return paths


def metrics_row(epoch: int, test: float, restart: int = 0, lr: float = 0.1) -> dict[str, Any]:
    """A row of metrics.jsonl; in training the accuracy is better by a point, the losses follow from the accuracies."""
    return {
        "epoch": epoch,
        "step": STEPS * epoch,
        "train_loss": (99 - test) / 100,
        "train_accuracy": test + 1,
        "test_loss": (100 - test) / 100,
        "test_accuracy": test,
        "lr": lr,
        "epoch_seconds": 10.0,
        "restart": restart,
        "time": at(10 * epoch),
    }


def write_metrics(run: RunPaths, accuracies: Sequence[float], restarts: Sequence[int] = ()) -> None:
    """One row for each accuracy; a restart before each epoch in `restarts`."""
    rows = [
        metrics_row(epoch, accuracy, restart=sum(r <= epoch for r in restarts))
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    run.metrics.write_text(metrics_text(rows))


class Maker:
    """Makes runs with epochs, below one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self, name: str, accuracies: Sequence[float], restarts: Sequence[int] = (), **sections: dict[str, Any]
    ) -> RunPaths:
        paths = make_run(self.root, name, **sections)
        write_metrics(paths, accuracies, restarts)
        return paths


def series_of(*runs: RunPaths) -> list[Series]:
    """What `plot` draws of them."""
    return read_series(group_runs(runs))


def at(seconds: float) -> str:
    """The time so long after BEGIN, as the logs have it."""
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def event(seconds: float, name: str, **details: Any) -> dict[str, Any]:
    """A row of events.jsonl."""
    return {"time": at(seconds), "event": name, "job_id": "7", "restart": 0, "world_size": 1, **details}


def write_events(run: RunPaths, events: Sequence[dict[str, Any]]) -> None:
    """events.jsonl."""
    run.events.write_text(metrics_text(events))
