"""What status says, from files alone and with lines of squeue."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec
from stub_slurm import slurm_time

from cifar_hpc.cli.status import cells, table
from cifar_hpc.runs import state as run_state
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import PRIOR_UP_SECONDS, Progress, update_progress
from cifar_hpc.runs.state import read_state
from cifar_hpc.slurm.client import QueuedJob


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    result = RunPaths(tmp_path, "run")
    result.create()
    result.spec.write_text("train:\n  epochs: 4\n")
    return result


def events(paths: RunPaths, *rows: dict[str, Any]) -> None:
    paths.events.write_text("".join(json.dumps({"job_id": "7", "world_size": 2} | row) + "\n" for row in rows))


def job(state: str, reason: str = "None", start: str = "N/A", dependency: str = "(null)") -> dict[str, QueuedJob]:
    return {"run": QueuedJob("7", "run", state, reason, start, "n1", "gpu", dependency, "/logs/run")}


def local(ahead: timedelta) -> str:
    """A time as squeue prints it."""
    return str(int((datetime.now(UTC) + ahead).timestamp()))


IN_A_WEEK = job("PENDING", "Resources", local(timedelta(days=7, minutes=30)))


@pytest.mark.parametrize(
    ("queued", "state", "detail"),
    [
        (IN_A_WEEK, "queued", "Resources: no room yet, starts in ~7d00h"),
        (job("PENDING", "Priority"), "queued", "Priority: other jobs go first"),
        (job("PENDING", "Dependency", dependency="singleton"), "queued", "Dependency: another job of this run"),
        (job("PENDING", "JobHeldUser"), "queued", "JobHeldUser: held"),
        (job("PENDING", "BeginTime", slurm_time("2026-01-01T12:34:56")), "requeued", "until 2026-01-01 12:34:56, pre"),
        (job("PENDING", "BeginTime"), "requeued", "waits for its begin time, preempted"),
        (job("RUNNING"), "running", "on n1"),
        (job("CONFIGURING"), "running", "on n1"),
        (job("SUSPENDED"), "suspended", "by Slurm, on n1"),
        (job("COMPLETING"), "stopping", "COMPLETING: to be requeued"),
        (job("STAGE_OUT"), "stopping", "STAGE_OUT"),
        (job("REQUEUE_HOLD", "job requeued in held state"), "queued", "job requeued in held state: whoever"),
        (job("SPECIAL_EXIT", "job requeued in held state"), "queued", "job requeued in held state: whoever"),
        (job("RESV_DEL_HOLD", "ReservationDeleted", local(timedelta(days=7))), "queued", "ReservationDeleted: its res"),
        (job("REQUEUE_FED"), "queued", "Slurm has not looked at it yet"),
    ],
)  # fmt: skip
def test_the_queue_comes_first(paths: RunPaths, queued: dict[str, QueuedJob], state: str, detail: str) -> None:
    events(paths, {"event": "submitted"}, {"event": "requeued", "reason": "preemption"})
    found = read_state(paths, queued)
    assert found.state == state and found.detail.startswith(detail) and not found.ended
    assert found.reason == (queued["run"].reason if state in ("queued", "requeued") else None)


def test_a_job_that_was_told_to_begin_later_was_not_requeued(paths: RunPaths) -> None:
    events(paths, {"event": "started"}, {"event": "submitted"})
    found = read_state(paths, job("PENDING", "BeginTime", slurm_time("2026-01-01T12:34:56")))
    assert (found.state, found.detail) == ("queued", "BeginTime: not before 2026-01-01 12:34:56")
    start = datetime.fromisoformat(str(found.start_time))
    assert start == datetime(2026, 1, 1, 12, 34, 56).astimezone() and str(found.start_time).endswith("Z")


@pytest.mark.parametrize(
    ("last", "state", "detail"),
    [
        ([{"event": "finished", "test_accuracy": 93.25}], "finished", ""),
        ([{"event": "failed", "error": "RunFailedError: NaN"}], "failed", "NaN"),
        ([{"event": "failed", "error": "ValueError: x"}], "failed", "ValueError: x"),
        ([{"event": "failed", "error": "MemoryError: ", "cause": "out_of_memory"}], "failed", "out of memory: Memory"),
        ([{"event": "hang", "error": "rank 1 at step 7"}], "failed", "hung: rank 1 at step 7"),
        ([{"event": "left", "reason": "ended", "explanation": "JobState=COMPLETING"}], "cancelled", "by scancel, or"),
        ([{"event": "left", "reason": "timeout", "explanation": "used up"}], "stopped", "used up"),
        ([{"event": "cancelled", "by": "me"}, {"event": "checkpoint"}, {"event": "left"}], "cancelled", "by me"),
        ([{"event": "cancelled", "by": "me"}, {"event": "resumed"}], "stopped", "killed? it ended without a word"),
        ([{"event": "cancelled", "by": "me"}, {"event": "finished", "test_accuracy": 9.0}], "finished", ""),
        ([{"event": "checkpoint"}], "stopped", "killed? it ended without a word"),
        ([], "stopped", "its job is gone"),
    ],
)
def test_without_a_job_the_last_word_counts(
    paths: RunPaths, last: list[dict[str, Any]], state: str, detail: str
) -> None:
    events(paths, {"event": "submitted", "scheduler": "slurm"}, *last)
    found = read_state(paths, {})
    assert found.state == state and found.detail.startswith(detail) and found.ended
    silent = read_state(paths, None)
    assert silent.state == (state if state == "finished" or detail == "by me" else "unknown")
    assert silent.ended is (silent.state != "unknown")


ASKED_AT = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("second", [-60, 0, 60])
@pytest.mark.parametrize(
    ("event", "state"),
    [("submitted", "unknown"), ("requeued", "unknown"), ("checkpoint", "unknown"), ("failed", "failed")],
)
def test_what_was_heard_since_slurm_was_asked_is_no_end(paths: RunPaths, second: int, event: str, state: str) -> None:
    when = (ASKED_AT + timedelta(seconds=second)).isoformat()
    events(paths, {"event": "submitted", "scheduler": "slurm", "time": when}, {"event": event, "time": when})
    if event == "submitted":
        events(paths, {"event": "submitted", "scheduler": "slurm", "time": when})
    found = read_state(paths, {}, asked_at=ASKED_AT.timestamp())
    if second < 0 and event != "failed":
        state = "stopped"
    assert found.state == state and found.ended is (state != "unknown")
    if state == "unknown":
        what = "submitted" if event == "submitted" else "heard of"
        assert found.detail == f"{what} a moment ago, and Slurm does not know its job"
    assert read_state(paths, job("PENDING", "Priority"), asked_at=ASKED_AT.timestamp()).state == "queued"


def stale(paths: RunPaths) -> Progress:
    raise OSError(errno.ESTALE, "Stale file handle", str(paths.events))


def test_files_that_cannot_be_read_for_a_moment_do_not_end_a_run(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "read_progress", stale)
    trouble = "its files cannot be read now (Stale file handle)"
    nothing = read_state(paths, {})
    assert (nothing.state, nothing.detail, nothing.ended) == ("unreadable", trouble, True)
    queued = read_state(paths, job("RUNNING"))
    assert (queued.state, queued.detail, queued.job_id, queued.ended) == ("running", f"on n1; {trouble}", "7", False)
    lock = RunLock(paths.lock)
    lock.acquire({"host": "n2"})
    held = read_state(paths, {})
    assert (held.state, held.detail, held.ended) == ("running", f"on n2; {trouble}", False)
    lock.release()


def test_damaged_files_do_not_end_a_run_that_has_a_job(paths: RunPaths) -> None:
    paths.metrics.write_text('{"epoch": "x"}\n')
    assert read_state(paths, {}).state == "unreadable"
    found = read_state(paths, job("PENDING", "Priority"))
    assert found.state == "queued" and "; its files make no sense (ValueError: " in found.detail and not found.ended


def test_what_is_no_job_of_slurm_is_known_without_it(paths: RunPaths) -> None:
    assert read_state(paths, None).state == "not started"
    events(paths, {"event": "submitted", "scheduler": "local", "job_id": "1"}, {"event": "checkpoint"})
    assert read_state(paths, None).state == "stopped"


def test_a_held_lock_is_a_running_process(paths: RunPaths) -> None:
    events(paths, {"event": "started"})
    lock = RunLock(paths.lock)
    lock.acquire({"host": "n1"})
    assert read_state(paths, {}).state == "running"
    lock.release()
    assert read_state(paths, {}).state == "stopped"


def test_a_silent_log_is_a_hung_run(paths: RunPaths) -> None:
    paths.train_log.write_text("a line\n")
    running = job("RUNNING", start=local(-timedelta(hours=2)))
    assert read_state(paths, running).state == "running"
    old = time.time() - 3600
    os.utime(paths.train_log, (old, old))
    found = read_state(paths, running)
    assert found.state == "hung" and found.detail == "no log line for 1h00m, on n1" and found.eta_seconds is None


def test_a_start_is_not_blamed_for_the_silence_before_it(paths: RunPaths) -> None:
    paths.train_log.write_text("of a start that was preempted\n")
    os.utime(paths.train_log, (0, 0))
    assert read_state(paths, job("RUNNING", start=local(-timedelta(minutes=1)))).state == "running"
    assert read_state(paths, job("RUNNING", start=local(-timedelta(minutes=10)))).state == "hung"
    lock = RunLock(paths.lock)  # without a queue the lock's file tells when a start began
    lock.acquire({"host": "n1"})
    assert read_state(paths, {}).state == "running"
    os.utime(paths.lock, (0, 0))
    assert read_state(paths, {}).state == "hung"
    lock.release()


def test_a_job_that_never_said_anything_hangs_as_well(paths: RunPaths) -> None:
    assert read_state(paths, job("RUNNING", start=local(-timedelta(minutes=10)))).state == "hung"
    assert read_state(paths, job("RUNNING")).state == "running"


def test_a_job_whose_nodes_are_booting_does_not_hang(paths: RunPaths) -> None:
    assert read_state(paths, job("CONFIGURING", start=local(-timedelta(minutes=30)))).state == "running"


ROWS = [
    {"epoch": 1, "test_accuracy": 80.0, "epoch_seconds": 10.0, "images_per_second": 5.0},
    {"epoch": 2, "test_accuracy": 70.0, "epoch_seconds": 20.0, "images_per_second": 6.0},
]


def write_rows(paths: RunPaths, rows: list[dict[str, Any]]) -> None:
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 3, "cut sho')


def test_figures_come_from_metrics_and_events(paths: RunPaths) -> None:
    write_rows(paths, ROWS)
    events(paths, {"event": "started"}, {"event": "requeued", "reason": "timeout"}, {"event": "resumed"})
    found = read_state(paths, job("RUNNING"))
    assert (found.epoch, found.epochs, found.test_accuracy, found.best_accuracy) == (2, 4, 70.0, 80.0)
    assert (found.eta_seconds, found.restarts, found.requeues, found.world_size) == (30.0, 1, {"timeout": 1}, 2)
    assert found.restart_causes == {"timeout": 1} and found.images_per_second == 6.0


def test_the_epoch_under_way_counts(paths: RunPaths) -> None:
    write_rows(paths, ROWS)
    update_progress(paths, tiny_spec(train={"epochs": 4}), step=1080, epoch=2.25, images_per_second=9.1)
    found = read_state(paths, job("RUNNING"))
    assert (found.epoch, found.epoch_progress, found.images_per_second) == (2, 0.25, 9.1)
    assert found.eta_seconds == 1.75 * 15
    assert read_state(paths, {}).position == 2.0
    update_progress(paths, step=1800, epoch=3.75)  # of rows that were cut off again
    assert read_state(paths, job("RUNNING")).epoch_progress is None


@pytest.mark.parametrize("last", ["requeued", "left", "failed", "cancelled"])
def test_a_run_that_is_not_at_work_is_where_its_newest_checkpoint_is(paths: RunPaths, last: str) -> None:
    """Also in its first epoch."""
    update_progress(paths, tiny_spec(train={"epochs": 12}), step=52, epoch=52 / 63)
    events(paths, {"event": "started", "step": 0}, {"event": "checkpoint", "step": 52}, {"event": last})
    found = read_state(paths, {})
    assert (found.epoch, found.position, found.epoch_progress) == (0, 52 / 63, 52 / 63)
    assert cells(found)["EPOCH"] == "0.8/12"
    write_rows(paths, [row | {"step": 63 * row["epoch"]} for row in ROWS])  # of epochs that will be done again
    assert read_state(paths, {}).position == 52 / 63


def test_a_requeue_that_slurm_had_not_seen_when_it_was_asked(paths: RunPaths) -> None:
    now = datetime.now(UTC)
    events(paths, {"event": "requeued", "reason": "preemption", "time": now.isoformat()})
    assert read_state(paths, job("RUNNING"), now.timestamp() - 1).state == "requeued"
    assert read_state(paths, job("RUNNING"), now.timestamp() + 1).state == "running"


def test_where_images_grow_the_time_left_grows_with_their_pixels(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    spec = tiny_spec(train={"epochs": 4}, resizing={"initial": 16})  # 16, 16, 24, 32
    freeze(paths, spec)
    write_rows(paths, ROWS)
    at_16 = ROWS[1]["epoch_seconds"]
    assert read_state(paths, job("RUNNING")).eta_seconds == pytest.approx(at_16 * (24**2 + 32**2) / 16**2)
    update_progress(paths, spec, epoch=2.25)
    assert read_state(paths, job("RUNNING")).eta_seconds == pytest.approx(at_16 * (0.75 * 24**2 + 32**2) / 16**2)


def test_before_the_first_epoch_has_ended_the_speed_estimates(paths: RunPaths) -> None:
    assert read_state(paths, job("RUNNING")).eta_seconds is None
    update_progress(paths, tiny_spec(), 123.0, epoch=0.25)
    assert read_state(paths, job("RUNNING")).eta_seconds == 123.0


def test_restarts_and_the_wait_for_the_start_count_in_the_time_left(paths: RunPaths) -> None:
    write_rows(paths, ROWS)
    events(
        paths,
        {"event": "started", "time": "2026-01-01T00:00:00Z"},
        {"event": "signal", "step": 9, "time": "2026-01-01T02:00:00Z"},
        {"event": "requeued", "reason": "preemption", "time": "2026-01-01T02:00:00Z"},
        {"event": "resumed", "time": "2026-01-01T02:30:00Z"},
    )
    found = read_state(paths, job("RUNNING"))
    up, lost = 7200.0, 1800.0
    assert found.lost_seconds == lost
    assert found.eta_seconds == pytest.approx(30 * (1 + lost / (up + PRIOR_UP_SECONDS)))
    waiting = read_state(paths, job("PENDING", "Resources", local(timedelta(hours=1))))
    assert 3590 < float(waiting.eta_seconds or 0) - found.eta_seconds <= 3600


def test_the_pace_is_that_of_as_many_ranks(paths: RunPaths) -> None:
    write_rows(paths, [row | {"world_size": size} for row, size in zip(ROWS, (1, 2), strict=True)])
    assert read_state(paths, job("RUNNING")).eta_seconds == 40.0


def test_a_number_that_is_none_of_an_accuracy_is_damage(paths: RunPaths) -> None:
    paths.metrics.write_text(json.dumps(ROWS[0]).replace("80.0", "9" * 400) + "\n")
    found = read_state(paths, {})
    assert found.state == "unreadable" and "OverflowError" in found.detail
    table([found])


def test_a_run_never_submitted(paths: RunPaths) -> None:
    assert read_state(paths, {}).state == "not started"


def test_no_number_that_json_does_not_know_is_printed(paths: RunPaths) -> None:
    write_rows(paths, [ROWS[0] | {"test_accuracy": float("nan"), "epoch_seconds": float("inf")}])
    plain = read_state(paths, job("RUNNING")).plain()
    assert plain["test_accuracy"] is None and plain["eta_seconds"] is None
    json.dumps(plain, allow_nan=False)


@pytest.mark.process
@pytest.mark.parametrize(
    ("last", "detail"),
    [
        ({"event": "requeued", "reason": "signal"}, "starting on this machine"),
        ({"event": "finished"}, "ending on this machine"),
        ({"event": "failed", "error": "x"}, "ending on this machine"),
    ],
)
def test_a_local_controller_without_a_process_starts_one_or_ends(
    paths: RunPaths, last: dict[str, Any], detail: str
) -> None:
    name = f"submitit.local._local {paths.slurm}".split()
    command = [sys.executable, "-c", "print(flush=True); input()", *name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as controller:
        assert controller.stdout is not None and controller.stdout.readline()  # from then on /proc has its command line
        submitted = {"event": "submitted", "scheduler": "local", "job_id": str(controller.pid)}
        events(paths, submitted, {"event": "started"}, last)
        found = read_state(paths, {})
        controller.communicate(b"\n")
    assert (found.state, found.detail) == ("running", detail)
