"""What status says, from files alone and with lines of squeue."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cifar_hpc.paths import RunPaths
from cifar_hpc.run_state import read_state
from cifar_hpc.runlock import RunLock
from cifar_hpc.slurm import QueuedJob


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    result = RunPaths(tmp_path, "run")
    result.create()
    result.spec.write_text("train:\n  epochs: 4\n")
    return result


def events(paths: RunPaths, *rows: dict[str, Any]) -> None:
    paths.events.write_text("".join(json.dumps({"job_id": "7", "world_size": 2} | row) + "\n" for row in rows))


def job(state: str, reason: str = "None") -> dict[str, QueuedJob]:
    return {"run": QueuedJob("7", "run", state, reason, "2026-01-01T00:00:00", "n1", "/logs/run")}


@pytest.mark.parametrize(
    ("queued", "state", "detail"),
    [
        (job("PENDING", "Resources"), "queued", "Resources, start 2026-01-01T00:00:00"),
        (job("PENDING", "BeginTime"), "requeued", "BeginTime"),
        (job("RUNNING"), "running", "on n1"),
        (job("COMPLETING"), "stopping", "COMPLETING"),
    ],
)
def test_the_queue_comes_first(paths: RunPaths, queued: dict[str, QueuedJob], state: str, detail: str) -> None:
    events(paths, {"event": "submitted"}, {"event": "finished", "test_accuracy": 1.0})
    found = read_state(paths, queued)
    assert found.state == state and found.detail.startswith(detail) and not found.ended


@pytest.mark.parametrize(
    ("last", "state", "detail"),
    [
        ([{"event": "finished", "test_accuracy": 93.25}], "finished", "93.25%"),
        ([{"event": "failed", "error": "RunFailedError: NaN"}], "failed", "RunFailedError: NaN"),
        ([{"event": "left", "reason": "ended", "explanation": "JobState=COMPLETING"}], "cancelled", "JobState"),
        ([{"event": "left", "reason": "timeout", "explanation": "used up"}], "stopped", "used up"),
        ([{"event": "cancelled", "by": "me"}, {"event": "checkpoint"}, {"event": "left"}], "cancelled", "by me"),
        ([{"event": "cancelled", "by": "me"}, {"event": "resumed"}], "stopped", "it ended without a word"),
        ([{"event": "cancelled", "by": "me"}, {"event": "finished", "test_accuracy": 9.0}], "finished", "9.00%"),
        ([{"event": "checkpoint"}], "stopped", "it ended without a word"),
        ([], "stopped", "its job is gone"),
    ],
)
def test_without_a_job_the_last_word_counts(
    paths: RunPaths, last: list[dict[str, Any]], state: str, detail: str
) -> None:
    events(paths, {"event": "submitted", "scheduler": "slurm"}, *last)
    found = read_state(paths, {})
    assert found.state == state and found.detail.startswith(detail) and found.ended


def test_a_held_lock_is_a_running_process(paths: RunPaths) -> None:
    events(paths, {"event": "started"})
    lock = RunLock(paths.lock)
    lock.acquire({"host": "n1"})
    assert read_state(paths, {}).state == "running"
    lock.release()
    assert read_state(paths, {}).state == "stopped"


def test_a_silent_log_is_a_hung_run(paths: RunPaths) -> None:
    paths.train_log.write_text("a line\n")
    assert read_state(paths, job("RUNNING")).state == "running"
    old = time.time() - 3600
    os.utime(paths.train_log, (old, old))
    found = read_state(paths, job("RUNNING"))
    assert found.state == "hung" and found.detail == "no log line for 60 min"


def test_figures_come_from_metrics_and_events(paths: RunPaths) -> None:
    rows = [
        {"epoch": 1, "test_accuracy": 80.0, "epoch_seconds": 10.0, "images_per_second": 5.0},
        {"epoch": 2, "test_accuracy": 70.0, "epoch_seconds": 20.0, "images_per_second": 6.0},
    ]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 3, "cut sho')
    events(paths, {"event": "started"}, {"event": "requeued", "reason": "timeout"}, {"event": "resumed"})
    found = read_state(paths, job("RUNNING"))
    assert (found.epoch, found.epochs, found.test_accuracy, found.best_accuracy) == (2, 4, 70.0, 80.0)
    assert (found.eta_seconds, found.restarts, found.requeues, found.world_size) == (30.0, 1, {"timeout": 1}, 2)


def test_a_run_never_submitted(paths: RunPaths) -> None:
    assert read_state(paths, {}).state == "not started"
